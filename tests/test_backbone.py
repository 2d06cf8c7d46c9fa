import pytest
import torch

import dte_lab
from dte_lab import load_backbone
from dte_lab.objective import add_noise, diffusion_target


def test_public_names_resolve():
    for name in dte_lab.__all__:
        assert getattr(dte_lab, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dte_lab.no_such_name


def test_backbone_is_frozen_and_sized(tiny_backbone):
    assert tiny_backbone.resolution == 16
    assert tiny_backbone.latent_shape == (4, 8, 8)
    assert tiny_backbone.prediction_type == "v_prediction"
    assert tiny_backbone.alphas_cumprod.shape == (1000,)
    assert tiny_backbone.has_projection
    for module in tiny_backbone.modules:
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_convolutions_are_in_the_layout_that_is_fast_on_a_cpu():
    backbone = load_backbone("small", device="cpu")
    for module in (backbone.unet, backbone.vae):
        weights = [w for w in module.parameters() if w.dim() == 4 and w.shape[-1] > 1]
        assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_latents_round_trip_shapes_and_scale(tiny_backbone, tiny_pixels):
    latents = tiny_backbone.encode_images(tiny_pixels)
    assert latents.shape == (3, 4, 8, 8)
    moments = tiny_backbone.vae.encode(tiny_pixels).latent_dist.mean
    torch.testing.assert_close(latents, moments * tiny_backbone.vae.config.scaling_factor)
    decoded = tiny_backbone.decode_latents(latents)
    assert decoded.shape == tiny_pixels.shape and decoded.abs().max() <= 1


def test_clip_pixels_match_the_image_processor(tiny_backbone, picture):
    from dte_lab.common.images import to_square_tensor

    image = picture.resize((16, 16))
    ours = tiny_backbone.clip_pixels(to_square_tensor(image, 16)[None])
    theirs = tiny_backbone.image_processor(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_add_noise_and_target_match_the_scheduler(tiny_backbone):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(tiny_backbone.scheduler.config)
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 900])
    ours = add_noise(tiny_backbone, x, noise, t)
    torch.testing.assert_close(ours, scheduler.add_noise(x, noise, t))
    ours = diffusion_target(tiny_backbone, x, noise, t)
    torch.testing.assert_close(ours, scheduler.get_velocity(x, noise, t))


def test_missing_backbones(tmp_path):
    with pytest.raises(ValueError, match="No backbone at"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lacks the folder"):
        load_backbone(tmp_path)
