import dataclasses

import numpy as np
import pytest
import torch

from dte_lab import Concept, DTEPipeline
from dte_lab.dual_path import dual_path


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
    with pytest.raises(ValueError, match="at least one"):
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
    alone = generate(pipe, concept, ["the S*"], seeds=[4], batch_size=1)
    assert np.abs(pixels(together[1][1]) - pixels(alone[0][0])).max() <= 1
    assert np.abs(pixels(together[0][0]) - pixels(one_by_one[0][0])).max() <= 1


def test_saved_concept_generates_the_same_picture(pipe, concept, tmp_path):
    concept.save(tmp_path / "c.safetensors")
    loaded = Concept.load(tmp_path / "c.safetensors")
    one, two = generate(pipe, concept), generate(pipe, loaded)
    assert (pixels(one[0][0]) == pixels(two[0][0])).all()


@pytest.mark.parametrize("both_halves", [True, False])
def test_guidance_against_a_sampling_loop(pipe, concept, both_halves):
    """Two UNet calls a step instead of one doubled batch, written out with the scheduler."""
    config = dataclasses.replace(concept.config, unconditional_offsets=both_halves)
    concept = dataclasses.replace(concept, config=config)
    concept.offsets = {k: (a, 3 * b) for k, (a, b) in concept.offsets.items()}  # make it matter
    ours = generate(pipe, concept, ["S* at night"], seeds=[7], guidance_scale=2.5)[0][0]

    backbone, encode = pipe.backbone, pipe.prompt_encoder
    scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
    scheduler.set_timesteps(3)
    x = pipe.initial_noise(7) * scheduler.init_noise_sigma
    soft, empty = encode(["S* at night"], concept.v_star), encode.plain([""])
    hard = encode.hard(["S* at night"], concept.v_star)
    nothing = {k: (a, 0 * b) for k, (a, b) in concept.offsets.items()}
    with torch.no_grad():
        for t in scheduler.timesteps:
            offsets = concept.offsets if both_halves else nothing
            with dual_path(backbone.unet, offsets, empty, config.alpha_blend):
                uncond = backbone.unet(x, t, empty).sample
            with dual_path(backbone.unet, concept.offsets, hard, config.alpha_blend):
                cond = backbone.unet(x, t, soft).sample
            x = scheduler.step(uncond + 2.5 * (cond - uncond), t, x).prev_sample
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
        latents=pipe.initial_noise(2), num_inference_steps=3, guidance_scale=3.0,
    ).images[0]  # fmt: skip
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_no_guidance_runs(pipe, concept):
    images = generate(pipe, concept, ["S*"], guidance_scale=1.0)
    assert images[0][0].size == (16, 16)


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


def test_bad_prompts_and_concepts(pipe, concept):
    with pytest.raises(ValueError, match=r"has no S\*"):
        generate(pipe, concept, ["S* at night", "a cat"])
    wrong = dataclasses.replace(concept, v_star=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="v\\* has shape"):
        generate(pipe, wrong)
