"""Every option of a specification changes something, or is refused with a sentence."""

from dataclasses import fields

import pytest
import torch
from PIL import Image

from dte_lab import DTEPipeline, EncoderConfig, MethodConfig, TuningEncoder
from dte_lab.baselines import BaselineConfig
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_pil
from dte_lab.config import REGULARISERS
from dte_lab.dual_path import GRANULARITIES, OFFSETS_ON
from dte_lab.e4t import E4TEncoder
from dte_lab.evaluation.edits import Item, edits
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.specifications import (
    BASELINE_OPTIONS,
    EXPERIMENTS,
    OPTIONS,
    TUNE_OPTIONS,
    parse,
    split_steps,
)
from dte_lab.evaluation.trials import Sampling, draw_concept
from dte_lab.tuning import TuneConfig
from dte_lab.zero_shot import ZeroShotStart


def test_a_specification_is_read():
    spec = parse("dte@alpha_blend=[0.9,0.5]@offsets_on=hard@encoder=a/b@batch_size=3@rank=2:12,0")
    assert (spec.name, spec.steps, spec.encoder, spec.rank) == ("dte", (0, 12), "a/b", 2)
    assert spec.label == "dte@alpha_blend=[0.9,0.5]@offsets_on=hard@encoder=a/b@batch_size=3@rank=2"
    assert spec.method == {"alpha_blend": (0.9, 0.5), "offsets_on": "hard"}
    assert spec.tuning == TuneConfig(batch_size=3)
    before = MethodConfig(granularity="block", temperature=0.5)
    assert spec.method_of(before) == MethodConfig((0.9, 0.5), "hard", "block", temperature=0.5)
    assert parse(spec.text) == spec
    assert parse("dte@encoder=123:1").encoder == "123"
    assert parse("ti@batch_size=5:3").baseline == BaselineConfig(batch_size=5)
    assert parse("oracle").steps == () and parse("oracle").is_anchor
    assert split_steps("dte@encoder=C:a:5,1,5") == ("dte@encoder=C:a", (1, 5))


