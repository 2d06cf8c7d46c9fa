import copy
import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dte_lab import MethodConfig, PromptEncoder, TuneConfig, tune
from dte_lab.common.muon import MuonAdamW
from dte_lab.common.random import stream
from dte_lab.encoder import EncoderPrediction
from dte_lab.objective import objective
from dte_lab.recommended import STABLE_DIFFUSION
from dte_lab.tuning import draw_batch


@pytest.fixture
def setting(tiny_backbone, tiny_offsets, tiny_pixels):
    encode = PromptEncoder(tiny_backbone)
    prediction = EncoderPrediction(encode.table.embeddings[:1].clone(), tiny_offsets(1, scale=0.0))
    return tiny_backbone, encode, prediction, tiny_pixels[:1], MethodConfig(alpha_blend=0.8)


def tensors(prediction):
    return [prediction.v_star, *(m for pair in prediction.offsets.values() for m in pair)]


def test_tuning_lowers_the_loss_of_its_picture(setting):
    config = TuneConfig(offset_learning_rate=1e-2, token_learning_rate=0.1)
    result = tune(*setting, config, progress=False)
    assert len(result.losses) == 12 and not result.stopped_early
    frozen = TuneConfig(offset_learning_rate=0.0, token_learning_rate=0.0)
    before = tune(*setting, frozen, seed=5, progress=False).losses
    backbone, encode, _, pixels, dte = setting
    after = tune(backbone, encode, result.prediction, pixels, dte, frozen, seed=5, progress=False)

    def mean(losses):
        return sum(x["diffusion"] for x in losses) / len(losses)

    assert mean(after.losses) < 0.95 * mean(before)  # on noise that tuning has not seen


def test_same_seed_same_result_and_the_prediction_is_untouched(setting):
    prediction = setting[2]
    before = [x.clone() for x in tensors(prediction)]
    one, two = (tune(*setting, TuneConfig(num_steps=3), seed=4, progress=False) for _ in range(2))
    other = tune(*setting, TuneConfig(num_steps=3), seed=5, progress=False)
    for x, y in zip(tensors(one.prediction), tensors(two.prediction), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(one.prediction.v_star, other.prediction.v_star)
    for x, y in zip(before, tensors(prediction), strict=True):
        assert torch.equal(x, y)
    assert one.losses == two.losses
    for x, y in zip(before, tensors(one.prediction), strict=True):
        assert x.shape == y.shape and not y.requires_grad
        assert (x != y).any()


def test_callback_sees_every_step(setting):
    seen = []
    result = tune(*setting, TuneConfig(num_steps=3), callback=seen.append, progress=False)
    assert [s["step"] for s in seen] == [0, 1, 2]
    assert [s["loss"] for s in seen] == [x["loss"] for x in result.losses]
    assert torch.equal(seen[0]["v_star"], setting[2].v_star)
    assert not torch.equal(seen[1]["v_star"], seen[2]["v_star"])


def test_a_first_step_by_hand(setting, tiny_pixels, monkeypatch):
    """Two pictures and two prompts in turn, the bank, and AdamW's first step, lr * sign(gradient),
    with the rate of v* in units of a word's typical entry.
    """
    backbone, encode, prediction, _, method = setting
    seen, bank = [], (torch.randn(5, 24), torch.arange(5))

    @contextmanager
    def watched(backbone, encode, state, batch, method, bank=None):
        with objective(backbone, encode, state, batch, method, bank) as losses:
            yield losses
        gradients = [leaf.grad.clone() for leaf in tensors(state)]
        seen.append(SimpleNamespace(batch=batch, bank=bank, gradients=gradients))

    monkeypatch.setattr("dte_lab.tuning.objective", watched)
    config = TuneConfig(
        num_steps=2, batch_size=3, optimizer="adamw", token_learning_rate=0.2,
        offset_learning_rate=3e-3, prompts=("a picture of S*", "the S*"),
    )  # fmt: skip
    after, pixels = [], tiny_pixels[:2]
    tune(
        backbone, encode, prediction, pixels, method, config, bank, seed=6, progress=False,
        callback=lambda state: after.append([state["v_star"], *sum(state["offsets"].values(), ())]),
    )  # fmt: skip
    latents, generator = backbone.encode_images(pixels), stream(6, "tuning")
    for step, batch in enumerate(each.batch for each in seen):
        which, words = (torch.randperm(3, generator=generator) for _ in range(2))
        torch.testing.assert_close(batch.latents, latents[(3 * step + which) % 2])
        assert batch.prompts == [config.prompts[(3 * step + i) % 2] for i in words]
        t = (torch.tensor([0, 1, 2]) + torch.rand(3, generator=generator)) * 1000 / 3
        assert (batch.timesteps - t).abs().max() <= 1
        assert torch.equal(batch.noise, torch.randn(3, 4, 8, 8, generator=generator))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen[0].bank, bank, strict=True))
    unit = encode.table.embeddings.square().mean().sqrt().item()
    rates = [0.2 * unit] + [3e-3] * (len(after[0]) - 1)
    assert not torch.isclose(torch.tensor(0.2 * unit), torch.tensor(0.2), rtol=0.5)
    for x, y, gradient, rate in zip(*after, seen[0].gradients, rates, strict=True):
        clear = gradient.abs() > 1e-5  # Adam's epsilon is 1e-8
        torch.testing.assert_close(
            (y - x)[clear], -rate * gradient[clear].sign(), rtol=0.01, atol=1e-6
        )
    assert (seen[0].gradients[0].abs() > 1e-5).any()


