import torch

from dte_lab.dual_path import projection_shapes
from dte_lab.hypernetwork import FeatureFusion, LoRAHypernetwork, TokenHead


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


def test_token_head_starts_at_zero():
    assert TokenHead(8, 5)(torch.randn(2, 4, 8)).abs().max() == 0
