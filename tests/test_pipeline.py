import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dte_lab import Concept, DTEPipeline, TuneConfig
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_pil
from dte_lab.common.random import stream
from dte_lab.dual_path import dual_path
from dte_lab.encoder import EncoderPrediction
from dte_lab.features import image_features, unet_features
from dte_lab.recommended import STABLE_DIFFUSION
from dte_lab.sampling import Conditioning, guided_sampling
from dte_lab.zero_shot import ZeroShotStart


@pytest.fixture(scope="module")
def pipe(tiny_path, tiny_backbone, tiny_config, tmp_path_factory):
    from dte_lab import TuningEncoder

    encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save_pretrained(folder)
    return DTEPipeline.from_pretrained(tiny_path, encoder=folder)


@pytest.fixture(scope="module")
def concept(pipe, picture):
    return pipe.personalize(picture, num_steps=2, progress=False)


def generate(pipe, concept, prompts=("S* on the beach",), **kwargs):
    kwargs = {"num_inference_steps": 3, "progress": False} | kwargs
    return pipe.generate(concept, list(prompts), **kwargs)


def pixels(image):
    return np.asarray(image, dtype=np.int16)


def test_personalize_records_what_happened(pipe, picture, concept, tiny_backbone):
    assert concept.v_star.shape == (1, 24) and len(concept.offsets) == 56
    info = concept.info
    assert len(info["losses"]) == 2 and info["seconds"] > 0 and info["peak_memory_mb"] > 10
    assert len(info["words_before"]) == len(info["words_after"]) == 5
    word, cosine = info["words_after"][0]
    assert word in pipe.prompt_encoder.table.words and -1 <= cosine <= 1
    assert concept.backbone == pipe.backbone.name
    again = pipe.personalize(picture, num_steps=2, progress=False)
    assert torch.equal(again.v_star, concept.v_star)  # same seed, same concept


def test_personalize_takes_paths_and_several_pictures(pipe, picture, concept, tmp_path):
    path = tmp_path / "concept.png"
    picture.save(path)
    for source in (path, str(path), [path], [picture]):
        same = pipe.personalize(source, num_steps=2, progress=False)
        assert torch.equal(same.v_star, concept.v_star)
    both = pipe.personalize([picture, picture.rotate(90)], num_steps=2, progress=False)
    assert not torch.equal(both.v_star, concept.v_star)
    with pytest.raises(ValueError, match="At least one"):
        pipe.personalize([])


def test_same_seed_same_picture(pipe, concept):
    one = generate(pipe, concept, ["S* at night", "the S*"], seeds=[0, 1])
    two = generate(pipe, concept, ["S* at night", "the S*"], seeds=[0, 1])
    assert len(one) == 2 and all(len(row) == 2 for row in one)
    assert one[0][0].size == (16, 16) and one[0][0].mode == "RGB"
    for row_one, row_two in zip(one, two, strict=True):
        for x, y in zip(row_one, row_two, strict=True):
            assert (pixels(x) == pixels(y)).all()
    assert (pixels(one[0][0]) != pixels(one[0][1])).any()
    assert (pixels(one[0][0]) != pixels(one[1][0])).any()


def test_a_picture_does_not_depend_on_its_batch(pipe, concept):
    together = generate(pipe, concept, ["S* at night", "the S*"], seeds=[3, 4], batch_size=4)
    one_by_one = generate(pipe, concept, ["S* at night", "the S*"], seeds=[3, 4], batch_size=3)
    alone = generate(pipe, concept, ["S* at night"], seeds=[4], batch_size=1)
    assert np.abs(pixels(together[0][1]) - pixels(alone[0][0])).max() <= 1
    assert np.abs(pixels(together[1][0]) - pixels(alone[0][0])).max() > 1
    assert np.abs(pixels(together[0][0]) - pixels(one_by_one[0][0])).max() <= 1