def test_a_first_step_of_muon(setting, monkeypatch):
    """A and B move by the polar factor of the gradient, to what five iterations leave; v* as ever.

    The gradients are those of a first step of AdamW, from the same seed.
    """
    moved, gradients = {}, []

    class Watched(MuonAdamW):
        def step(self):
            gradients.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
            super().step()

    monkeypatch.setattr("dte_lab.tuning.MuonAdamW", Watched)
    for name, rate in (("adamw", 1e-3), ("muon", 0.05)):
        config = TuneConfig(num_steps=1, optimizer=name, offset_learning_rate=rate)
        after = tensors(tune(*setting, config, progress=False).prediction)
        moved[name] = [y - x for x, y in zip(tensors(setting[2]), after, strict=True)]
    assert torch.equal(moved["adamw"][0], moved["muon"][0])
    for gradient, step in zip(gradients[1][1:], moved["muon"][1:], strict=True):
        [g], [step] = gradient, step
        u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
        s = (0.05 + 0.95 * 0.05) * s  # momentum, with a look ahead
        s = s / (s.norm() + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        expected = -0.05 * 0.2 * max(g.shape) ** 0.5 * (u * s) @ v
        torch.testing.assert_close(step.double(), expected, rtol=1e-2, atol=1e-4)
    assert max(step.abs().max() for step in moved["muon"][1:]) > 1e-3  # not all have a gradient


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_picture_and_prompt_meets_every_noise_level(tiny_backbone, count):
    """Eight bins of T; pictures carry their number, and there are as many prompts."""
    latents = torch.arange(count).float()[:, None, None, None]
    prompts, generator = tuple(f"S* {i}" for i in range(count)), stream(0, "tuning")
    met, words, total = set(), set(), []
    for step in range(200):
        batch = draw_batch(tiny_backbone, latents, prompts, step, 8, generator)
        bins = (batch.timesteps // 125).tolist()
        assert sorted(bins) == list(range(8))
        pictures = batch.latents.flatten().int().tolist()
        met |= set(zip(pictures, bins, strict=True))
        words |= set(zip(pictures, batch.prompts, strict=True)) | set(
            zip(batch.prompts, bins, strict=True)
        )
        total += pictures
    assert len(met) == 8 * count
    assert len(words) == count * count + 8 * count
    assert max(map(total.count, range(count))) - min(map(total.count, range(count))) <= 1


def test_no_timestep_lies_beyond_the_last(tiny_backbone, monkeypatch):
    """The largest fp32 below 1, at which 7 + it is 8."""
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2.0**-24))
    batch = draw_batch(
        tiny_backbone, torch.zeros(1, 4, 8, 8), ("S*",), 0, 8, torch.Generator().manual_seed(0)
    )
    assert batch.timesteps.tolist()[-1] == 999
    tiny_backbone.alphas_cumprod[batch.timesteps]


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_steps", -1), ("num_steps", 1.5), ("trainable", "everything"), ("batch_size", 0),
        ("token_learning_rate", -1e-3), ("offset_learning_rate", float("nan")),
        ("encoder_learning_rate", "fast"), ("prompts", ()), ("prompts", "a picture of S*"),
        ("prompts", (1,)), ("constant_steps", -1), ("constant_steps", 2.5),
    ],
)  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name) as error:
        TuneConfig(**{name: value})
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def half_backbone(tiny_backbone):
    backbone = copy.deepcopy(tiny_backbone)
    for module in backbone.modules:
        module.half()
    return backbone


