from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import MethodConfig, PromptEncoder, TuneConfig, TuningEncoder, tune
from dte_lab.dual_path import dual_path
from dte_lab.e4t import E4TEncoder
from dte_lab.features import FeatureFusion, ResBlock
from dte_lab.hypernetwork import (
    CrossBlock,
    FullHypernetwork,
    LoRAHypernetwork,
    TokenHead,
    build_hypernetwork,
    count_parameters,
)
from dte_lab.lora import (
    effective_rank,
    inner_products,
    is_whole,
    low_rank_product,
    projection_shapes,
    singular_values,
    truncate,
)


def test_shapes_scale_and_exact_no_op(tiny_backbone):
    shapes = projection_shapes(tiny_backbone.unet)
    torch.manual_seed(0)
    net = LoRAHypernetwork(shapes, 4, 32, 2, 1, offset_scale=0.1)
    tokens = torch.randn(3, 16, 32)
    offsets = net(tokens)
    assert set(offsets) == set(shapes)
    for key, (a, b) in offsets.items():
        d_in, d_out = shapes[key]
        assert a.shape == (3, d_in, 4) and b.shape == (3, 4, d_out)
        assert b.abs().max() == 0
        assert 0.5 < a.std() * d_in**0.5 < 2  # x A has the scale of x


def test_every_query_and_head_can_learn(tiny_backbone):
    """After B has left zero, gradients reach every parameter and every query."""
    shapes = projection_shapes(tiny_backbone.unet)
    torch.manual_seed(0)
    net = LoRAHypernetwork(shapes, 2, 32, 2, 2, offset_scale=0.1)
    for name, head in net.heads.items():
        if name[0] == "B":
            torch.nn.init.normal_(head.weight)
    loss = sum((a @ b).square().sum() for a, b in net(torch.randn(2, 16, 32)).values())
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (net.queries.grad.abs().sum(dim=1) > 0).all()


def test_each_matrix_answers_its_own_query(tiny_backbone):
    """Changing one query changes that one matrix: nothing is filed under a wrong key."""
    shapes = projection_shapes(tiny_backbone.unet)
    torch.manual_seed(0)
    net = LoRAHypernetwork(shapes, 2, 32, 2, 1, offset_scale=1.0)
    for head in net.heads.values():
        torch.nn.init.normal_(head.weight)
    tokens = torch.randn(1, 16, 32)
    before = [m for pair in net(tokens).values() for m in pair]
    for i in (0, 1, 37, len(before) - 1):
        with torch.no_grad():
            net.queries[i] += 1
        after = [m for pair in net(tokens).values() for m in pair]
        changed = [j for j, (x, y) in enumerate(zip(before, after, strict=True)) if (x != y).any()]
        assert changed == [i]
        before = after


def test_fusion_depends_on_all_its_inputs():
    torch.manual_seed(0)
    fusion = FeatureFusion(clip_dim=6, embed_dim=5, unet_dim=7, width=16, grid=4, depth=1)
    patches, embeds = torch.randn(2, 6, 3, 3), torch.randn(2, 5)
    unet, t = torch.randn(2, 7, 4, 4), torch.tensor([10, 500])
    tokens = fusion((patches, embeds), unet, t)
    assert tokens.shape == (2, 16, 16)
    for changed in (
        fusion((patches.flip(-1), embeds), unet, t),
        fusion((patches, -embeds), unet, t),
        fusion((patches, embeds), unet.flip(-1), t),
        fusion((patches, embeds), unet, t.flip(0)),
    ):
        assert (changed - tokens).abs().max() > 1e-3


def test_fusion_sees_embeds_whose_entries_have_variance_1():
    """CLIP's embeds are unit vectors; the projection gets what a trained layer expects."""
    torch.manual_seed(0)
    fusion = FeatureFusion(clip_dim=6, embed_dim=5, unet_dim=7, width=16, grid=4, depth=1)
    seen = []
    fusion.embed_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeds = F.normalize(torch.randn(2, 5), dim=-1)
    fusion((torch.randn(2, 6, 4, 4), embeds), torch.randn(2, 7, 4, 4), torch.tensor([10, 500]))
    torch.testing.assert_close(seen[0], embeds * 5**0.5)
    torch.testing.assert_close(seen[0].square().mean(dim=1), torch.ones(2))


def test_blocks_add_to_what_they_are_given():
    """With the last layer of each branch at zero, a block passes its input through."""
    torch.manual_seed(0)
    res, cross = ResBlock(8), CrossBlock(8, 2)
    for last in (res.conv2, cross.attn.out_proj, cross.mlp[2]):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    x, queries = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 8)
    assert torch.equal(res(x), x)
    assert torch.equal(cross(queries, torch.randn(2, 5, 8)), queries)


