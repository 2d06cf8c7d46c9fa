"""The dual path against independent formulas: merged weights, plain attention, autograd."""

import copy

import pytest
import torch

from dte_lab.dual_path import alpha_at, dual_path
from dte_lab.lora import attention_layers, projection_shapes

B, L, D = 2, 16, 24
T = torch.tensor([100, 700])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, SOFT, HARD = randn(B, 4, 8, 8), randn(B, L, D, seed=1), randn(B, L, D, seed=2)


def run(unet, text=SOFT, x=X, t=T):
    return unet(x, t, text).sample


def plain_attention(x, text, w_q, w_k, w_v, heads):
    """softmax(q k^T / sqrt(hs)) v of one sample, head by head: (T, C), (S, D) -> (T, H*hs)."""
    q, k, v = x @ w_q, text @ w_k, text @ w_v
    size = q.shape[-1] // heads
    out = []
    for h in range(heads):
        s = slice(h * size, (h + 1) * size)
        out.append((q[:, s] @ k[:, s].T / size**0.5).softmax(-1) @ v[:, s])
    return torch.cat(out, dim=-1)


def plain_branch(attn, offsets, name, x, soft, hard, alpha, offsets_on):
    """The module docstring's formula, for one sample and with merged weights."""
    base = {p: getattr(attn, p).weight.T for p in ("to_q", "to_k", "to_v")}
    base["to_out"] = attn.to_out[0].weight.T
    shifted = {
        p: w + offsets[f"{name}.{p}"][0] @ offsets[f"{name}.{p}"][1] for p, w in base.items()
    }
    w_soft, w_hard = (shifted, base) if offsets_on == "soft" else (base, shifted)

    def branch(text, w):
        out = plain_attention(x, text, w["to_q"], w["to_k"], w["to_v"], attn.heads)
        return out @ w["to_out"] + attn.to_out[0].bias

    return alpha * branch(soft, w_soft) + (1 - alpha) * branch(hard, w_hard)


def test_layers_and_shapes(tiny_backbone):
    names = list(attention_layers(tiny_backbone.unet))
    assert len(names) == 14 and names == sorted(names)
    shapes = projection_shapes(tiny_backbone.unet)
    assert len(shapes) == 4 * 14
    assert shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == (24, 32)


@pytest.mark.parametrize("granularity", ["attention", "block"])
def test_alpha_0_is_the_vanilla_unet_with_the_hard_prompt(tiny_backbone, tiny_offsets, granularity):
    unet = tiny_backbone.unet
    with dual_path(unet, tiny_offsets(B), HARD, 0.0, granularity=granularity):
        ours = run(unet)
    torch.testing.assert_close(ours, run(unet, HARD), atol=1e-6, rtol=0)
    assert (ours - run(unet, SOFT)).abs().max() > 1e-3


def test_alpha_1_is_the_unet_with_merged_weights(tiny_backbone, tiny_offsets, merged_unet):
    unet, offsets = tiny_backbone.unet, tiny_offsets(1)
    with dual_path(unet, offsets, alpha_blend=1.0):
        ours = run(unet)
    expected = run(merged_unet(offsets))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert (ours - run(unet)).abs().max() > 1e-2


