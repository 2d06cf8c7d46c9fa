"""The start without an encoder: every public path works or says in one sentence why it cannot."""

import dataclasses
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from dte_lab import (
    DTEPipeline,
    EncoderConfig,
    TokenTable,
    TuneConfig,
    TuningEncoder,
    clip_words,
    load_encoder,
)
from dte_lab.baselines import (
    BaselineConfig,
    class_word,
    dreambooth_lora,
    e4t,
    textual_inversion,
)
from dte_lab.common.errors import DTEError
from dte_lab.e4t import E4TEncoder, load_e4t
from dte_lab.encoder import trained_encoder, word_of_pictures
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.specifications import parse
from dte_lab.lora import projection_shapes
from dte_lab.zero_shot import ZeroShotStart

ONE = BaselineConfig(batch_size=2, prior_pictures=1)
FAST = {"num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe(tiny_backbone):
    settings = EncoderConfig.of(tiny_backbone.recommended, rank=3)
    return DTEPipeline(tiny_backbone, ZeroShotStart(tiny_backbone, settings))


@pytest.fixture(scope="module")
def concept(pipe, picture):
    return pipe.personalize(picture, num_steps=0, progress=False)


@torch.no_grad()
def cosines(pipe, pixels):
    """Mean cosine of the pictures to each word, text by text with full padding."""
    backbone, sums = pipe.backbone, []
    clip = backbone.image_encoder(backbone.clip_pixels(pixels)).image_embeds
    for word in pipe.prompt_encoder.table.words:
        text = backbone.tokenizer(
            f"a picture of a {word}", padding="max_length", return_tensors="pt"
        )
        embeds = backbone.text_encoder(input_ids=text.input_ids).text_embeds
        sums.append(F.cosine_similarity(clip, embeds).mean().item())
    return sums


def row_of(pipe, pixels):
    """The word most like the pictures on average."""
    found = cosines(pipe, pixels)
    return max(range(len(found)), key=found.__getitem__)


@pytest.mark.parametrize(("count", "temperature"), [(8, 0.01), (3, 0.2)])
def test_the_start_is_a_mixture_of_clips_words(
    pipe, tiny_backbone, tiny_pixels, count, temperature
):
    """As loud as they are on average. Eight at CLIP's own temperature, 0.01, are the default."""
    found, rows = cosines(pipe, tiny_pixels), pipe.prompt_encoder.table.embeddings
    best = sorted(range(len(found)), key=lambda i: -found[i])[:count]
    weights = [math.exp((found[i] - found[best[0]]) / temperature) for i in best]
    weights = [w / sum(weights) for w in weights]
    assert 0.2 < max(weights) < 0.999  # the words are told apart, and it is more than one
    mixed = sum(w * rows[i] for w, i in zip(weights, best, strict=True))
    norm = sum(w * rows[i].norm() for w, i in zip(weights, best, strict=True))
    settings = EncoderConfig(zero_shot_words=count, zero_shot_temperature=temperature)
    encoder = pipe.encoder if count == 8 else ZeroShotStart(tiny_backbone, settings)
    start = encoder.predict(tiny_backbone, tiny_pixels, 0, pipe.prompt_encoder)
    torch.testing.assert_close(start.v_star[0], mixed / mixed.norm() * norm, rtol=1e-3, atol=1e-5)


def test_the_small_world_keeps_its_own_mixture(small_pipe):
    for made in (ZeroShotStart(small_pipe.backbone), small_pipe.encoder):
        assert made.settings.zero_shot_words == 32
        assert made.settings.zero_shot_temperature == 0.1


def test_the_class_word_is_clips_and_the_offsets_change_nothing(pipe, tiny_backbone, tiny_pixels):
    first = pipe.encoder.predict(tiny_backbone, tiny_pixels, 0, pipe.prompt_encoder)
    row = row_of(pipe, tiny_pixels)
    word = pipe.prompt_encoder.table.embeddings[row][None]
    assert torch.equal(first.class_word, word)
    shapes = projection_shapes(tiny_backbone.unet)
    assert set(first.offsets) == set(shapes)
    for key, (a, b) in first.offsets.items():
        d_in, d_out = shapes[key]
        assert a.shape == (1, d_in, 3) and b.shape == (1, 3, d_out) and not b.any()
    scaled = torch.cat([(a * a.shape[1] ** 0.5).flatten() for a, _ in first.offsets.values()])
    assert scaled.std().item() == pytest.approx(1, abs=0.05)
    again, other = (
        pipe.encoder.predict(tiny_backbone, tiny_pixels, seed, pipe.prompt_encoder)
        for seed in (0, 1)
    )
    for key, (a, _) in first.offsets.items():
        assert torch.equal(a, again.offsets[key][0])
        assert not torch.equal(a, other.offsets[key][0])


def test_the_baselines_start_from_the_same_word_as_with_an_encoder(
    pipe, tiny_backbone, tiny_encoder, tiny_pixels
):
    word, embedding = class_word(pipe, tiny_pixels)
    assert word == pipe.prompt_encoder.table.words[row_of(pipe, tiny_pixels)]
    other_word, other = class_word(DTEPipeline(tiny_backbone, tiny_encoder), tiny_pixels)
    assert word == other_word and torch.equal(embedding, other)


def test_personalize_and_generate(pipe, concept, picture):
    tuned = pipe.personalize(picture, 1, progress=False, config=TuneConfig(batch_size=2))
    assert not torch.equal(tuned.v_star, concept.v_star)
    assert any(b.any() for _, b in tuned.offsets.values())
    assert pipe.generate(tuned, "S*", **FAST)[0][0].size == (16, 16)
    assert pipe.to("cpu").generate(tuned, "S*", **FAST)[0][0].size == (16, 16)


@pytest.mark.parametrize("trainable", ["heads", "encoder"])
def test_weights_to_tune_need_an_encoder(pipe, picture, trainable):
    with pytest.raises(DTEError, match=f"^Tuning the {trainable} needs a trained encoder, and"):
        pipe.personalize(picture, 1, progress=False, config=TuneConfig(1, trainable))


def test_predicting_anew_needs_an_encoder(pipe, concept):
    concept.pictures = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(DTEError, match="^A prediction_interval needs a trained encoder, and"):
        pipe.generate(concept, "S*", prediction_interval=1, **FAST)


def test_every_baseline_that_has_no_encoder_of_its_own_runs(pipe, tiny_pixels):
    pixels = tiny_pixels[:1]
    inverted = textual_inversion(pipe, pixels, [0, 1], config=ONE)
    assert not inverted[0].offsets
    assert not torch.equal(inverted[0].v_star, inverted[1].v_star)
    for prior in (False, True):
        lora = dreambooth_lora(pipe, pixels, [1], config=ONE, prior=prior)[1]
        assert all(a.shape[2] == 3 for a, _ in lora.offsets.values())  # the rank of the start
        assert any(b.any() for _, b in lora.offsets.values())
    with pytest.raises(DTEError, match="E4T needs a trained E4TEncoder"):
        e4t(pipe, pixels, [0], config=ONE)


def test_the_evaluation_runs_what_it_can(pipe, tiny_pixels):
    methods, pixels = Methods(pipe), tiny_pixels[:1]
    for text in ("dte:0", "ti:0", "lora:0", "lora-prior:0", "dte@rank=2:0"):
        spec = parse(text)
        methods.check(spec)
        assert set(methods.concepts(spec, pixels, 0)) == {0}
    trainable = fields(TuneConfig)[1].name
    for option in ("prediction_interval=1", f"{trainable}=heads"):
        with pytest.raises(DTEError, match="needs a trained encoder"):
            methods.check(parse(f"dte@{option}:1"))


def test_a_trained_encoder_is_itself(pipe, tiny_encoder):
    assert trained_encoder(tiny_encoder, "This") is tiny_encoder
    with pytest.raises(DTEError, match="^This needs a trained encoder"):
        trained_encoder(pipe.encoder, "This")


@pytest.mark.parametrize("kind", [TuningEncoder, E4TEncoder])
def test_encoders_are_loaded_with_their_backbone_or_not_at_all(
    kind, tiny_backbone, tiny_config, tiny_pixels, tmp_path
):
    encoder = kind.from_backbone(tiny_backbone, tiny_config).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    encoder.save_pretrained(tmp_path)
    with pytest.raises(DTEError, match=f"^A {kind.__name__} needs the words of the backbone"):
        kind.from_pretrained(tmp_path)
    load = {TuningEncoder: load_encoder, E4TEncoder: load_e4t}[kind]
    expected = encoder.predict(tiny_backbone, tiny_pixels)
    for loaded in (kind.from_pretrained(tmp_path, tiny_backbone), load(tmp_path, tiny_backbone)):
        assert type(loaded) is kind and not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        ours = loaded.predict(tiny_backbone, tiny_pixels)
        torch.testing.assert_close(ours.v_star, expected.v_star)
        for key, pair in expected.offsets.items():
            torch.testing.assert_close(ours.offsets[key], pair)


@pytest.mark.parametrize("kind", [TuningEncoder, E4TEncoder])
def test_damaged_encoders_are_refused_by_name(kind, tiny_backbone, tiny_config, tmp_path):
    from safetensors.torch import load_file, save_file

    kind.from_backbone(tiny_backbone, tiny_config).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole, name = load_file(file), "token_head.out.bias"
    for fault, tensors in {
        "is missing": {k: v for k, v in whole.items() if k != name},
        "has another shape": whole | {name: torch.zeros(3)},
        "not finite": whole | {name: torch.full_like(whole[name], torch.nan)},
    }.items():
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(DTEError, match=f"{file}: the tensor {name} .*{fault}"):
            kind.from_pretrained(tmp_path, tiny_backbone)
    torch.save(whole, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(DTEError, match="pickled ones are never read"):
        kind.from_pretrained(tmp_path, tiny_backbone)


def test_the_word_of_several_pictures_is_that_of_their_mean():
    words = torch.eye(3)
    pictures = torch.tensor([[0.9, 0.4, 0.1], [0.1, 0.5, 0.8], [0.0, 0.8, 0.1]])
    assert word_of_pictures(pictures, words) == 1  # of none of the first two alone
    assert [word_of_pictures(picture[None], words) for picture in pictures] == [0, 2, 1]


@pytest.fixture
def hub_model(tiny_backbone, monkeypatch, tmp_path):
    """The tiny model as if it were the hub's, with a cache of its own, and what was encoded."""
    encoded = []
    monkeypatch.setattr(clip_words.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(clip_words, "known_words", lambda backbone: {"apple"})
    handle = tiny_backbone.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    yield dataclasses.replace(tiny_backbone, name="sd15"), encoded
    handle.remove()


def test_embeddings_of_the_hubs_words_are_kept(hub_model, tiny_backbone, tmp_path):
    backbone, encoded = hub_model
    table = TokenTable(tiny_backbone)
    first = clip_words.word_clip_embeddings(backbone, table)
    assert encoded
    (file,) = (tmp_path / "dte_lab").glob("words-*.safetensors")
    encoded.clear()
    assert torch.equal(clip_words.word_clip_embeddings(backbone, table), first) and not encoded
    file.write_bytes(b"half a file")
    assert torch.equal(clip_words.word_clip_embeddings(backbone, table), first) and encoded
    table.words[0] = "another"  # other words, another file
    clip_words.word_clip_embeddings(backbone, table)
    assert len(list((tmp_path / "dte_lab").iterdir())) == 2
    encoded.clear()
    clip_words.word_clip_embeddings(tiny_backbone, table)  # of no hub: nothing is kept
    assert encoded and len(list((tmp_path / "dte_lab").iterdir())) == 2


def test_half_precision_does_not_reorder_the_words(tiny_backbone, tiny_encoder, tiny_pixels):
    """Under autocast cosines would be rounded to 8 bits, in which the best words tie."""
    features = tiny_encoder.static_features(tiny_backbone, tiny_pixels)
    guesses = []
    tiny_encoder.mix_words = lambda similarity: (
        guesses.append(similarity) or type(tiny_encoder).mix_words(tiny_encoder, similarity)
    )
    tiny_encoder(*features)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_encoder(*features)
    assert guesses[1].dtype == torch.float32 and torch.equal(*guesses)
