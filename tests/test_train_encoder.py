"""The encoder's own training for the small world: composed on the device, one step at once."""

import json

import pytest
import torch
import typer
from safetensors.torch import load_file
from tiny_world import shrink_encoder

from dte_lab.common.errors import DTEError
from dte_lab.config import EncoderConfig
from dte_lab.e4t import load_e4t
from dte_lab.encoder import EncoderPrediction, TuningEncoder, load_encoder
from dte_lab.evaluation import encoders
from dte_lab.evaluation.measures import PICTURE_MEASURES
from dte_lab.evaluation.records import Row
from dte_lab.training import small_world as train_encoder
from dte_lab.world import split_names


@pytest.fixture(scope="module")
def backbone(small_pipe):
    return small_pipe.backbone


def test_some_samples_lose_their_offsets(tiny_offsets):
    offsets = {
        key: (a.repeat(3, 1, 1), b.repeat(3, 1, 1)) for key, (a, b) in tiny_offsets().items()
    }
    prediction = EncoderPrediction(torch.ones(3, 24), offsets, torch.zeros(3, 24))
    found = train_encoder.drop_offsets(prediction, torch.tensor([False, True, False]))
    assert found.v_star is prediction.v_star and found.class_word is prediction.class_word
    for key, (a, b) in found.offsets.items():
        assert torch.equal(a, offsets[key][0]) and torch.equal(b[::2], offsets[key][1][::2])
        assert (b[1] == 0).all() and (offsets[key][1][1] != 0).any()


@pytest.fixture
def quick(backbone, monkeypatch):
    """The encoder's training with two things to learn from and two to measure on."""
    monkeypatch.setattr(train_encoder, "load_backbone", lambda name, device: backbone)
    shrink_encoder(monkeypatch.setattr)
    return lambda out, **options: train_encoder.main(
        out, batch_size=2, word_steps=1, width=32, **options
    )