def test_saved_concept_generates_the_same_picture(pipe, concept, tmp_path):
    concept.save(tmp_path / "c.safetensors")
    loaded = Concept.load(tmp_path / "c.safetensors")
    one, two = generate(pipe, concept), generate(pipe, loaded)
    assert (pixels(one[0][0]) == pixels(two[0][0])).all()


@pytest.mark.parametrize(
    ("both_halves", "negative"), [(True, ""), (False, ""), (True, "the red boat at night")]
)
def test_guidance_against_a_sampling_loop(pipe, concept, both_halves, negative):
    """Two UNet calls a step instead of one doubled batch, written out with the scheduler."""
    config = dataclasses.replace(concept.config, unconditional_offsets=both_halves)
    concept = dataclasses.replace(concept, config=config)
    concept.offsets = {k: (a, 3 * b) for k, (a, b) in concept.offsets.items()}  # make it matter
    scale = 40 if negative else 2.5  # this UNet hardly listens to its text
    ours = generate(
        pipe, concept, ["S* at night"], seeds=[7], guidance_scale=scale, negative_prompt=negative
    )[0][0]

    backbone, encode = pipe.backbone, pipe.prompt_encoder
    scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
    scheduler.set_timesteps(3)
    x = pipe.initial_noise(7) * scheduler.init_noise_sigma
    soft, empty = encode(["S* at night"], concept.v_star), encode.plain([negative])
    hard = encode.hard(["S* at night"], concept.v_star)
    nothing = {k: (a, 0 * b) for k, (a, b) in concept.offsets.items()}
    with torch.no_grad():
        for t in scheduler.timesteps:
            offsets = concept.offsets if both_halves else nothing
            with dual_path(backbone.unet, offsets, empty, config.alpha_blend):
                uncond = backbone.unet(x, t, empty).sample
            with dual_path(backbone.unet, concept.offsets, hard, config.alpha_blend):
                cond = backbone.unet(x, t, soft).sample
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    expected = (backbone.decode_latents(x)[0] + 1).permute(1, 2, 0).numpy() * 127.5
    assert np.abs(pixels(ours) - expected).max() < 1.5