def test_samples_of_a_batch_have_their_own_offsets(tiny_backbone, tiny_offsets, merged_unet):
    unet, offsets = tiny_backbone.unet, tiny_offsets(B)
    with dual_path(unet, offsets):
        ours = run(unet)
    for i in range(B):
        own = {key: (a[i : i + 1], b[i : i + 1]) for key, (a, b) in offsets.items()}
        alone = run(merged_unet(own), SOFT[i : i + 1], X[i : i + 1], T[i : i + 1])
        torch.testing.assert_close(ours[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["attention", "block"])
@pytest.mark.parametrize("offsets_on", ["soft", "hard"])
def test_swapping_paths_swaps_pairings(
    tiny_backbone, tiny_offsets, merged_unet, offsets_on, granularity
):
    """At alpha 0 and 1 each offsets_on is one known plain UNet."""
    unet, offsets = tiny_backbone.unet, tiny_offsets(1)
    plain, merged = unet, merged_unet(offsets)
    soft_unet, hard_unet = (merged, plain) if offsets_on == "soft" else (plain, merged)
    for alpha, expected in [(1.0, run(soft_unet, SOFT)), (0.0, run(hard_unet, HARD))]:
        with dual_path(unet, offsets, HARD, alpha, offsets_on, granularity):
            ours = run(unet)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offsets_on", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_branch_and_its_gradients_agree_with_the_plain_formula(
    tiny_backbone, tiny_offsets, kind, offsets_on
):
    name = f"down_blocks.1.attentions.0.transformer_blocks.0.{kind}"
    attn = attention_layers(tiny_backbone.unet)[name].double()
    try:
        x, soft, hard = (z.double() for z in (randn(1, 9, 32), SOFT[:1], HARD[:1]))
        if kind == "attn1":
            soft = hard = None
        leaves = {
            k: tuple(m.double().requires_grad_() for m in pair)
            for k, pair in tiny_offsets(1).items()
            if k.startswith(name)
        }
        inputs = [m for pair in leaves.values() for m in pair]
        if kind == "attn2":
            inputs.append(soft.requires_grad_())
        weight = randn(1, 9, 32, seed=3).double()

        hard_states = HARD[:1].double()  # also given to self-attention, which must not read it
        with dual_path(tiny_backbone.unet, leaves, hard_states, 0.3, offsets_on):
            ours = attn(x, soft) if kind == "attn2" else attn(x)
        ours_grad = torch.autograd.grad((ours * weight).sum(), inputs)

        single = {k: (a[0], b[0]) for k, (a, b) in leaves.items()}
        soft_text, hard_text = (x[0], x[0]) if kind == "attn1" else (soft[0], hard[0])
        plain = plain_branch(attn, single, name, x[0], soft_text, hard_text, 0.3, offsets_on)[None]
        plain_grad = torch.autograd.grad((plain * weight).sum(), inputs)

        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-8)
        for mine, theirs in zip(ours_grad, plain_grad, strict=True):
            assert theirs.abs().max() > 1e-6
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-7)
    finally:
        attn.float()


