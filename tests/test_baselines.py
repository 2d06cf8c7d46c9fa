"""The baselines optimise what they say, from where they say, and are drawn by the same sampler."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import Concept, DTEPipeline, MethodConfig
from dte_lab.backbone import add_noise
from dte_lab.baselines import (
    BaselineConfig,
    class_word,
    dreambooth_lora,
    e4t,
    textual_inversion,
)
from dte_lab.common.random import stream
from dte_lab.config import single_path
from dte_lab.e4t import E4TEncoder, load_e4t
from dte_lab.evaluation.measures import diffusion_loss
from dte_lab.objective import diffusion_target, objective
from dte_lab.setting import picture_prompts
from dte_lab.training.pretrain import PretrainConfig, pretrain
from dte_lab.world.data import rendered

CONFIG = BaselineConfig(batch_size=2, prior_pictures=2)


@pytest.fixture
def pipe(tiny_backbone, tiny_encoder):
    return DTEPipeline(tiny_backbone, tiny_encoder)


@pytest.fixture
def pixels(tiny_pixels):
    return tiny_pixels[:1]


def test_first_step_of_textual_inversion_is_adam_on_the_plain_unet(pipe, pixels):
    """AdamW's first step is lr * sign(gradient); the gradient by the stock UNet, no dual path."""
    backbone, table = pipe.backbone, pipe.prompt_encoder.table
    concepts = textual_inversion(pipe, pixels, [1, 0], seed=5, config=CONFIG)
    word, embedding = class_word(pipe, pixels)
    assert torch.equal(concepts[0].v_star, embedding)
    assert word == table.words[table.nearest_rows(embedding)[1].item()]

    v_star = embedding.clone().requires_grad_()
    generator = stream(5, "tuning")
    latents = backbone.encode_images(pixels).expand(2, -1, -1, -1)
    torch.randperm(2, generator=generator), torch.randperm(2, generator=generator)
    t = ((torch.arange(2) + torch.rand(2, generator=generator)) / 2 * 1000).long()
    noise = torch.randn(latents.shape, generator=generator)
    [prompt] = picture_prompts(pipe.backbone, pixels)
    text = pipe.prompt_encoder([prompt] * 2, v_star)
    output = backbone.unet(add_noise(backbone, latents, noise, t), t, text).sample
    F.mse_loss(output, diffusion_target(backbone, latents, noise, t)).backward()
    lr = CONFIG.token_learning_rate * table.embeddings.square().mean().sqrt()
    clear = v_star.grad.abs() > 1e-6  # Adam's epsilon is 1e-8
    assert clear.float().mean() > 0.5
    moved = concepts[1].v_star - embedding
    assert torch.allclose(moved[clear], (-lr * v_star.grad.sign())[clear], rtol=0.02)
    assert not concepts[1].offsets


def test_a_longer_run_passes_through_the_shorter_one(pipe, pixels):
    long = dreambooth_lora(pipe, pixels, [1, 2, 3], config=CONFIG)
    short = dreambooth_lora(pipe, pixels, [2], config=CONFIG)
    assert list(long) == [1, 2, 3] and list(short) == [2]
    for key, (a, b) in short[2].offsets.items():
        assert torch.equal(long[2].offsets[key][0], a) and torch.equal(long[2].offsets[key][1], b)
    assert long[1].seconds <= long[2].seconds <= long[3].seconds
    assert len(long[3].info["losses"]) == 3


def test_lora_starts_as_a_no_op_of_the_encoders_rank_and_keeps_its_word(pipe, pixels):
    concepts = dreambooth_lora(pipe, pixels, [0, 2], config=CONFIG)
    word, embedding = class_word(pipe, pixels)
    assert concepts[0].info["phrase"] == f"S* {word}"
    assert all((a @ b).abs().max() == 0 for a, b in concepts[0].offsets.values())
    assert any((a @ b).abs().max() > 0 for a, b in concepts[2].offsets.values())
    assert {a.shape[-1] for a, _ in concepts[2].offsets.values()} == {pipe.encoder.settings.rank}
    assert torch.equal(concepts[0].v_star, concepts[2].v_star)
    assert not torch.allclose(concepts[0].v_star, embedding)


def test_prior_pictures_are_the_base_models_of_the_class(pipe, pixels, seen):
    """Both are seen at each step; their seeds follow from the run's, and are not those of pictures
    that are drawn later.
    """
    backbone, (_, embedding) = pipe.backbone, class_word(pipe, pixels)
    dreambooth_lora(pipe, pixels, [3], seed=4, config=CONFIG, prior=True)
    seeds = torch.randint(2**31, (2,), generator=stream(4, "prior pictures")).tolist()
    base = Concept(embedding, {}, backbone.name, MethodConfig(alpha_blend=1.0))
    drawn = pipe.generate(
        base, "a picture of S*", seeds, num_inference_steps=20, progress=False
    )[0]  # fmt: skip
    expected = backbone.encode_images(pipe.pixels(drawn))
    orders = set()
    for _, batch, _ in seen:
        distance = (batch.latents[2:, None] - expected).flatten(2).norm(dim=-1)
        assert distance.min(dim=1).values.max() < 1e-3 < distance.max()
        orders.add(tuple(distance.argmin(dim=1).tolist()))
    assert orders <= {(0, 1), (1, 0)}