def test_alpha_0_is_the_stock_pipeline_on_the_hard_word(pipe, concept):
    from diffusers import StableDiffusionPipeline

    backbone, word = pipe.backbone, concept.nearest_words[0][0]
    ours = generate(pipe, concept, ["S* on the beach"], alpha_blend=0.0, seeds=[2])[0][0]
    stock = StableDiffusionPipeline(
        vae=backbone.vae, text_encoder=backbone.text_encoder, tokenizer=backbone.tokenizer,
        unet=backbone.unet, scheduler=backbone.scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    # As embeddings, since this pipeline reads the wrong output of a text tower with projection.
    theirs = stock(
        prompt_embeds=pipe.prompt_encoder.plain([f"{word} on the beach"]),
        negative_prompt_embeds=pipe.prompt_encoder.plain([""]),
        latents=pipe.initial_noise(2), num_inference_steps=3, guidance_scale=7.5,
    ).images[0]  # fmt: skip
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_a_file_holds_no_pictures_where_nothing_reads_them(concept, two_pictures, tmp_path):
    for held, made in ((False, concept), (True, two_pictures)):
        made.save(tmp_path / "c.safetensors")
        with safe_open(tmp_path / "c.safetensors", "pt") as file:
            assert ("pictures" in file.keys()) == held


def test_guidance_is_the_backbones_where_none_is_asked_for(pipe, concept):
    assert pipe.backbone.guidance_scale == 7.5
    [[ours]], [[asked]], [[other]] = (
        generate(pipe, concept, **given)
        for given in ({}, {"guidance_scale": 7.5}, {"guidance_scale": 1.5})
    )
    assert (pixels(ours) == pixels(asked)).all() and (pixels(ours) != pixels(other)).any()


def test_a_concept_keeps_what_it_was_made_with(pipe, picture, tmp_path):
    config = TuneConfig(batch_size=3, offset_learning_rate=2e-3, constant_steps=1)
    made = pipe.personalize(picture, 2, config=config, progress=False)
    assert made.settings == replace(
        STABLE_DIFFUSION, batch_size=3, offset_learning_rate=2e-3, constant_steps=1, num_steps=2,
        num_steps_without_encoder=2,
    )  # fmt: skip
    made.settings = replace(made.settings, guidance_scale=1.5)
    made.save(tmp_path / "c.safetensors")
    loaded = Concept.load(tmp_path / "c.safetensors")
    assert loaded.settings == made.settings
    [[ours]], [[asked]] = (generate(pipe, loaded), generate(pipe, loaded, guidance_scale=1.5))
    assert (pixels(ours) == pixels(asked)).all()
    loaded.settings = None  # as in a file of an older version: the backbone's
    loaded.save(tmp_path / "old.safetensors")
    old = Concept.load(tmp_path / "old.safetensors")
    assert old.settings is None and (pixels(generate(pipe, old)[0][0]) != pixels(ours)).any()


def test_steps_and_settings_are_the_backbones_where_none_are_asked_for(pipe, picture, monkeypatch):
    asked = []

    def stopped(*arguments, **_):
        asked.append(arguments[5])
        raise InterruptedError

    monkeypatch.setattr("dte_lab.pipeline.tune", stopped)
    start = DTEPipeline(pipe.backbone, ZeroShotStart(pipe.backbone))
    for each in (pipe, start):
        with pytest.raises(InterruptedError):
            each.personalize(picture, progress=False)
    assert asked == [TuneConfig.of(STABLE_DIFFUSION, num_steps=n) for n in (12, 30)]
    assert pipe.has_trained_encoder and not start.has_trained_encoder


def test_initial_noise_is_nobody_elses(pipe):
    """Of equal seeds: what the static features see, what tuning draws, a plain generator."""
    noise = pipe.initial_noise(3)
    assert noise.shape == (1, 4, 8, 8) and torch.equal(noise, pipe.initial_noise(3))
    others = [stream(3, use) for use in ("static features", "tuning")]
    for generator in [*others, torch.Generator().manual_seed(3)]:
        other = torch.randn(noise.shape, generator=generator)
        assert torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].abs() < 0.3


