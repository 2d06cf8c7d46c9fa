"""The baselines optimise what they say, from where they say, and are drawn by the same sampler."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import DTEPipeline
from dte_lab.backbone import add_noise
from dte_lab.baselines import (
    BaselineConfig,
    Run,
    class_word,
    dreambooth_lora,
    e4t,
    prior_latents,
    textual_inversion,
)
from dte_lab.common.random import stream
from dte_lab.config import single_path
from dte_lab.dual_path import dual_path
from dte_lab.e4t import E4TEncoder, load_e4t
from dte_lab.objective import diffusion_target, objective
from dte_lab.training.pretrain import PretrainConfig, pretrain

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
    text = pipe.prompt_encoder(["a picture of S*"] * 2, v_star)
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


def test_prior_preservation_holds_on_to_pictures_of_the_class(pipe, pixels):
    """After the same steps, the loss on the base model's pictures of the class is lower with it."""
    backbone, (_, embedding) = pipe.backbone, class_word(pipe, pixels)
    prompt, steps = "a picture of S*", 15
    run, method = Run(pipe, pixels, [steps], 0, CONFIG), single_path(pipe.encoder.method)
    latents = prior_latents(run, embedding, method).repeat(8, 1, 1, 1)
    generator = torch.Generator().manual_seed(1)
    noise, t = torch.randn(latents.shape, generator=generator), torch.arange(0, 1000, 63)
    noisy = add_noise(backbone, latents, noise, t)
    target = diffusion_target(backbone, latents, noise, t)
    text = pipe.prompt_encoder([prompt], embedding).expand(len(t), -1, -1)

    def class_loss(prior):
        concept = dreambooth_lora(pipe, pixels, [steps], config=CONFIG, prior=prior)[steps]
        with dual_path(backbone.unet, concept.offsets), torch.no_grad():
            return F.mse_loss(backbone.unet(noisy, t, text).sample, target).item()

    assert class_loss(prior=True) < class_loss(prior=False)


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


def test_lora_sees_the_rare_word_and_its_class_the_prior_the_class_alone(pipe, pixels, seen):
    word, embedding = class_word(pipe, pixels)
    for prior in (False, True):
        concept = dreambooth_lora(pipe, pixels, [0, 1], config=CONFIG, prior=prior)[0]
        state, batch, method = seen.pop()
        assert batch.prompts == [f"a picture of S* {word}"] * 2 + ["a picture of S*"] * 2 * prior
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


def test_e4t_keeps_v_star_near_the_class_word(tiny_backbone, tiny_pixels, seen):
    encoder = E4TEncoder.from_backbone(tiny_backbone)
    pipe = DTEPipeline(tiny_backbone, encoder)
    e4t(pipe, tiny_pixels[:1], [1], config=CONFIG)
    [(state, batch, method)] = seen
    assert method.regulariser == "l2" and method.alpha_blend == 1
    assert batch.prompts == ["a picture of S*"] * 2
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