@pytest.mark.parametrize(("e4t", "pieces"), [(False, (2, 4)), (True, (2,))])
def test_it_trains_an_encoder_that_loads(backbone, quick, tmp_path, e4t, pieces):
    for steps in pieces:
        path = quick(tmp_path, steps=steps, e4t=e4t)
    encoder = load_e4t(path, backbone) if e4t else load_encoder(path, backbone)
    assert encoder.settings.width == 32
    assert (encoder.bank_concepts >= 0).sum() == 2 * pieces[-1]  # the model's own bank
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "unseen_diffusion" in x] == list(pieces)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, *pieces]
    by_concept = json.loads((tmp_path / train_encoder.BY_CONCEPT).read_text())
    assert list(by_concept) == split_names("val")[:2]
    word = [json.loads(line) for line in (tmp_path / "word" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in word if "unseen_norm" in x] == [1], "once"

    with pytest.raises(ValueError, match=r"other settings \(encoder.rank, method.regulariser\)"):
        quick(tmp_path, steps=5, rank=2, regulariser="hinge", e4t=e4t)
    with pytest.raises(DTEError, match="word.safetensors: the tensor .* encoder of this size"):
        quick(tmp_path / "other", steps=1, word=tmp_path / "word.safetensors", patch_channels=3)
    (tmp_path / "damaged").write_bytes(b"no tensors")
    for name in ("nowhere", "damaged"):
        with pytest.raises(DTEError, match=f"{name} cannot be read"):
            quick(tmp_path / "other", steps=1, word=tmp_path / name)
    with pytest.raises(ValueError, match="other settings .*model"):
        quick(tmp_path, steps=5, e4t=not e4t)


def test_a_seed_changes_the_first_weights_and_what_training_draws(quick, tmp_path):
    logs = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        quick(tmp_path / folder, steps=1, seed=seed)
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert logs[0] == logs[1] != logs[2]


def test_the_word_of_another_run_is_what_one_begins_with(backbone, quick, tmp_path):
    quick(tmp_path / "one", steps=1)
    state = load_file(tmp_path / "one" / "word.safetensors")
    assert {key.split(".")[0] for key in state} == {"fusion", "token_head", "zero_shot_weight"}
    assert abs(state["zero_shot_weight"]) < 0.01 and state["token_head.out.bias"].abs().max() > 0
    encoder = TuningEncoder.from_backbone(backbone, EncoderConfig(width=32, rank=2), seed=1)
    train_encoder.read_word(encoder, tmp_path / "one" / "word.safetensors")
    for key, x in state.items():
        assert torch.equal(encoder.state_dict()[key], x)
    quick(tmp_path / "two", steps=1, rank=2, word=tmp_path / "one" / "word.safetensors")
    assert not (tmp_path / "two" / "word").exists()


def test_variants_of_the_encoder_are_trained_once_and_gathered(tmp_path, monkeypatch):
    trained, words = [], []

    def main(out, seed, word, **options):
        trained.append(out.name)
        words.append(word)
        out.mkdir(parents=True)
        lines = [{"step": s, "minutes": 1.0, "unseen_diffusion": 1 / s} for s in (4, 8)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "config.json").write_text(json.dumps({"batch_size": 128, "learning_rate": 1e-3}))
        errors = {"cat": 0.5 + seed, "dog": 0.7 + seed + 0.1 * ("rank" in options)}
        (out / train_encoder.BY_CONCEPT).write_text(json.dumps(errors))

    monkeypatch.setattr(train_encoder, "main", main)
    for _ in range(2):
        encoders.main(tmp_path / "runs", tmp_path / "one.json", steps=8)
    assert len(trained) == len(encoders.RECIPES) == 13
    by_name = dict(zip(trained, words, strict=True))
    assert by_name["base"] is by_name["drawings-700"] is None
    assert by_name["rank-1"] == tmp_path / "runs" / "base" / "word.safetensors"
    found = json.loads((tmp_path / "one.json").read_text())["variants"]
    by_name = {row["name"]: row for row in found}
    assert by_name["base"]["unseen"] == [[4, 0.25], [8, 0.125]]
    sizes = [by_name[name]["offsets"] for name in ("rank-1", "base", "rank-16")]
    assert sizes[1] == 4 * sizes[0] and sizes[2] == 16 * sizes[0]

    encoders.main(tmp_path / "runs", tmp_path / "two.json", "rank-1", seeds=2)
    assert trained[13:] == ["base-seed1", "rank-1-seed1"]
    summary = json.loads((tmp_path / "two.json").read_text())["summary"]
    base, rank = summary["base"], summary["rank-1"]
    assert base["by_seed"] == [0.6, 1.6] and base["mean"]["mean"] == pytest.approx(1.1)
    assert base["minus_base"]["high"] == 0 and rank["minus_base"]["n"] == 2
    assert rank["minus_base"]["mean"] == pytest.approx(0.05)
    with pytest.raises(typer.BadParameter, match="no variant 'rank-3': take of base, rank-1"):
        encoders.main(tmp_path / "runs", tmp_path / "three.json", "rank-3")


def test_pictures_of_variants_are_compared_by_concept_over_seeds():
    def rows(method, values, steps=12):
        return [
            Row(
                method, steps, concept, "animals", "noto", "white", "beach", False,
                **dict.fromkeys(PICTURE_MEASURES, 1.0) | {"scene": value},
            )
            for concept, value in zip(("cat", "dog"), values, strict=True)
        ]  # fmt: skip

    path = "dte@encoder=runs/{}/encoder"
    run = [
        *rows("oracle", (1, 1), 0), *rows(path.format("base"), (0.2, 0.4)),
        *rows(path.format("base-seed1"), (0.4, 0.6)), *rows(path.format("rank-1"), (0.5, 0.5)),
        *rows(path.format("rank-1-seed1"), (0.5, 0.9)),
    ]  # fmt: skip
    found = encoders.compare_pictures(run, "scene")[12]
    assert found["base"]["by_seed"] == [0.3, 0.5] and found["rank-1"]["by_seed"] == [0.5, 0.7]
    minus = found["rank-1"]["minus_base"]  # cat: 0.5 - 0.3, dog: 0.7 - 0.5
    assert minus["n"] == 2 and [minus[k] for k in ("low", "high")] == pytest.approx([0.2, 0.2])