def test_without_guidance_the_unet_sees_each_picture_once(pipe, concept):
    seen = []
    hook = pipe.backbone.unet.register_forward_pre_hook(
        lambda unet, args: seen.append(len(args[0]))
    )
    try:
        for scale in (1.0, 1.5):
            images = generate(pipe, concept, ["S*"], guidance_scale=scale)
            assert images[0][0].size == (16, 16)
    finally:
        hook.remove()
    assert set(seen[: len(seen) // 2]) == {1} and set(seen[len(seen) // 2 :]) == {2}


def test_processors_are_restored_even_after_exceptions(pipe, concept):
    unet = pipe.backbone.unet
    before = dict(unet.attn_processors)
    generate(pipe, concept)
    assert unet.attn_processors == before

    def fail(*args):
        raise RuntimeError("interrupted")

    handle = unet.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="interrupted"):
            generate(pipe, concept)
    finally:
        handle.remove()
    assert unet.attn_processors == before


def sampling_loop(pipe, concept, prompt, seed, steps=3, guidance=2.5, every=None):
    """Written out: one UNet call per half and step, merged by hand; `every` steps predict anew."""
    backbone, encode, config = pipe.backbone, pipe.prompt_encoder, concept.config
    scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
    scheduler.set_timesteps(steps)
    x, empty = pipe.initial_noise(seed), encode.plain([""])
    pictures = concept.pictures.float() / 127.5 - 1
    static = pipe.encoder.predict(backbone, pictures, concept.info["seed"])
    v_star, offsets, words = concept.v_star, concept.offsets, []
    for i, t in enumerate(scheduler.timesteps):
        if every and i % every == 0:
            clip = image_features(backbone, pictures)
            n = len(pictures)
            unet = unet_features(
                backbone, x.repeat(n, 1, 1, 1), t.repeat(n), empty, pipe.encoder.settings.grid
            )
            new = pipe.encoder(clip, unet, t.repeat(n))
            v_star = concept.v_star + new.v_star.mean(0, keepdim=True) - static.v_star
            offsets = {
                k: tuple(
                    concept.offsets[k][j] + new.offsets[k][j].mean(0, keepdim=True)
                    - static.offsets[k][j] for j in (0, 1)
                ) for k in concept.offsets
            }  # fmt: skip
        words.append(encode.table.nearest(v_star, 1)[1][0][0])
        soft, hard = encode([prompt], v_star), encode.hard([prompt], v_star)
        alpha = config.alpha_blend
        if isinstance(alpha, tuple):
            alpha = alpha[1] + (alpha[0] - alpha[1]) * t.item() / 1000
        noise = []
        for text, hard_text in ((empty, empty), (soft, hard)):
            with dual_path(
                backbone.unet, offsets, hard_text, alpha, granularity=config.granularity
            ):
                noise.append(backbone.unet(x, t, text).sample)
        x = scheduler.step(noise[0] + guidance * (noise[1] - noise[0]), t, x).prev_sample
    return pixels(to_pil(backbone.decode_latents(x))[0]), words


@pytest.fixture(scope="module")
def two_pictures(pipe, picture):
    """A concept of two pictures, which holds them, with a config that does not look at them."""
    pictures = [picture, picture.rotate(90)]
    method = dataclasses.replace(pipe.encoder.method, prediction_interval=5)
    concept = pipe.personalize(pictures, num_steps=2, seed=3, method=method, progress=False)
    assert concept.pictures.shape == (2, 3, 16, 16)
    expected = ((pipe.pixels(pictures) + 1) * 127.5).round()
    assert torch.equal(concept.pictures.float(), expected)
    return dataclasses.replace(concept, config=pipe.encoder.method)


@pytest.mark.parametrize("every", [1, 2, 0])
@torch.no_grad()
def test_prediction_anew_against_a_sampling_loop(pipe, two_pictures, every):
    prompts = ["S* at night", "the S*"]  # each latent of the batch gets its own prediction
    ours = generate(
        pipe, two_pictures, prompts, seeds=[7], guidance_scale=2.5, prediction_interval=every,
        num_inference_steps=4,
    )  # fmt: skip
    for prompt, row in zip(prompts, ours, strict=True):
        expected, _ = sampling_loop(pipe, two_pictures, prompt, 7, steps=4, every=every)
        assert np.abs(pixels(row[0]) - expected).max() <= 1


def test_prediction_anew_changes_the_picture(pipe, two_pictures):
    once = generate(pipe, two_pictures)[0][0]
    anew = generate(pipe, two_pictures, prediction_interval=1)[0][0]
    assert (pixels(once) != pixels(anew)).any()


def test_prediction_anew_sees_the_samplers_latents_and_timesteps(pipe, two_pictures, monkeypatch):
    seen, original = [], pipe.encoder.unet_features

    def watched(backbone, latents, timesteps, prompt):
        seen.append((latents, timesteps.tolist()))
        return original(backbone, latents, timesteps, prompt)

    sampled = []
    unet = pipe.backbone.unet
    monkeypatch.setattr(pipe.encoder, "unet_features", watched)
    hook = unet.register_forward_pre_hook(lambda unet, args: sampled.append(args[0]))
    try:
        generate(
            pipe, two_pictures, prediction_interval=2, num_inference_steps=4, guidance_scale=1.0
        )
    finally:
        hook.remove()
    scheduler = type(pipe.backbone.scheduler).from_config(pipe.backbone.scheduler.config)
    scheduler.set_timesteps(4)
    first, _, third, _ = scheduler.timesteps.tolist()
    (x1, t1), (x3, t3) = seen[-2:]  # before them the static features
    assert [t1, t3] == [[first] * 2, [third] * 2]  # two pictures
    assert torch.equal(x1, sampled[0].repeat(2, 1, 1, 1))
    assert torch.equal(x3, sampled[2].repeat(2, 1, 1, 1)) and not torch.equal(x1, x3)


@torch.no_grad()
def test_the_hard_word_follows_each_prediction(pipe, concept):
    """A stand-in for the encoder that predicts another word each time, on the vanilla UNet."""
    encode, unet = pipe.prompt_encoder, pipe.backbone.unet
    words, looks = ["cat", "boat"], []
    config = dataclasses.replace(concept.config, prediction_interval=2)

    def predict(latents, timestep):
        looks.append(timestep)
        assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}
        word = words[len(looks) - 1]
        v_star = encode.table.embeddings[encode.table.words.index(word)] * 1.1
        return EncoderPrediction(v_star[None], concept.offsets)

    scheduler = type(pipe.backbone.scheduler).from_config(pipe.backbone.scheduler.config)
    scheduler.set_timesteps(3)
    first, _, third = timesteps = scheduler.timesteps.tolist()
    condition = Conditioning(
        encode, dataclasses.replace(concept, config=config), ["S* at night"],
        scheduler.timesteps, 1000, predict=predict,
    )  # fmt: skip
    seen = []

    def watched(step, latents, last=None):
        seen.append(condition(step, latents, last))
        return seen[-1]

    watched.guided = True
    with dual_path(unet, {}) as path:
        guided_sampling(path, watched, scheduler, pipe.initial_noise(0), 2.0)
    for inputs, word in zip(seen, ["cat", "cat", "boat"], strict=True):
        expected = torch.cat([encode.plain([""]), encode.plain([f"{word} at night"])])
        torch.testing.assert_close(inputs.hard, expected)
    assert looks == [first, third] and len(timesteps) == 3