@pytest.fixture
def seen(monkeypatch):
    """What a baseline hands to `objective`, one (state, batch, method) per step."""
    steps = []

    @contextmanager
    def watched(backbone, encode, state, batch, method, bank=None):
        steps.append((state, batch, method))
        with objective(backbone, encode, state, batch, method, bank) as losses:
            yield losses

    monkeypatch.setattr("dte_lab.baselines.objective", watched)
    return steps


def test_a_single_path_has_no_hard_path_and_nothing_that_changes_while_sampling():
    method = MethodConfig(
        alpha_blend=(0.1, 0.2), offsets_on="hard", granularity="block", regulariser="l2",
        prediction_interval=3, unconditional_offsets=False, temperature=0.3,
    )  # fmt: skip
    assert single_path(method) == MethodConfig(1.0, "soft", "attention", "none", temperature=0.3)


def test_prior_preservation_keeps_the_class(small_pipe):
    """Dogs as the base model draws them: without the prior, tuning on a dog spoils them."""
    dog = rendered([("dog", "fluent", "grass", 0)])
    config = BaselineConfig(batch_size=4, prior_pictures=4, lora_learning_rate=4e-3)
    word, embedding = class_word(small_pipe, dog)
    assert word == "dog"
    base = Concept(embedding, {}, "small", single_path(small_pipe.encoder.method))
    drawn = small_pipe.generate(base, "a picture of S*", range(50, 54), progress=False)
    dogs = small_pipe.pixels(drawn[0])

    def loss(concept):
        of_the_class = replace(concept, v_star=embedding)
        return diffusion_loss(small_pipe, of_the_class, dogs, ["a picture of S*"] * 4, count=16)

    for seed in range(3):
        spoilt = []
        for prior in (False, True):
            concepts = dreambooth_lora(small_pipe, dog, [0, 6], seed, config, prior=prior)
            spoilt.append(loss(concepts[6]) - loss(concepts[0]))
        assert spoilt[0] > 0 and spoilt[1] < 0.8 * spoilt[0], spoilt


def test_lora_sees_the_rare_word_and_its_class_the_prior_the_class_alone(pipe, pixels, seen):
    word, embedding = class_word(pipe, pixels)
    for prior in (False, True):
        concept = dreambooth_lora(pipe, pixels, [0, 1], config=CONFIG, prior=prior)[0]
        state, batch, method = seen.pop()
        [own] = picture_prompts(pipe.backbone, pixels, f"S* {word}")
        assert own.startswith(f"a picture of S* {word} ")
        assert batch.prompts == [own] * 2 + ["a picture of S*"] * 2 * prior
        rare = state.v_star[:1]
        assert torch.equal(rare, concept.v_star)
        length = pipe.prompt_encoder.table.embeddings.norm(dim=1).mean()
        torch.testing.assert_close(rare.norm(), length)
        assert (rare - embedding).norm() > 0.5 * length
        if prior:
            assert torch.equal(state.v_star, torch.cat([rare, rare, embedding, embedding]))
            assert method == single_path(pipe.encoder.method)
            given = pipe.backbone.encode_images(pixels)
            assert torch.allclose(batch.latents[:2], given.expand(2, -1, -1, -1))
            assert not torch.allclose(batch.latents[2:], given.expand(2, -1, -1, -1), atol=0.1)
    for a, _ in concept.offsets.values():  # uniform within +-1/sqrt(Din)
        assert 0.8 < a.abs().max() * a.shape[1] ** 0.5 <= 1