class PlainDualProcessor:
    """An independent dual path on merged weights, sample by sample, for the whole UNet."""

    def __init__(self, name, offsets, hard, alpha):
        self.name, self.offsets, self.hard, self.alpha = name, offsets, hard, alpha

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        rows = []
        for i, x in enumerate(hidden_states):
            single = {k: (a[i], b[i]) for k, (a, b) in self.offsets.items()}
            soft, hard = x, x
            if encoder_hidden_states is not None:
                soft, hard = encoder_hidden_states[i], self.hard[i]
            rows.append(plain_branch(attn, single, self.name, x, soft, hard, self.alpha, "soft"))
        return torch.stack(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_unet_gradients_of_a_b_and_v_star(tiny_backbone, tiny_offsets, checkpointing):
    """d loss / d (A, B, v*) through text encoder and UNet, against plain formulas in autograd."""
    from dte_lab import PromptEncoder

    prompt_encoder = PromptEncoder(tiny_backbone)
    prompts = ["a picture of S*", "S* on the beach"]
    unet = copy.deepcopy(tiny_backbone.unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    offsets = {k: tuple(m.requires_grad_() for m in p) for k, p in tiny_offsets(B).items()}
    v_star = randn(B, D, seed=5).requires_grad_()
    leaves = [v_star, *(m for pair in offsets.values() for m in pair)]
    target = randn(B, 4, 8, 8, seed=6)
    calls = []
    handle = attention_layers(unet)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    handle = handle.register_forward_pre_hook(lambda *_: calls.append(1))

    with dual_path(unet, offsets, HARD, 0.6):
        out = run(unet, prompt_encoder(prompts, v_star))
        ours = torch.autograd.grad(((out - target) ** 2).mean(), leaves)
    handle.remove()
    assert len(calls) == 1 + checkpointing  # checkpointing really ran the layer again

    plain = copy.deepcopy(tiny_backbone.unet)
    for name, attn in attention_layers(plain).items():
        attn.set_processor(PlainDualProcessor(name, offsets, HARD, 0.6))
    expected_out = run(plain, prompt_encoder(prompts, v_star))
    expected = torch.autograd.grad(((expected_out - target) ** 2).mean(), leaves)

    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(ours, expected, strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 1e-4 * theirs.norm() + 1e-9


class BlockTwice(torch.nn.Module):
    """A UNet block run twice, by two separate copies, and blended: the summary's reading."""

    def __init__(self, soft, hard, hard_text, alpha):
        super().__init__()
        self.soft, self.hard_block, self.text, self.alpha = soft, hard, hard_text, alpha
        self.has_cross_attention = True
        self.resnets = soft.resnets  # the UNet counts them

    def forward(self, *args, **kwargs):
        soft = self.soft(*args, **kwargs)
        hard = self.hard_block(*args, **(kwargs | {"encoder_hidden_states": self.text}))

        def mix(x, y):
            if isinstance(x, tuple):
                return tuple(mix(*pair) for pair in zip(x, y, strict=True))
            return self.alpha * x + (1 - self.alpha) * y

        return mix(soft, hard)


@pytest.mark.parametrize("offsets_on", ["soft", "hard"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_block_granularity_against_blocks_run_twice(
    tiny_backbone, tiny_offsets, offsets_on, checkpointing
):
    unet, offsets = copy.deepcopy(tiny_backbone.unet), tiny_offsets(B)
    soft_text, hard_text = SOFT.clone().requires_grad_(), HARD.clone().requires_grad_()
    alpha = torch.tensor([0.3, 0.8])
    leaves = [soft_text, hard_text, *(m.requires_grad_() for p in offsets.values() for m in p)]
    if checkpointing:
        unet.enable_gradient_checkpointing()
    before = {name: list(m._forward_hooks) for name, m in unet.named_modules()}
    with dual_path(unet, offsets, hard_text, alpha, offsets_on, "block"):
        ours = run(unet, soft_text)
        ours_grad = torch.autograd.grad(ours.square().mean(), leaves)
    assert {name: list(m._forward_hooks) for name, m in unet.named_modules()} == before

    plain, shifted = copy.deepcopy(tiny_backbone.unet), copy.deepcopy(tiny_backbone.unet)
    for name, attn in attention_layers(shifted).items():
        # at alpha 1: merged weights with the text that comes in
        attn.set_processor(PlainDualProcessor(name, offsets, soft_text, 1.0))
    twice, per_sample = copy.deepcopy(tiny_backbone.unet), alpha[:, None, None, None]

    def pair(path):
        one, two = shifted.get_submodule(path), plain.get_submodule(path)
        if offsets_on == "hard":
            one, two = two, one
        return BlockTwice(one, two, hard_text, per_sample)

    for i in range(2):
        twice.down_blocks[i], twice.up_blocks[i] = pair(f"down_blocks.{i}"), pair(f"up_blocks.{i}")
    twice.mid_block = pair("mid_block")
    expected = run(twice, soft_text)
    expected_grad = torch.autograd.grad(expected.square().mean(), leaves)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(ours_grad, expected_grad, strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 1e-4 * theirs.norm() + 1e-9


def test_alpha_per_sample_and_update_between_calls(tiny_backbone, tiny_offsets):
    """Each sample as if it were alone with its blend; `update` is as good as a new block."""
    unet, one, two = tiny_backbone.unet, tiny_offsets(1), tiny_offsets(1, seed=3)
    with dual_path(unet, two, SOFT, 0.5) as path:
        run(unet)
        path.update(one, HARD, torch.tensor([0.2, 0.9]))
        ours = run(unet)
    for i, alpha in enumerate([0.2, 0.9]):
        row = slice(i, i + 1)
        with dual_path(unet, one, HARD[row], alpha):
            alone = run(unet, SOFT[row], X[row], T[row])
        torch.testing.assert_close(ours[row], alone, atol=1e-5, rtol=1e-4)


def test_alpha_schedule_is_a_line_from_noise_to_picture():
    assert alpha_at(0.7, torch.tensor([1, 2]), 1000) == 0.7
    values = alpha_at((0.2, 1.0), torch.tensor([1000, 500, 0]), 1000)
    torch.testing.assert_close(values, torch.tensor([0.2, 0.6, 1.0]))


def test_one_concept_serves_any_batch(tiny_backbone, tiny_offsets):
    unet, one = tiny_backbone.unet, tiny_offsets(1)
    repeated = {k: (a.repeat(B, 1, 1), b.repeat(B, 1, 1)) for k, (a, b) in one.items()}
    outputs = []
    for offsets in (one, repeated):
        with dual_path(unet, offsets, HARD, 0.5):
            outputs.append(run(unet))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)


def test_processors_come_back_after_an_exception(tiny_backbone, tiny_offsets):
    unet = tiny_backbone.unet
    before, expected = dict(unet.attn_processors), run(unet)
    with pytest.raises(KeyError), dual_path(unet, tiny_offsets(), HARD, 0.5):
        assert unet.attn_processors != before
        raise KeyError
    assert unet.attn_processors == before
    assert torch.equal(run(unet), expected)


def test_bad_arguments(tiny_backbone, tiny_offsets):
    unet, offsets = tiny_backbone.unet, tiny_offsets()
    before = dict(unet.attn_processors)
    key = next(iter(offsets))
    a, b = offsets[key]
    cases = [
        (dict(offsets=offsets, alpha_blend=0.5), "hard path needs"),
        (dict(offsets=offsets, alpha_blend=torch.ones(2)), "hard path needs"),
        (dict(offsets=offsets, offsets_on="both"), "Unknown offsets_on"),
        (dict(offsets=offsets, granularity="unet"), "Unknown granularity"),
        (dict(offsets={"no.such.to_q": (a, b)}), "no projection"),
        (dict(offsets={key: (b, a)}), "expected"),
        (dict(offsets={key: (a[..., :1], b)}), "expected"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message), dual_path(unet, **arguments):
            pass
    assert unet.attn_processors == before


@pytest.mark.parametrize("target", ["to_q", "to_k", "to_v", "to_out.0"])
def test_a_peft_lora_is_refused(tiny_backbone, target):
    peft = pytest.importorskip("peft")
    unet = copy.deepcopy(tiny_backbone.unet)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(ValueError, match="unload"), dual_path(unet, {}):
        pass


@pytest.mark.parametrize(
    "option, value",
    [
        ("norm_cross", torch.nn.LayerNorm(24)), ("norm_q", torch.nn.LayerNorm(16)),
        ("norm_k", torch.nn.LayerNorm(16)), ("group_norm", torch.nn.GroupNorm(4, 16)),
        ("spatial_norm", torch.nn.Identity()), ("residual_connection", True),
        ("added_kv_proj_dim", 24), ("rescale_output_factor", 2.0),
    ],
)  # fmt: skip
def test_attention_of_another_kind_is_refused(tiny_backbone, option, value):
    """One layer with an option that the processor would silently ignore."""
    [*_, name] = attention_layers(tiny_backbone.unet)
    attn = attention_layers(tiny_backbone.unet)[name]
    before, processor = getattr(attn, option), attn.processor
    try:
        setattr(attn, option, value)
        with pytest.raises(ValueError, match=f"with {option}: {name}"):
            with dual_path(tiny_backbone.unet, {}):
                pass
        assert attn.processor is processor
    finally:
        setattr(attn, option, before)