def test_named_experiments_are_read_and_have_no_label_twice():
    for specs in EXPERIMENTS.values():
        parsed = [parse(text) for text in specs]
        assert len({spec.label for spec in parsed}) == len(specs)
        methods = [str(spec.method_of(MethodConfig())) + str(spec) for spec in parsed]
        assert len(set(methods)) == len(specs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dte", "write steps"), ("oracle:3", "take none"), ("ti:a", "Unknown method 'ti:a'"),
        ("elite:3", "Unknown method 'elite'"), ("ti@rank=2:5", "ti has no option 'rank'"),
        ("ti@prior_pictures=2:5", "ti has no option 'prior_pictures'"),
        ("dte@token_scale=5:12", "dte has no option 'token_scale'"),
        ("dte@num_steps=50:25", "steps at the end"), ("ti@batch_size:5", "batch_size=VALUE"),
        ("dte@alpha_blend=1@alpha_blend=0.5:1", "alpha_blend=VALUE, once"),
        ("dte@alpha_blend=x:1", "alpha_blend is a number"),
        ("dte@alpha_blend=3:1", "alpha_blend is a number from 0 to 1"),
        ("dte@rank=0:1", "rank is a whole number from 1"), ("dte@rank=full:1", "rank is a whole"),
        ("dte@prediction_interval=often:1", "prediction_interval is a whole number"),
        ("dte@batch_size=0:1", "batch_size"), ("dte@masked=1:1", "masked is true"),
        ("dte@offset_learning_rate=fast:1", "learning_rate"),
        ("dte@prompts=[]:1", "prompts"), ("dte@prompts=a thing:1", "prompts"),
        ("ti@batch_size=0:1", "batch_size"), ("lora-prior@prior_pictures=0:1", "prior_pictures"),
        ("lora@lora_learning_rate=-1:1", "lora_learning_rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_it_is_read(wrong, message):
    with pytest.raises(DTEError, match=message):
        parse(wrong)


@pytest.fixture(scope="module")
def encoder(tiny_backbone, tiny_config):
    """An encoder that has seen something: offsets, a residual of v* and a bank."""
    encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (encoder.token_head, encoder.hypernetwork):
            for weight in part.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        words = encoder.word_embeddings[:4]
        encoder.enqueue(words + 0.02 * torch.randn(words.shape, generator=generator),
                        torch.arange(4))  # fmt: skip
    return encoder


@pytest.fixture(scope="module")
def methods(tiny_backbone, encoder, tmp_path_factory):
    """With "other" and "e4t" as encoders to choose."""
    methods = Methods(DTEPipeline(tiny_backbone, encoder))
    other = TuningEncoder.from_backbone(tiny_backbone, encoder.settings, seed=7)
    methods.others["other"] = DTEPipeline(tiny_backbone, other)
    torch.nn.init.constant_(other.token_head.out.bias, 0.5)
    for seed, name in enumerate(("e4t", "e4t other")):
        e4t = E4TEncoder.from_backbone(tiny_backbone, encoder.settings, seed=seed)
        torch.nn.init.constant_(e4t.token_head.out.bias, 0.2 * seed)
        methods.others[name if seed else "e4t"] = DTEPipeline(tiny_backbone, e4t)
    return methods


# Beside what each option acts: the rest of the specification, and the value to try.
ACTS = {
    "dte": {
        "encoder": ("", "other"), "rank": ("", 1), "part": ("", "word"), "masked": ("", "true"),
        "alpha_blend": ("", 0.3), "offsets_on": ("", "hard"), "granularity": ("", "block"),
        "regulariser": ("", "l2"), "num_positives": ("", 2), "temperature": ("", 1),
        "contrastive_weight": ("", 1), "norm_weight": ("", 1), "norm_free": ("", 0),
        "regulariser_weight": ("@regulariser=gaussian", 1),
        "prediction_interval": ("", 1), "unconditional_offsets": ("", "false"),
        "trainable": ("", "heads"), "batch_size": ("", 3), "token_learning_rate": ("", 0.01),
        "offset_learning_rate": ("", 0.1), "encoder_learning_rate": ("@trainable=heads", 0.1),
        "prompts": ("", '["a photo of S*"]'), "optimizer": ("", "adamw"), "constant_steps": ("", 1),
    },
    "ti": {"batch_size": ("", 3), "token_learning_rate": ("", 0.01)},
    "lora": {
        "batch_size": ("", 3), "lora_learning_rate": ("", 0.1), "optimizer": ("", "muon"),
    },
    "lora-prior": {
        "batch_size": ("", 3), "lora_learning_rate": ("", 0.1), "prior_pictures": ("", 1),
        "optimizer": ("", "muon"),
    },
    "e4t": {
        "encoder": ("", "other"), "batch_size": ("", 3), "token_learning_rate": ("", 0.01),
        "multiplicative_learning_rate": ("", 0.1), "optimizer": ("", "muon"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(methods, tiny_pixels):
    """made(text): what a specification makes in two steps, v*, offsets and pictures; each once."""
    seen, pixels = {}, (tiny_pixels[:1] * 127).round() / 127.5
    corner = Image.new("L", pixels.shape[-2:], 0)
    corner.paste(255, (0, 0, *(n // 2 for n in corner.size)))
    asked = edits(Item("cat", "noto", "white"), ("beach",))[:1]

    def make(text):
        if text not in seen:
            spec = parse(text)
            methods.check(spec)
            concept = methods.concepts(spec, pixels, 1, corner)[2]
            drawn = draw_concept(methods.pipe_of(spec), concept, asked, Sampling(1, 2, 2.0))
            matrices = [m for pair in concept.offsets.values() for m in pair]
            seen[text] = [concept.v_star, *matrices, drawn]
        return seen[text]

    return make


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in OPTIONS.items() for option in options]
)
def test_every_option_that_is_accepted_changes_something(made, name, option):
    rest, value = ACTS[name][option]
    few = {"batch_size": 2} | ({"prior_pictures": 2} if name == "lora-prior" else {})
    rest += "".join(f"@{key}={n}" for key, n in few.items() if key != option)
    before, after = made(f"{name}{rest}:2"), made(f"{name}{rest}@{option}={value}:2")
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not same, f"{name}@{option} changes nothing"


def test_no_encoder_starts_from_the_words_that_clip_finds(methods, tiny_backbone, tiny_pixels):
    [concept] = methods.concepts(parse("dte@encoder=zero-shot:0"), tiny_pixels[:1], 3).values()
    expected = ZeroShotStart(tiny_backbone).predict(tiny_backbone, tiny_pixels[:1], 3)
    torch.testing.assert_close(concept.v_star, expected.v_star, rtol=1e-3, atol=1e-4)
    assert all(not b.any() for _, b in concept.offsets.values())
    assert "zero-shot" not in methods.settings()["weights"]
    with pytest.raises(DTEError, match="needs a trained encoder"):
        methods.check(parse("dte@encoder=zero-shot@trainable=heads:2"))


def test_the_fields_of_the_settings_are_options_or_not_read_by_the_method():
    known = {f.name for c in (MethodConfig, TuneConfig) for f in fields(c)}
    assert set(OPTIONS["dte"]) == known - {"num_steps"} | {"encoder", "rank", "part", "masked"}
    assert set().union(*BASELINE_OPTIONS.values()) == {f.name for f in fields(BaselineConfig)}
    assert ACTS.keys() == OPTIONS.keys() - {"oracle", "other"}
    assert all(set(ACTS[name]) == set(OPTIONS[name]) for name in ACTS)


@pytest.mark.parametrize(
    ("idle", "message"),
    [
        ("dte@regulariser_weight=1:2", "regulariser=contrastive does not read it"),
        ("dte@regulariser=none@temperature=1:2", "temperature.*regulariser=none"),
        ("dte@regulariser=l2@norm_weight=1:2", "norm_weight.*regulariser=l2"),
        ("dte@regulariser=l2@norm_free=0:2", "norm_free.*regulariser=l2"),
        ("dte@norm_weight=0@norm_free=0:2", "norm_free.*no weight"),
        ("dte@regulariser=l2@temperature=1:2", "temperature.*regulariser=l2"),
        ("dte@regulariser=hinge@temperature=1:2", "temperature.*regulariser=hinge"),
        ("dte@contrastive_weight=0@num_positives=3:2", "num_positives.*no weight"),
        ("dte@regulariser=hinge@regulariser_weight=0@num_positives=3:2", "no weight"),
        ("dte@encoder_learning_rate=1:2", "trainable=predictions does not read it"),
        ("dte@trainable=heads@offset_learning_rate=1:2", "offset_learning_rate.*trainable=heads"),
        ("dte@trainable=heads@optimizer=muon:2", "optimizer.*trainable=heads"),
        ("dte@trainable=encoder@token_learning_rate=1:2", "token_learning_rate.*trainable=enc"),
        ("dte@granularity=block@alpha_blend=1:2", "granularity.*both ends"),
        ("dte@granularity=block@alpha_blend=[0,0]:2", "granularity.*both ends"),
        ("dte@encoder=fresh@temperature=1:2", "temperature.*knows no other concepts"),
        ("dte@encoder=fresh@contrastive_weight=1:2", "knows no other concepts"),
        ("dte@regulariser=none:0", "regulariser.*0 steps"), ("ti@batch_size=2:0", "0 steps"),
        ("lora-prior@prior_pictures=2:0", "0 steps"),
        *((f"dte@{o}={ACTS['dte'][o][1]}:0", f"{o}.*0 steps") for o in TUNE_OPTIONS),
    ],
)  # fmt: skip
def test_an_option_that_would_change_nothing_is_refused(methods, tiny_backbone, idle, message):
    fresh = TuningEncoder.from_backbone(tiny_backbone, methods.pipe.encoder.settings)
    methods.others.setdefault("fresh", DTEPipeline(tiny_backbone, fresh))
    with pytest.raises(DTEError, match=f"changes nothing, since|{message}") as refused:
        methods.check(parse(idle))
    assert refused.match(message)


@pytest.mark.parametrize(
    "acting",
    [
        "dte@regulariser=nearest:0", "dte@alpha_blend=1:0", "dte@rank=1:0", "dte@temperature=1:0,2",
        "dte@regulariser=hinge@num_positives=3:2", "dte@regulariser=hinge@norm_weight=1:2",
        "dte@regulariser=norm@norm_weight=1:2", "dte@regulariser=nearest@regulariser_weight=1:2",
        "dte@encoder=fresh@norm_weight=1:2", "dte@granularity=block@alpha_blend=[0,1]:2",
        "dte@offsets_on=hard@alpha_blend=1:0",
    ],
)  # fmt: skip
def test_what_acts_is_not_refused(methods, tiny_backbone, acting):
    fresh = TuningEncoder.from_backbone(tiny_backbone, methods.pipe.encoder.settings)
    methods.others.setdefault("fresh", DTEPipeline(tiny_backbone, fresh))
    methods.check(parse(acting))


def test_a_concept_is_that_of_personalize_at_each_number_of_steps(methods, encoder, tiny_pixels):
    pixels = (tiny_pixels[:1] * 127).round() / 127.5
    pipe = methods.pipe
    concepts = methods.concepts(parse("dte@alpha_blend=0.5@batch_size=3:0,1,3"), pixels, seed=2)
    assert list(concepts) == [0, 1, 3]
    method, tuning = (
        MethodConfig(**vars(encoder.method) | {"alpha_blend": 0.5}),
        TuneConfig(batch_size=3),
    )
    for steps, concept in concepts.items():
        alone = pipe.personalize(
            to_pil(pixels), steps, seed=2, progress=False, method=method, config=tuning
        )
        assert concept.config == method
        assert torch.equal(concept.v_star, alone.v_star)
        assert all(torch.equal(b, alone.offsets[k][1]) for k, (_, b) in concept.offsets.items())
        assert concept.info["num_steps"] == steps
        assert concept.nearest_words == alone.nearest_words
    assert concepts[1].info["words_after"] != concepts[0].info["words_after"]


def test_a_prediction_is_cut_once_before_it_is_tuned(methods, encoder, tiny_pixels):
    """The best approximation of each A B, by a full singular value decomposition."""
    pixels = (tiny_pixels[:1] * 127).round() / 127.5
    concepts = methods.concepts(parse("dte@rank=1@batch_size=2:0,1"), pixels, seed=2)
    predicted = encoder.predict(methods.pipe.backbone, pixels, 2, methods.pipe.prompt_encoder)
    for key, (a, b) in concepts[0].offsets.items():
        assert a.shape[-1] == b.shape[-2] == 1
        u, s, v = torch.linalg.svd((predicted.offsets[key][0] @ predicted.offsets[key][1])[0])
        torch.testing.assert_close((a @ b)[0], s[0] * u[:, :1] @ v[:1], rtol=1e-3, atol=1e-5)
    moved = concepts[1].offsets[key]
    assert moved[0].shape[-1] == 1 and not torch.equal(moved[0], a)
    torch.testing.assert_close(concepts[0].v_star, predicted.v_star)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dte@rank=3:1", "rank 2 can be cut to rank 1 to 2"),
        ("dte@rank=1@trainable=heads:1", "trainable=predictions and prediction_interval=0"),
        ("dte@rank=1@masked=true:1", "without masked"),
        ("dte@rank=1@trainable=encoder:1", "trainable=predictions"),
        ("dte@rank=1@prediction_interval=2:0", "prediction_interval=0"),
        ("e4t@encoder=nowhere:1", "no E4TEncoder at nowhere"),
        ("dte@encoder=nowhere:1", "No encoder at"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(methods, spec, message):
    with pytest.raises(DTEError, match=message):
        methods.check(parse(spec))


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_an_encoder_of_full_rank_can_be_evaluated(tiny_backbone, tiny_config, tiny_pixels):
    settings = EncoderConfig(**vars(tiny_config) | {"rank": "full"})
    pipe = DTEPipeline(tiny_backbone, TuningEncoder.from_backbone(tiny_backbone, settings))
    methods, pixels = Methods(pipe), (tiny_pixels[:1] * 127).round() / 127.5
    specs = {name: methods.experiment(name) for name in EXPERIMENTS}
    assert all("dte:" in specs[name][0] for name in ("table", "quick", "steps", "long"))
    lora = methods.concepts(parse("lora@batch_size=2:1"), pixels, 0)[1]
    assert lora.offsets and "lora:12" in specs["table"]
    assert len(specs["rank"]) == 5 and len(specs["regulariser"]) == len(REGULARISERS)
    assert len(specs["blend"]) == 8 * len(OFFSETS_ON) * len(GRANULARITIES) // 2 + 4
    [(steps, concept)] = methods.concepts(parse("dte@rank=2@batch_size=2:1"), pixels, 0).items()
    assert steps == 1 and {a.shape[-1] for a, _ in concept.offsets.values()} == {2}
    with pytest.raises(DTEError, match="rank 16 can be cut"):
        methods.check(parse("dte@rank=17:1"))


def test_an_experiment_leaves_out_what_cannot_run(tiny_backbone, tiny_encoder):
    methods = Methods(DTEPipeline(tiny_backbone, tiny_encoder))
    with pytest.warns(UserWarning, match="e4t@.*:12 is left out.*no E4TEncoder"):
        specs = methods.experiment("table")
    assert "dte:0,12" in specs and not any(spec.startswith("e4t") for spec in specs)
    with pytest.warns(UserWarning, match="rank=4.*rank 1 to 2"):
        assert methods.experiment("rank") == ["dte@rank=1:0,12", "dte@rank=2:0,12"]
    with pytest.raises(DTEError, match="Unknown experiment 'tabel'"):
        methods.experiment("tabel")


def test_a_part_is_drawn_alone(methods, tiny_pixels):
    """The whole is tuned; then one part of it is left out."""
    pixels = (tiny_pixels[:1] * 127).round() / 127.5

    def concept(text):
        return methods.concepts(parse(text), pixels, seed=1)[2]

    whole, word, weights = (concept(f"dte{part}:2") for part in ("", "@part=word", "@part=weights"))
    assert torch.equal(word.v_star, whole.v_star)
    for key, (a, b) in whole.offsets.items():
        assert torch.equal(weights.offsets[key][0], a) and torch.equal(weights.offsets[key][1], b)
        assert b.any() and not word.offsets[key][1].any()
    nothing = methods.pipe.prompt_encoder.word("thing")
    assert torch.equal(weights.v_star, nothing) and not torch.equal(nothing, whole.v_star)
    with pytest.raises(DTEError, match="part is one of word, weights"):
        parse("dte@part=both:2")
