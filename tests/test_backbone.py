import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import dte_lab
from dte_lab import load_backbone
from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
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


def copied(folder, root):
    shutil.copytree(folder, root)
    return root


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder", "unet", "vae"])
@pytest.mark.parametrize("fault", ["missing", "shape", "unknown", "not finite"])
def test_a_part_with_a_damaged_tensor_is_refused_by_name(tiny_path, tmp_path, part, fault):
    root = copied(tiny_path, tmp_path / "copy")
    (file,) = (root / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-3]
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = torch.zeros(2, 3, 5)
    elif fault == "unknown":
        name = "elsewhere.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DTEError) as error:
        load_backbone(root)
    assert f"{file}: the tensor {name} " in str(error.value) and fault in str(error.value)
    assert "\n" not in str(error.value)


def test_infinity_is_not_finite_and_sharded_weights_name_their_file(tiny_path, tmp_path):
    root = copied(tiny_path, tmp_path / "copy")
    whole = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    files = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors"
             for i, name in enumerate(names)}  # fmt: skip
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    path = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))

    def write():
        for file in set(files.values()):
            part = {name: tensors[name] for name in names if files[name] == file}
            save_file(part, root / "unet" / file, {"format": "pt"})

    write()
    expected = load_backbone(tiny_path).unet.state_dict()
    for name, value in load_backbone(root).unet.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tensors[names[7]].view(-1)[0] = -torch.inf
    write()
    with pytest.raises(DTEError, match=f"{files[names[7]]}: the tensor {names[7]} holds values"):
        load_backbone(root)


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder", "unet", "vae"])
def test_damaged_folders_are_one_sentence(tiny_path, tmp_path, part):
    root = copied(tiny_path, tmp_path / "copy")
    (file,) = (root / part).glob("*.safetensors")
    whole, config = file.read_bytes(), root / part / "config.json"
    file.write_bytes(whole[:2000])
    with pytest.raises(DTEError, match=rf"{file.name} cannot be loaded \(.*\): it is damaged"):
        load_backbone(root)
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(DTEError, match="no weights in safetensors, and pickled ones are never"):
        load_backbone(root)
    file.write_bytes(whole)
    for text in ("[1]", "no json"):
        config.write_text(text)
        with pytest.raises(DTEError, match="config.json"):
            load_backbone(root)


def test_the_small_world_is_known_by_its_autoencoder(tiny_backbone, small_pipe):
    assert small_pipe.backbone.draws_small_world
    assert tiny_backbone.resolution <= 64 and not tiny_backbone.draws_small_world


def test_loaded_blocks_may_lie_in_each_other(tiny_backbone, monkeypatch):
    backbone, moves = dataclasses.replace(tiny_backbone, offload=True), []
    monkeypatch.setattr(backbone.vae, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(backbone.image_encoder, "to", lambda device: moves.append(f"i {device}"))
    with backbone.loaded(backbone.vae):
        moves += ["in"]
        with backbone.loaded(backbone.image_encoder), backbone.loaded(backbone.vae) as vae:
            assert vae is backbone.vae
        moves += ["still in"]
        with pytest.raises(KeyError), backbone.loaded(backbone.vae):
            raise KeyError
        moves += ["still in"]
    assert moves == ["cpu", "in", "i cpu", "i cpu", "still in", "still in", "cpu"]
    plain, moves[:] = dataclasses.replace(tiny_backbone), []
    with plain.loaded(plain.vae):
        pass
    assert not moves  # without offload nothing moves


def test_clip_pixels_of_large_pictures_are_pils_bicubic(tiny_backbone):
    """512 -> 224, as with Stable Diffusion 1.5, against PIL's antialiased bicubic."""
    coarse = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fine = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(1)) - 0.5
    picture = F.interpolate(coarse[None], (512, 512))[0] * 0.4 + fine
    image = Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    small = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255
    mean, std = np.array([0.1, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])
    processor = SimpleNamespace(image_mean=mean.tolist(), image_std=std.tolist())
    tower = SimpleNamespace(config=SimpleNamespace(image_size=224))
    stand_in = SimpleNamespace(
        image_encoder=tower, image_processor=processor, device="cpu", dtype=torch.float32
    )
    ours = Backbone.clip_pixels(stand_in, picture[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, (small - mean) / std, atol=0.02)  # PIL rounds to bytes


def test_decoded_latents_are_unscaled_and_clipped(tiny_backbone):
    class Decoder(torch.nn.Module):
        config = SimpleNamespace(scaling_factor=0.5)

        def decode(self, z):
            return SimpleNamespace(sample=z[:, :3])

    backbone = dataclasses.replace(tiny_backbone, vae=Decoder())
    z = torch.tensor([0.2, -0.4, 3.0, 9.0])[None, :, None, None]
    expected = torch.tensor([0.4, -0.8, 1.0])[None, :, None, None]
    torch.testing.assert_close(backbone.decode_latents(z), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runwayml/stable-diffusion-v1-5", "hf download runwayml/stable-diffusion-v1-5 --local"),
        ("/some/where/else", "No backbone at /some/where/else"),
        ("../other", "No backbone at ../other"),
        ("word", "No backbone at word"),
    ],
)
def test_a_name_of_the_hub_is_told_how_to_become_a_folder(name, said):
    with pytest.raises(DTEError, match=re.escape(said)):
        load_backbone(name)