@pytest.mark.parametrize("rank", [2, "full"])
def test_offset_scale_multiplies_the_offset_once(rank):
    shapes = {"one.to_q": (6, 4), "two.to_k": (4, 6)}
    net = build_hypernetwork(shapes, rank, 8, 2, 1, offset_scale=0.1)
    for head in net.heads.values():
        torch.nn.init.normal_(head.weight)
    tokens = torch.randn(2, 5, 8)
    small = net(tokens)
    net.offset_scale = 0.7
    for key, (a, b) in net(tokens).items():
        torch.testing.assert_close(a @ b, 7 * (small[key][0] @ small[key][1]))


def test_token_head_starts_at_zero():
    head = TokenHead(8, 5, clip_dim=6, grid=2, patch_channels=3)
    assert head(torch.randn(2, 4, 8), torch.randn(2, 6, 2, 2)).abs().max() == 0


@pytest.mark.parametrize("side", [2, 4])
def test_token_head_reads_patches_in_their_places(side):
    torch.manual_seed(0)
    head = TokenHead(8, 5, clip_dim=6, grid=2, patch_channels=3)
    torch.nn.init.normal_(head.read.weight)
    tokens, patches = torch.randn(2, 4, 8), torch.randn(2, 6, side, side)
    assert head.places(patches).shape == (2, 12)
    assert (head(tokens, patches.flip(-1)) - head(tokens, patches)).abs().max() > 0.1


def test_full_matrices_start_as_a_no_op_and_are_whole(tiny_backbone):
    unet, shapes = tiny_backbone.unet, projection_shapes(tiny_backbone.unet)
    torch.manual_seed(0)
    net = FullHypernetwork(shapes, 16, 2, 1, offset_scale=1.0)
    tokens = torch.randn(2, 4, 16)
    assert all((a @ b).abs().max() == 0 for a, b in net(tokens).values())
    for head in net.heads.values():
        torch.nn.init.normal_(head.weight)
    offsets = net(tokens)
    assert set(offsets) == set(shapes)
    for key, values in singular_values(offsets).items():
        assert values.shape == (2, min(*shapes[key])) or shapes[key][0] < shapes[key][1]
        assert (effective_rank(values) > 4).all()  # no low rank is hidden in them
    with dual_path(unet, offsets):  # fits the UNet
        unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 16, 24))


