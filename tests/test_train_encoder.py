"""The encoder's own training for the small world: composed on the device, one step at once."""

import json
from collections import Counter

import pytest
import torch
import typer

from dte_lab.e4t import load_e4t
from dte_lab.encoder import load_encoder
from dte_lab.evaluation import encoders
from dte_lab.evaluation.measures import PICTURE_MEASURES
from dte_lab.evaluation.records import Row
from dte_lab.tokens import PromptEncoder
from dte_lab.training import small_world as train_encoder
from dte_lab.training.pair_batches import PairBatches
from dte_lab.world import concepts, split_names
from dte_lab.world.captions import held_out
from dte_lab.world.data import to_tensor
from dte_lab.world.pairs import BACKGROUNDS, VARIANTS, behind, mix, vary
from dte_lab.world.scenes import SCENES, SPRITE_PX, compose
from dte_lab.world.sprites import STYLES, sprite


@pytest.fixture(scope="module")
def backbone(small_pipe):
    return small_pipe.backbone


@pytest.fixture(scope="module")
def batches(backbone):
    return PairBatches(PromptEncoder(backbone), ("val",))


def test_a_batch_is_composed_as_single_pairs_are(batches):
    names, generator = split_names("val"), torch.Generator().manual_seed(0)
    for variant in range(len(VARIANTS)):
        name, other, style, scene = (
            torch.randint(n, (1,), generator=generator) for n in (len(names), len(names), 3, 20)
        )
        torch.manual_seed(variant)
        drawn = batches.draw(name, other, style, torch.tensor([variant]), scene)
        torch.manual_seed(variant)
        room = behind(SCENES[scene], int(torch.randint(BACKGROUNDS, (1,))))
        left, right = (sprite(names[n], STYLES[style], SPRITE_PX) for n in (name, other))
        truth = compose(vary(mix(left, right), variant), SCENES[scene], room)
        one_level = 1.1 / 127.5  # rooms are kept in half precision
        assert (drawn - to_tensor(truth[None])).abs().max() <= one_level


def test_prompts_say_what_the_target_shows(backbone, batches):
    torch.manual_seed(0)
    batch, prompts = batches(400), backbone.tokenizer.batch_decode(batches.ids)
    ids, slots = batch["prompt"]
    assert (slots.max(dim=1).values == 0).all()  # each has a placeholder
    rows = (ids[:, None] == batches.ids).all(-1).int().argmax(1)
    same = (batch["image"] == batch["target"]).flatten(1).all(1)
    assert same[rows == 0].all() and 0.15 < (rows == 0).double().mean() < 0.35
    kinds = Counter("short" if r > 80 else "styled" if r > 20 else "plain" for r in rows.tolist())
    assert 0.15 < kinds["styled"] / 400 < 0.35 and 0.08 < kinds["short"] / 400 < 0.22
    assert "under water" in prompts[1 + SCENES.index("water")]
    # the border of a target on red is red
    on_red = [i for i, r in enumerate(rows.tolist()) if "red background" in prompts[r]]
    red = batch["target"][on_red][:, :, 0, 0]
    assert on_red and (red[:, 0] > red[:, 1:].max(1).values + 0.5).all()


def test_only_draws_one_concept(batches):
    name = batches.names[3]
    batch = batches.only(name)(50)
    left = batch["concept"] % len(concepts())
    assert set(left.tolist()) == {concepts()[name].index}
    assert len(batches.shown) > len(batches.only(name).shown) > 0


def test_pictures_are_no_held_out_combinations_and_ids_tell_concepts_apart(batches):
    names = split_names("val")
    for n, s, b in batches.shown[::50].tolist():
        assert not held_out(names[n], STYLES[s], SCENES[b])
    ids = batches(200)["concept"]
    total = len(concepts())
    halves = torch.stack([ids % total, ids // total % total])
    known = {concepts()[name].index for name in names}
    assert set(halves.flatten().tolist()) <= known and ids.max() >= total**2


def test_half_of_the_concepts_are_mixed_and_three_quarters_varied(batches):
    torch.manual_seed(0)
    ids, total = batches(2000)["concept"], len(concepts())
    assert ((ids >= total**2).double().mean() - 0.75).abs() < 0.05
    assert ((ids % total != ids // total % total).double().mean() - 0.5).abs() < 0.05


@pytest.fixture
def quick(backbone, monkeypatch):
    """The encoder's training without its costly start, measured on a pair each of four things."""

    def few(prompt_encoder, splits=("train", "extra"), count=4, **shares):
        return PairBatches(prompt_encoder, splits, count, **shares)

    monkeypatch.setattr(train_encoder, "load_backbone", lambda name, device: backbone)
    monkeypatch.setattr(train_encoder, "fit_token_head", lambda *args, **options: None)
    monkeypatch.setattr(train_encoder, "PairBatches", few)
    monkeypatch.setattr(train_encoder, "UNSEEN", 2)
    monkeypatch.setattr(train_encoder, "UNSEEN_EACH", 1)
    return lambda out, **options: train_encoder.main(
        out, batch_size=2, concepts=10, width=32, **options
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
    assert len(by_concept) == 4 and set(by_concept) < set(split_names("val"))

    with pytest.raises(ValueError, match=r"other settings \(encoder.rank, method.regulariser\)"):
        quick(tmp_path, steps=5, rank=2, regulariser="hinge", e4t=e4t)
    with pytest.raises(ValueError, match="other settings .*model"):
        quick(tmp_path, steps=5, e4t=not e4t)


def test_a_seed_changes_the_first_weights_and_what_training_draws(quick, tmp_path):
    logs = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        quick(tmp_path / folder, steps=1, seed=seed)
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert logs[0] == logs[1] != logs[2]


def test_variants_of_the_encoder_are_trained_once_and_gathered(tmp_path, monkeypatch):
    trained = []

    def main(out, seed, **options):
        trained.append(out.name)
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