def test_first_steps_have_the_rate_of_their_method(tiny_backbone, pipe, pixels, monkeypatch):
    """AdamW's first step is lr * sign(gradient), of each parameter that has one."""
    table, gradients = pipe.prompt_encoder.table, []

    @contextmanager
    def watched(backbone, encode, state, batch, method):
        with objective(backbone, encode, state, batch, method) as losses:
            yield losses
        leaves = [state.v_star, *(b for _, b in state.offsets.values())]
        gradients.append([leaf.grad for leaf in leaves if leaf.is_leaf])

    monkeypatch.setattr("dte_lab.baselines.objective", watched)
    before, after = dreambooth_lora(pipe, pixels, [0, 1], config=CONFIG).values()
    found = gradients.pop()
    assert found[0] is None  # the rare word stays
    for grad, (_, b) in zip(found[1:], after.offsets.values(), strict=True):
        clear = grad.abs() > 1e-5  # Adam's epsilon is 1e-8
        expected = -CONFIG.lora_learning_rate * grad[clear].sign()
        torch.testing.assert_close(b[clear], expected, rtol=1e-2, atol=0)

    encoder = E4TEncoder.from_backbone(tiny_backbone)
    before, after = e4t(DTEPipeline(tiny_backbone, encoder), pixels, [0, 1], config=CONFIG).values()
    [grad, *_] = gradients.pop()
    clear = grad.abs() > 1e-5
    rate = CONFIG.token_learning_rate * table.embeddings.square().mean().sqrt()
    moved = (after.v_star - before.v_star)[clear]
    torch.testing.assert_close(moved, -rate * grad[clear].sign(), rtol=1e-2, atol=1e-6)
    weights = dict(zip(encoder.hypernetwork.keys, encoder.hypernetwork.weights, strict=True))
    steps = torch.cat([(a / weights[k]).flatten() for k, (a, _) in after.offsets.items()]).abs()
    median = steps.median().item()  # of W * D: where the gradient is not tiny, D is the rate
    assert median == pytest.approx(CONFIG.multiplicative_learning_rate, rel=0.05)


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0), ("prior_pictures", 0), ("token_learning_rate", -1),
        ("lora_learning_rate", float("inf")), ("multiplicative_learning_rate", None),
    ],
)  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        BaselineConfig(**{name: value})


def test_e4t_keeps_v_star_near_the_class_word(tiny_backbone, tiny_pixels, seen):
    encoder = E4TEncoder.from_backbone(tiny_backbone)
    pipe = DTEPipeline(tiny_backbone, encoder)
    e4t(pipe, tiny_pixels[:1], [1], config=CONFIG)
    [(state, batch, method)] = seen
    assert method.regulariser == "l2" and method.alpha_blend == 1
    assert batch.prompts == [*picture_prompts(tiny_backbone, tiny_pixels[:1])] * 2
    expected = encoder.predict(tiny_backbone, tiny_pixels[:1]).class_word
    assert torch.equal(state.class_word, expected)


def test_e4t_multiplies_the_weights(tiny_backbone, merged_unet):
    encoder = E4TEncoder.from_backbone(tiny_backbone)
    tokens = torch.zeros(2, 3, 4)
    assert all((a @ b).abs().max() == 0 for a, b in encoder.hypernetwork(tokens).values())
    with torch.no_grad():
        for delta in encoder.hypernetwork.deltas:
            delta.normal_(generator=torch.Generator().manual_seed(2))
    offsets = encoder.hypernetwork(tokens)
    merged = merged_unet(offsets)
    for key, delta in zip(encoder.hypernetwork.keys, encoder.hypernetwork.deltas, strict=True):
        name = f"{key}.0" if key.endswith("to_out") else key
        base = tiny_backbone.unet.get_submodule(name).weight
        expected = base * (1 + delta.T)
        assert torch.allclose(merged.get_submodule(name).weight, expected, atol=1e-5)
        assert offsets[key][0].shape[0] == 2


def test_e4t_trains_in_the_pretraining_loop_saves_and_tunes(tiny_backbone, tiny_pixels, tmp_path):
    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            picture = tiny_pixels[i]
            return {"image": picture, "target": picture, "prompt": "a picture of S*", "concept": i}

    encoder = E4TEncoder.from_backbone(tiny_backbone)
    config = PretrainConfig(steps=2, batch_size=3, warmup_steps=0, ema_decay=0.0)
    pretrain(tiny_backbone, encoder, Pictures(), config, tmp_path, progress=False)
    assert any(delta.abs().max() > 0 for delta in encoder.hypernetwork.deltas)

    loaded = load_e4t(tmp_path / "encoder", tiny_backbone)
    pipe = DTEPipeline(tiny_backbone, loaded)
    here = encoder.eval().predict(tiny_backbone, tiny_pixels[:1])
    there = loaded.predict(tiny_backbone, tiny_pixels[:1])
    assert torch.allclose(here.v_star, there.v_star, atol=1e-6)

    concepts = e4t(pipe, tiny_pixels[:1], [0, 2], config=CONFIG)
    assert torch.allclose(concepts[0].v_star, there.v_star)
    for key, (a, b) in there.offsets.items():
        assert torch.allclose(concepts[0].offsets[key][0] @ concepts[0].offsets[key][1], a @ b)
    assert any(
        not torch.equal(concepts[0].offsets[key][0], a)
        for key, (a, _) in concepts[2].offsets.items()
    )
    drawn = [
        pipe.generate(c, "a picture of S*", num_inference_steps=2, progress=False)[0][0]
        for c in concepts.values()
    ]
    assert np.asarray(drawn[0]).shape == (16, 16, 3)
    assert not np.array_equal(*map(np.asarray, drawn))


def test_missing_e4t_encoder_is_one_clear_sentence(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match="no E4TEncoder at"):
        load_e4t(tmp_path, tiny_backbone)