@pytest.fixture(scope="module")
def sd15_shapes():
    """The UNet of Stable Diffusion 1.5 without a byte of weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return projection_shapes(UNet2DConditionModel(cross_attention_dim=768))


def test_parameters_for_sd15_are_counted_without_allocation(sd15_shapes):
    assert len(sd15_shapes) == 128  # 32 attention layers
    # Transformer blocks by width: 4 + 2 square projections each, and 2 from the text's 768.
    blocks = {320: 5, 640: 5, 1280: 6}
    weights = sum(n * (6 * width**2 + 2 * 768 * width) for width, n in blocks.items())
    assert sum(i * o for i, o in sd15_shapes.values()) == weights == 93_511_680
    size = {rank: count_parameters(sd15_shapes, rank, 160, 4, 2) for rank in (1, 4, "full")}
    assert size[1]["offsets"] == 199_296 and size[4]["offsets"] == 4 * 199_296
    assert size["full"]["offsets"] == weights
    # A: 320, 640, 768, 1280 in; B: 320, 640, 1280 out. Heads grow with widths, not with layers.
    assert size[4]["heads"] == 160 * 4 * (320 + 640 + 768 + 1280 + 320 + 640 + 1280)
    shapes = {(i, o) for i, o in sd15_shapes.values()}
    assert size["full"]["heads"] == 160 * sum(i * o for i, o in shapes)
    assert size["full"]["hypernetwork"] > 100 * size[4]["hypernetwork"]


def test_count_is_that_of_a_real_network(tiny_backbone):
    shapes = projection_shapes(tiny_backbone.unet)
    for rank, net in [
        (2, LoRAHypernetwork(shapes, 2, 16, 2, 1, 1.0)),
        ("full", FullHypernetwork(shapes, 16, 2, 1, 1.0)),
    ]:
        expected = sum(p.numel() for p in net.parameters())
        assert count_parameters(shapes, rank, 16, 2, 1)["hypernetwork"] == expected


def test_singular_values_and_truncation_against_numpy(tiny_offsets):
    offsets = tiny_offsets(2, rank=4)
    values, short = singular_values(offsets), truncate(offsets, 2)
    for key in list(offsets)[:6]:
        a, b = offsets[key]
        for i in range(2):
            u, s, vh = np.linalg.svd((a[i] @ b[i]).numpy(), full_matrices=False)
            np.testing.assert_allclose(values[key][i], s[:4], rtol=1e-4)
            best = (u[:, :2] * s[:2]) @ vh[:2]
            x, y = (m[i].numpy() for m in short[key])
            assert x.shape[1] == y.shape[0] == 2
            np.testing.assert_allclose(x @ y, best, atol=1e-5)


def test_effective_rank():
    values = torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])
    p = np.array([0.75, 0.25])
    expected = torch.tensor([4.0, 1.0, float(np.exp(-(p * np.log(p)).sum())), 0.0])
    torch.testing.assert_close(effective_rank(values), expected)


def test_inner_products_against_whole_matrices(tiny_offsets):
    offsets = tiny_offsets(3)
    whole = torch.cat([(a @ b).flatten(1) for a, b in offsets.values()], dim=1)
    torch.testing.assert_close(inner_products(offsets), whole @ whole.T, rtol=1e-4, atol=1e-4)


def test_whole_matrices_are_told_from_factors_and_can_be_cut(tiny_backbone, tiny_offsets):
    shapes = projection_shapes(tiny_backbone.unet)
    g = torch.Generator().manual_seed(0)
    offsets = {
        key: (torch.randn(2, d_in, d_out, generator=g), torch.eye(d_out).expand(2, -1, -1))
        for key, (d_in, d_out) in shapes.items()
    }
    assert all(is_whole(b) for _, b in offsets.values())
    assert not any(is_whole(b) for _, b in tiny_offsets().values())
    eye = torch.eye(24)[None]
    assert is_whole(eye.half()) and not is_whole(1.001 * eye) and not is_whole(eye[:, :4])
    assert not is_whole(torch.cat([eye, eye.flip(1)]))  # every sample's
    values, short = singular_values(offsets), truncate(offsets, 3)
    for key in list(offsets)[:9]:
        a = offsets[key][0][1].numpy()
        u, s, vh = np.linalg.svd(a, full_matrices=False)
        np.testing.assert_allclose(values[key][1][: len(s)], s, rtol=1e-3, atol=1e-5)
        x, y = (m[1].numpy() for m in short[key])
        assert x.shape[1] == y.shape[0] == 3
        np.testing.assert_allclose(x @ y, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-3)


@pytest.mark.parametrize("kind", ["full", "e4t"])
def test_tuning_whole_matrices_leaves_their_identity_alone(
    tiny_backbone, tiny_config, tiny_pixels, kind
):
    """A second factor of full size would make another method of it."""
    settings = replace(tiny_config, rank="full" if kind == "full" else 2)
    make = TuningEncoder if kind == "full" else E4TEncoder
    encoder = make.from_backbone(tiny_backbone, settings).eval()
    prediction, encode = encoder.predict(tiny_backbone, tiny_pixels), PromptEncoder(tiny_backbone)
    method = replace(MethodConfig(), alpha_blend=1.0, regulariser="none")
    config = TuneConfig(num_steps=2, batch_size=2)
    result = tune(tiny_backbone, encode, prediction, tiny_pixels, method, config, progress=False)
    for key, (a, b) in result.prediction.offsets.items():
        assert torch.equal(b[0], torch.eye(b.shape[2])), key
        assert not torch.equal(a, prediction.offsets[key][0]), key


def test_heads_of_one_width_on_both_sides_are_two_groups():
    """A and B of width 6 have heads of their own, and each query its number."""
    net = LoRAHypernetwork({"b.to_k": (4, 6), "a.to_q": (6, 6)}, 2, 8, 2, 1, offset_scale=1.0)
    assert net.keys == ["a.to_q", "b.to_k"] and len(net.queries) == 4
    known = {name: (g.side, g.shape, g.numbers) for name, g in net.groups.items()}
    assert known == {
        "A6": ("A", (6, 2), [0]), "B6": ("B", (2, 6), [1, 3]), "A4": ("A", (4, 2), [2]),
    }  # fmt: skip
    whole = FullHypernetwork({"b.to_k": (4, 6), "a.to_q": (6, 6)}, 8, 2, 1, offset_scale=1.0)
    known = {name: (g.side, g.shape, g.numbers) for name, g in whole.groups.items()}
    assert known == {"6x6": ("W", (6, 6), [0]), "4x6": ("W", (4, 6), [1])}


def test_keys_of_shipped_weights():
    """Names in the state dict are those of the files that are out."""
    net = LoRAHypernetwork({"a.to_q": (6, 4)}, 2, 8, 2, 1, offset_scale=1.0)
    names = {name.split(".")[0] for name in net.state_dict()}
    assert names == {"queries", "blocks", "norm", "heads"}
    assert {"heads.A6.weight", "heads.B4.weight"} <= set(net.state_dict())


def test_the_product_of_one_pair_serves_all_samples(tiny_offsets):
    x = torch.randn(3, 5, 24)
    a, b = torch.randn(1, 24, 2), torch.randn(1, 2, 7)
    expected = torch.stack([row @ a[0] @ b[0] for row in x])
    torch.testing.assert_close(low_rank_product(x, a, b), expected)
    a, b = torch.randn(3, 24, 2), torch.randn(3, 2, 7)
    each = torch.stack([x[i] @ a[i] @ b[i] for i in range(3)])
    torch.testing.assert_close(low_rank_product(x, a, b), each)
    ours = low_rank_product(x, a[:1], b)
    torch.testing.assert_close(ours, torch.stack([x[i] @ a[0] @ b[i] for i in range(3)]))