@pytest.mark.parametrize("granularity", ["attention", "block"])
@torch.no_grad()
def test_alpha_schedule_against_a_sampling_loop(pipe, two_pictures, granularity):
    config = dataclasses.replace(
        two_pictures.config, alpha_blend=(0.1, 0.9), granularity=granularity
    )
    concept = dataclasses.replace(two_pictures, config=config)
    ours = pixels(generate(pipe, concept, ["S*"], seeds=[5], guidance_scale=2.5)[0][0])
    assert np.abs(ours - sampling_loop(pipe, concept, "S*", 5)[0]).max() <= 1
    turned = generate(pipe, concept, ["S*"], seeds=[5], guidance_scale=2.5, alpha_blend=(0.9, 0.1))
    assert (ours != pixels(turned[0][0])).any()


def test_prediction_anew_needs_pictures_and_a_known_value(pipe, concept):
    with pytest.raises(ValueError, match="prediction_interval"):
        generate(pipe, concept, prediction_interval="sometimes")
    with pytest.raises(ValueError, match="prediction_interval"):
        generate(pipe, concept, prediction_interval=-1)
    assert concept.pictures is None
    with pytest.raises(DTEError, match="personalize with a prediction_interval"):
        generate(pipe, concept, prediction_interval=2)


def test_nearest_word_projection_ends_at_a_word(pipe, picture):
    method = dataclasses.replace(pipe.encoder.method, regulariser="nearest")
    concept = pipe.personalize(picture, num_steps=2, progress=False, method=method)
    word, cosine = concept.nearest_words[0]
    table = pipe.prompt_encoder.table
    torch.testing.assert_close(concept.v_star[0], table.embeddings[table.words.index(word)])
    assert cosine == pytest.approx(1.0, abs=1e-5) and concept.config.regulariser == "nearest"


def test_bad_prompts_and_concepts(pipe, concept):
    with pytest.raises(ValueError, match=r"does not contain S\*"):
        generate(pipe, concept, ["S* at night", "a cat"])
    wrong = dataclasses.replace(concept, v_star=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="v\\* has shape"):
        generate(pipe, wrong)
