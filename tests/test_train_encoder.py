"""The encoder's own training for the small world: composed on the device, one step at once."""

import json
from collections import Counter

import pytest
import torch

from dte_lab.backbone import load_backbone
from dte_lab.baselines import load_e4t
from dte_lab.encoder import load_encoder
from dte_lab.evaluation import encoders
from dte_lab.tokens import PromptEncoder
from dte_lab.world import concepts, split_names, train_encoder
from dte_lab.world.captions import held_out
from dte_lab.world.data import to_tensor
from dte_lab.world.pair_batches import PairBatches
from dte_lab.world.pairs import BACKGROUNDS, VARIANTS, behind, mix, vary
from dte_lab.world.scenes import SCENES, SPRITE_PX, compose
from dte_lab.world.sprites import STYLES, sprite


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("small")


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
    ids, slots = batch["prompts"]
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


def test_pictures_are_no_held_out_combinations_and_ids_tell_concepts_apart(batches):
    names = split_names("val")
    for n, s, b in batches.shown[::50].tolist():
        assert not held_out(names[n], STYLES[s], SCENES[b])
    ids = batches(200)["concepts"]
    total = len(concepts())
    halves = torch.stack([ids % total, ids // total % total])
    known = {concepts()[name].index for name in names}
    assert set(halves.flatten().tolist()) <= known and ids.max() >= total**2


@pytest.mark.parametrize(("e4t", "pieces"), [(False, (2, 4)), (True, (2,))])
def test_it_trains_an_encoder_that_loads(backbone, tmp_path, monkeypatch, e4t, pieces):
    monkeypatch.setattr(train_encoder, "fit_token_head", lambda *args: None)
    monkeypatch.setattr(train_encoder, "UNSEEN", 2)
    for steps in pieces:
        path = train_encoder.main(
            tmp_path, steps=steps, batch_size=2, concepts=10, width=32, e4t=e4t
        )
    encoder = load_e4t(path, backbone) if e4t else load_encoder(path, backbone)
    assert encoder.dte.width == 32
    if not e4t:  # the bank of the model, not the empty one of its average
        assert (encoder.bank_concepts >= 0).sum() == 8
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "unseen_diffusion" in x] == list(pieces)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, *pieces]


def test_variants_of_the_encoder_are_trained_once_and_gathered(tmp_path, monkeypatch):
    trained = []

    def main(out, **options):
        trained.append(options)
        (out / "encoder").mkdir(parents=True)
        (out / "encoder" / "config.json").write_text("{}")
        lines = [{"step": s, "minutes": 1.0, "unseen_diffusion": 1 / s} for s in (4, 8)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = {"batch_size": 128, "learning_rate": 1e-3, "seed": 0}
        (out / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(train_encoder, "main", main)
    for _ in range(2):
        encoders.main(tmp_path / "runs", tmp_path / "encoders.json", steps=8)
    assert len(trained) == len(encoders.VARIANTS) == 13
    found = json.loads((tmp_path / "encoders.json").read_text())["variants"]
    by_name = {row["name"]: row for row in found}
    assert by_name["base"]["unseen"] == [[4, 0.25], [8, 0.125]]
    sizes = [by_name[name]["offsets"] for name in ("rank-1", "base", "rank-16")]
    assert sizes[1] == 4 * sizes[0] and sizes[2] == 16 * sizes[0]