@pytest.mark.parametrize("overflows", [[1], range(20)])
def test_an_overflow_in_half_precision_skips_the_step(half_backbone, setting, overflows):
    """The gradient of some steps is infinite; with all of them it is no overflow."""
    _, encode, prediction, pixels, method = setting
    encode, states, calls, scales = PromptEncoder(half_backbone), [], [], []

    def poison(module, args, output):
        calls.append(1)
        bad = len(calls) - 1 in overflows

        def watch(gradient):
            scales.append(gradient.abs().max().item())
            return gradient * (torch.inf if bad else 1)

        output.sample.register_hook(watch)

    handle = half_backbone.unet.register_forward_hook(poison)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = tune(
                half_backbone, encode, prediction, pixels, method, TuneConfig(num_steps=20),
                callback=states.append, progress=False,
            )  # fmt: skip
    finally:
        handle.remove()
    assert all(x.isfinite().all() for x in tensors(result.prediction))
    v = [state["v_star"] for state in states] + [result.prediction.v_star]
    if len(overflows) == 1:
        assert not result.stopped_early and len(result.losses) == 20
        moved = [not torch.equal(x, y) for x, y in zip(v, v[1:], strict=False)]
        assert moved == [True, False] + [True] * 18
        assert scales[0] > 1.2 * scales[2]  # halved
    else:
        assert result.stopped_early and len(result.losses) == 16  # 65536 = 2 ** 16
        assert any("stopped at step 16" in str(each.message) for each in caught)
        assert torch.equal(v[-1], prediction.v_star.float())


def test_zero_steps_return_the_prediction(setting):
    result = tune(*setting, TuneConfig(num_steps=0), progress=False)
    for x, y in zip(tensors(result.prediction), tensors(setting[2]), strict=True):
        assert torch.equal(x, y)
    assert result.losses == []


def test_any_number_of_steps(setting):
    result = tune(*setting, TuneConfig(num_steps=30, batch_size=1), progress=False)
    assert len(result.losses) == 30
    with pytest.raises(ValueError, match="num_steps is a whole number from 0"):
        TuneConfig(num_steps=-1)
    with pytest.raises(ValueError, match="predictions, heads, encoder"):
        TuneConfig(trainable="everything")
    with pytest.raises(ValueError, match="needs the encoder"):
        tune(*setting, TuneConfig(trainable="heads"))


@pytest.mark.parametrize("trainable", ["heads", "encoder"])
def test_tuning_the_weights_that_predict(tiny_backbone, tiny_encoder, tiny_pixels, trainable):
    """A copy of the encoder is tuned: its loss falls, fusion moves only with the whole encoder."""
    encode, pixels = PromptEncoder(tiny_backbone), tiny_pixels[:2]
    before = {name: p.clone() for name, p in tiny_encoder.named_parameters()}
    prediction = tiny_encoder.predict(tiny_backbone, pixels, seed=0, prompt_encoder=encode)
    arguments = (tiny_backbone, encode, prediction, pixels, tiny_encoder.method)
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        keep = SimpleNamespace(deepcopy=lambda x: copies.append(copy.deepcopy(x)) or copies[-1])
        patch.setattr("dte_lab.tuning.copy", keep)
        config = TuneConfig(num_steps=6, trainable=trainable, encoder_learning_rate=1e-2)
        result = tune(*arguments, config, encoder=tiny_encoder, progress=False)
    moved = {n.split(".")[0] for n, p in copies[0].named_parameters() if (p != before[n]).any()}
    heads = {"token_head", "hypernetwork"}
    assert moved == (heads if trainable == "heads" else heads | {"fusion"})
    for name, p in tiny_encoder.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None

    again = copies[0].predict(tiny_backbone, pixels, seed=0, prompt_encoder=encode)
    for x, y in zip(tensors(result.prediction), tensors(again), strict=True):
        torch.testing.assert_close(x, y)
    frozen = TuneConfig(trainable=trainable, encoder_learning_rate=0.0)
    first = tune(*arguments, frozen, seed=0, encoder=tiny_encoder, progress=False)
    after = tune(*arguments, frozen, seed=0, encoder=copies[0], progress=False)
    assert first.losses[0]["diffusion"] == pytest.approx(result.losses[0]["diffusion"], 1e-4)

    def mean(losses):
        return sum(x["diffusion"] for x in losses) / len(losses)

    assert mean(after.losses) < mean(first.losses)


