"""The encoder's forward pass, written out from its weights with plain tensor operations."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dte_lab import TokenTable, TuningEncoder
from dte_lab.encoder import encoder_dimensions
from dte_lab.features import FeatureFusion, ImageFeatures, ResBlock
from dte_lab.lora import projection_shapes


def perturbed(module, seed=9):
    """Every parameter moved away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
    return module


def inputs(grid=4, side=4, seed=0):
    """Features of two pictures that differ in everything."""
    g = torch.Generator().manual_seed(seed)
    clip = ImageFeatures(
        2 * torch.randn(2, 20, side, side, generator=g) + 1,
        F.normalize(torch.randn(2, 12, generator=g), dim=-1),
    )
    return clip, torch.randn(2, 16 * 3 + 32 * 2, grid, grid, generator=g), torch.tensor([40, 900])


def normalised(x, groups, weight, bias):
    """Group normalisation of (C, h, w), each group over its channels and places."""
    parts = []
    for part in x.chunk(groups):
        parts.append((part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt())
    return torch.cat(parts) * weight[:, None, None] + bias[:, None, None]


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias


def silu(x):
    return x / (1 + (-x).exp())


def time_embedding(t, w, width):
    half = width // 2
    angles = t * torch.tensor([10_000 ** (-i / half) for i in range(half)])
    waves = torch.cat([angles.cos(), angles.sin()])
    hidden = silu(w["1.linear_1.weight"] @ waves + w["1.linear_1.bias"])
    return w["1.linear_2.weight"] @ hidden + w["1.linear_2.bias"]


def below(weights, prefix):
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def fused(w, patches, embeds, unet, t, grid, width):
    """Tokens (grid^2, width) of one picture."""
    x = normalised(patches, 1, w["clip_norm.weight"], w["clip_norm.bias"])
    x = torch.einsum("dc,chw->dhw", w["clip_in.weight"][..., 0, 0], x)
    x = x + w["clip_in.bias"][:, None, None]
    y = torch.einsum("dc,chw->dhw", w["unet_in.weight"][..., 0, 0], unet)
    y = y + w["unet_in.bias"][:, None, None]
    unit_variance = embeds * math.sqrt(len(embeds))
    whole = w["embed_in.weight"] @ unit_variance + w["embed_in.bias"]
    whole = whole + time_embedding(t, below(w, "time."), width)
    x = x + y + whole[:, None, None]
    for i in range(2):
        b = below(w, f"blocks.{i}.")
        h = silu(normalised(x, 8, b["norm1.weight"], b["norm1.bias"]))
        h = F.conv2d(h[None], b["conv1.weight"], b["conv1.bias"], padding=1)[0]
        h = silu(normalised(h, 8, b["norm2.weight"], b["norm2.bias"]))
        x = x + F.conv2d(h[None], b["conv2.weight"], b["conv2.bias"], padding=1)[0]
    rows = torch.stack([x[:, i, j] for i in range(grid) for j in range(grid)])  # row by row
    return layer_norm(rows + w["position"], w["norm.weight"], w["norm.bias"])


def answers(w, tokens, heads):
    """What the queries (Q, width) read from tokens (N, width)."""
    q = w["queries"]
    for i in range(2):
        b = below(w, f"blocks.{i}.")
        x = layer_norm(q, b["norm1.weight"], b["norm1.bias"])
        wq, wk, wv = b["attn.in_proj_weight"].chunk(3)
        bq, bk, bv = b["attn.in_proj_bias"].chunk(3)
        read = []
        for rows in torch.arange(len(q.T)).chunk(heads):  # head by head
            query, key, value = (
                x @ wq[rows].T + bq[rows],
                *(tokens @ m[rows].T + n[rows] for m, n in ((wk, bk), (wv, bv))),
            )
            weight = (query @ key.T / len(rows) ** 0.5).exp()
            read.append(weight / weight.sum(1, keepdim=True) @ value)
        q = q + torch.cat(read, 1) @ b["attn.out_proj.weight"].T + b["attn.out_proj.bias"]
        x = layer_norm(q, b["norm2.weight"], b["norm2.bias"])
        x = x @ b["mlp.0.weight"].T + b["mlp.0.bias"]
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
        q = q + x @ b["mlp.2.weight"].T + b["mlp.2.bias"]
    return layer_norm(q, w["norm.weight"], w["norm.bias"])


CHOSEN = {
    "width": 24, "fusion_depth": 2, "trunk_depth": 2, "num_heads": 3, "patch_channels": 5,
    "token_scale": 0.7, "offset_scale": 0.4, "zero_shot_words": 3, "zero_shot_temperature": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("rank", [3, "full"])
@torch.no_grad()
def test_forward_written_out(tiny_backbone, tiny_config, rank):
    settings = replace(tiny_config, rank=rank, **CHOSEN)
    encoder = perturbed(TuningEncoder.from_backbone(tiny_backbone, settings))
    w, table = dict(encoder.named_parameters()), TokenTable(tiny_backbone)
    clip, unet, t = inputs()
    prediction = encoder(clip, unet, t)
    keys, shapes = sorted(projection_shapes(tiny_backbone.unet)), encoder.config.projections
    for i in range(2):
        tokens = fused(
            below(w, "fusion."), clip.patches[i], clip.embeds[i], unet[i], int(t[i]), 4, 24
        )
        # v*: the best words, and what the token head adds
        cosine = encoder.word_clip @ clip.embeds[i]
        best = sorted(range(len(table)), key=lambda n: -cosine[n])[:3]
        weight = torch.tensor([math.exp(cosine[n] / 0.25) for n in best])
        weight = weight / weight.sum()
        words = table.embeddings[best]
        mixture = (weight[:, None] * words).sum(0)
        guess = mixture / mixture.norm() * (weight * words.norm(dim=1)).sum()
        head = below(w, "token_head.")
        hidden = silu(head["hidden.weight"] @ tokens.mean(0) + head["hidden.bias"])
        patches = normalised(clip.patches[i], 1, torch.ones(20), torch.zeros(20))
        places = torch.einsum("dc,chw->dhw", head["narrow.weight"][..., 0, 0], patches).flatten()
        residual = head["out.weight"] @ hidden + head["out.bias"]
        residual = residual + head["read.weight"] @ places / math.sqrt(5 * 16)
        narrowed = [x for token in tokens for x in head["narrow_tokens.weight"] @ token]
        narrowed = torch.stack(narrowed) / math.sqrt(5 * 16)
        residual = residual + head["read_tokens.weight"] @ narrowed
        entry = math.sqrt((table.embeddings.double() ** 2).mean())
        v_star = w["zero_shot_weight"] * guess + 0.7 * entry * residual
        torch.testing.assert_close(prediction.v_star[i], v_star, atol=1e-4, rtol=1e-3)
        assert torch.equal(prediction.class_word[i], table.embeddings[best[0]])
        # offsets: one answer per matrix
        net = below(w, "hypernetwork.")
        rows = answers(net, tokens, 3)
        assert set(prediction.offsets) == set(keys)
        for n, key in enumerate(keys):
            a, b = (m[i] for m in prediction.offsets[key])
            d_in, d_out = shapes[key]
            if rank == "full":
                expected_a = 0.4 * (net[f"heads.{d_in}x{d_out}.weight"] @ rows[n])
                expected_a = expected_a.reshape(d_in, d_out) / math.sqrt(d_in)
                expected_b = torch.eye(d_out)
            else:
                expected_a = (net[f"heads.A{d_in}.weight"] @ rows[2 * n]).reshape(d_in, 3)
                expected_b = 0.4 * (net[f"heads.B{d_out}.weight"] @ rows[2 * n + 1])
                expected_b = expected_b.reshape(3, d_out)
            torch.testing.assert_close(a, expected_a, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(b, expected_b, atol=1e-4, rtol=1e-3)


def test_patches_on_a_coarser_grid_are_interpolated_with_antialias():
    torch.manual_seed(0)
    fusion = FeatureFusion(clip_dim=8, embed_dim=5, unet_dim=7, width=8, grid=2, depth=0)
    with torch.no_grad():  # show the patches as they are
        fusion.clip_in.weight.copy_(torch.eye(8)[..., None, None])
        for weight in (fusion.clip_in.bias, fusion.unet_in.weight, fusion.unet_in.bias,
                       fusion.embed_in.weight, fusion.embed_in.bias, fusion.position):  # fmt: skip
            weight.zero_()
        fusion.time[1].linear_2.weight.zero_()
        fusion.time[1].linear_2.bias.zero_()
    fusion.norm = torch.nn.Identity()
    patches = torch.randn(1, 8, 6, 6)
    tokens = fusion(
        ImageFeatures(patches, torch.zeros(1, 5)), torch.zeros(1, 7, 2, 2), torch.tensor([3])
    )
    x = normalised(patches[0], 1, torch.ones(8), torch.zeros(8))
    # A triangle of half width 3 patches around each centre (1 and 4), cut at the border.
    triangle = [[max(0, 1 - abs(i - c) / 3) for i in range(6)] for c in (1, 4)]
    weight = torch.tensor(triangle)
    weight = weight / weight.sum(1, keepdim=True)
    expected = torch.einsum("yi,dij,xj->yxd", weight, x, weight).flatten(0, 1)
    torch.testing.assert_close(tokens[0], expected, atol=1e-5, rtol=1e-4)


def test_a_block_that_adds_nothing_is_the_identity():
    block = ResBlock(8)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(block(x), x)


def test_an_encoder_that_was_never_bound_predicts_nothing(tiny_backbone, tiny_config):
    """Made by its dimensions alone it knows no words: NaN, not a quiet zero."""
    table = TokenTable(tiny_backbone)
    encoder = TuningEncoder(
        **encoder_dimensions(tiny_backbone, table, tiny_config), settings=vars(tiny_config)
    )
    prediction = encoder(*inputs())
    assert prediction.v_star.isnan().all() and prediction.class_word.isnan().all()
    encoder.bind(tiny_backbone, table)
    assert encoder(*inputs()).v_star.isfinite().all()
