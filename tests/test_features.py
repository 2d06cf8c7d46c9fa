import pytest
import torch
import torch.nn.functional as F

from dte_lab import PromptEncoder
from dte_lab.features import image_features, unet_feature_dim, unet_features, unet_layers


def test_unet_features_are_the_maps_of_a_full_forward_pass(tiny_backbone):
    unet, x = (
        tiny_backbone.unet,
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    t, text = torch.tensor([10, 800]), PromptEncoder(tiny_backbone).plain([""])
    seen = []
    hooks = [unet.conv_in.register_forward_hook(lambda m, i, out: seen.append(out))]
    for block in unet.down_blocks:
        hooks.append(block.register_forward_hook(lambda m, i, out: seen.extend(out[1])))
    hooks.append(unet.mid_block.register_forward_hook(lambda m, i, out: seen.append(out)))
    unet(x, t, text.expand(2, -1, -1))
    for hook in hooks:
        hook.remove()

    ours = unet_features(tiny_backbone, x, t, text, grid=4)
    assert ours.shape == (2, unet_feature_dim(unet), 4, 4)
    expected = []
    for m in seen:
        m = (m - m.mean((1, 2, 3), keepdim=True)) / m.std((1, 2, 3), keepdim=True, correction=0)
        expected.append(F.avg_pool2d(m, m.shape[-1] // 4))
    torch.testing.assert_close(ours, torch.cat(expected, 1), atol=1e-4, rtol=1e-3)


def test_unet_features_upsample_to_a_finer_grid(tiny_backbone):
    text = PromptEncoder(tiny_backbone).plain([""])
    x, t = torch.zeros(1, 4, 8, 8), torch.tensor([5])
    ours = unet_features(tiny_backbone, x, t, text, grid=8)
    assert ours.shape[-2:] == (8, 8)
    mid = ours[:, -32:]  # a 4x4 map, each value repeated 2x2
    assert torch.equal(mid[..., ::2, ::2], mid[..., 1::2, 1::2])


def test_image_features(tiny_backbone, tiny_pixels):
    patches, embeds = image_features(tiny_backbone, tiny_pixels)
    assert patches.shape == (3, 20, 4, 4) and embeds.shape == (3, 12)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    output = tiny_backbone.image_encoder(tiny_backbone.clip_pixels(tiny_pixels))
    torch.testing.assert_close(patches[1, :, 2, 3], output.last_hidden_state[1, 1 + 2 * 4 + 3])


def test_chosen_layers_are_the_rows_of_all_and_the_rest_is_not_computed(tiny_backbone):
    unet, text = tiny_backbone.unet, PromptEncoder(tiny_backbone).plain([""])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([300])
    names = unet_layers(unet)
    assert names == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block"]
    parts = []
    for name in names:
        parts.append(unet_features(tiny_backbone, x, t, text, grid=4, layers=[name]))
        assert parts[-1].shape[1] == unet_feature_dim(unet, [name])
    whole = unet_features(tiny_backbone, x, t, text, grid=4)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    two = unet_features(tiny_backbone, x, t, text, grid=4, layers=["down_blocks.1", "conv_in"])
    assert torch.equal(two, torch.cat([parts[0], parts[2]], 1))  # in the UNet's order

    calls = []
    handle = unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    unet_features(tiny_backbone, x, t, text, layers=["down_blocks.0"])
    assert not calls
    unet_features(tiny_backbone, x, t, text)
    assert calls
    handle.remove()
    for bad in (["down_blocks.7"], []):
        with pytest.raises(ValueError, match="choose some of conv_in, down_blocks.0"):
            unet_features(tiny_backbone, x, t, text, layers=bad)


def test_the_patches_of_another_layer(tiny_backbone, tiny_pixels):
    output = tiny_backbone.image_encoder(
        tiny_backbone.clip_pixels(tiny_pixels), output_hidden_states=True
    )
    patches, embeds = image_features(tiny_backbone, tiny_pixels, layer=-2)
    torch.testing.assert_close(patches[2, :, 1, 0], output.hidden_states[-2][2, 1 + 4])
    torch.testing.assert_close(embeds, image_features(tiny_backbone, tiny_pixels).embeds)