@pytest.mark.parametrize("regulariser", ["none", "l2", "nearest", "hinge", "gaussian"])
def test_tuning_with_another_regulariser(setting, regulariser):
    backbone, encode, prediction, pixels, _ = setting
    dte = MethodConfig(regulariser=regulariser, alpha_blend=(0.5, 0.9))
    config = TuneConfig(num_steps=2, batch_size=2)
    result = tune(backbone, encode, prediction, pixels, dte, config, progress=False)
    extra = set(result.losses[0]) - {"diffusion", "loss", "norm"}
    assert extra == ({regulariser} - {"none"})
    assert all(x.isfinite().all() for x in tensors(result.prediction))


@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_keeps_the_last_good_state(setting, monkeypatch, bad_step, where):
    """The UNet's output (or what flows back through it) turns NaN at one step."""
    backbone = setting[0]
    states, calls = [], []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == bad_step + 1:
            if where == "loss":
                output.sample = output.sample * torch.nan
            else:
                output.sample.register_hook(lambda grad: grad * torch.nan)

    handle = backbone.unet.register_forward_hook(poison)
    try:
        with pytest.warns(UserWarning, match=f"stopped at step {bad_step}"):
            result = tune(*setting, callback=states.append, progress=False)
    finally:
        handle.remove()
    assert result.stopped_early and len(result.losses) == bad_step
    assert all(x.isfinite().all() for x in tensors(result.prediction))
    if bad_step == 0:
        assert torch.equal(result.prediction.v_star, setting[2].v_star)
    elif where == "loss":  # the state before the update that led to NaN
        assert torch.equal(result.prediction.v_star, states[-1]["v_star"])
    else:  # the loss of the newest state was still finite
        assert not torch.equal(result.prediction.v_star, states[-1]["v_star"])
    kinds = {type(p).__name__ for p in backbone.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}


def test_after_the_constant_steps_the_rates_fall_as_one_over_the_step(setting, monkeypatch):
    """Of both groups alike, so that a run passes through the results of all shorter ones."""
    rates = []

    class Watched(MuonAdamW):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr("dte_lab.tuning.MuonAdamW", Watched)
    unit = setting[1].table.typical_entry
    config = TuneConfig(num_steps=5, batch_size=1, offset_learning_rate=2e-3, constant_steps=3)
    seen = []
    tune(*setting, config, callback=seen.append, progress=False)
    factors = [1, 1, 1, 3 / 4, 3 / 5]
    expected = [[0.1 * unit * f, 2e-3 * f] for f in factors]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
    shorter = tune(*setting, replace(config, num_steps=4), progress=False).prediction
    assert torch.equal(shorter.v_star, seen[4]["v_star"])


def test_settings_of_a_backbone_and_of_a_concept():
    config = TuneConfig.of(STABLE_DIFFUSION, num_steps=9, token_learning_rate=0.05)
    assert (config.batch_size, config.offset_learning_rate, config.constant_steps) == (4, 0.06, 6)
    kept = config.kept_in(STABLE_DIFFUSION)
    assert kept == replace(
        STABLE_DIFFUSION, num_steps=9, num_steps_without_encoder=9, token_learning_rate=0.05
    )
    assert replace(TuneConfig.of(kept), num_steps=9) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", -1), ("num_steps", 1.5), ("num_steps_without_encoder", -1),
        ("batch_size", 0), ("zero_shot_words", 0), ("zero_shot_temperature", 0),
        ("token_learning_rate", "fast"), ("offset_learning_rate", -1), ("constant_steps", 0),
        ("optimizer", "sgd"),
    ],
)  # fmt: skip
def test_recommended_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        replace(STABLE_DIFFUSION, **{name: value})


def test_each_picture_is_weighted_by_its_own_mask_on_the_latent_grid(tiny_backbone):
    latents = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2)  # picture i is all i
    masks = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [
        draw_batch(tiny_backbone, latents, ("S*",), 0, 5, torch.Generator().manual_seed(1), m)
        for m in (masks, None)
    ]
    for latent, weight in zip(batches[0].latents, batches[0].weights, strict=True):
        mask = masks[int(latent[0, 0, 0]), 0]
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            expected = mask[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
            torch.testing.assert_close(weight[0, y, x], expected)
    assert batches[1].weights is None
    assert all(
        torch.equal(getattr(batches[0], n), getattr(batches[1], n)) for n in ("noise", "latents")
    )
