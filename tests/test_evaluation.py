"""The harness asks what it says, goes on where it stopped, and its rows say what was made."""

import json
import operator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dte_lab import Concept, DTEPipeline
from dte_lab.cli import main
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_pil
from dte_lab.common.processes import in_processes
from dte_lab.common.stats import interval
from dte_lab.evaluation import run
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.evaluation.edits import Item, edits, items, object_mask, object_region, truth
from dte_lab.evaluation.figures import tradeoff
from dte_lab.evaluation.measures import PICTURE_MEASURES, TIMES
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.records import COLUMNS, NUMBERS, Row, read_csv, to_csv
from dte_lab.evaluation.report import (
    harmonic,
    least_steps,
    markdown,
    name_of,
    paired,
    per_concept,
    steps_table,
    summarise,
)
from dte_lab.evaluation.run import EvaluationConfig
from dte_lab.evaluation.specifications import parse
from dte_lab.evaluation.trials import Sampling, Trial, anchor_trial, rows_of, trials
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, split_names, sprite, unseen_names


def test_every_test_concept_is_asked_twelve_edits_that_its_picture_does_not_show():
    chosen = items(60)
    assert len({item.name for item in chosen}) == 60
    assert [item.style for item in chosen[:3]] == list(STYLES)
    assert len({(item.style, item.scene) for item in chosen[:9]}) == 9
    assert items(20)[19].name == chosen[57].name  # spread over the split's order
    for item in chosen:
        asked = edits(item)
        assert len(asked) == len({edit.name for edit in asked}) == 12
        assert all(edit.prompt.count("S*") == 1 for edit in asked)
        assert all((edit.style, edit.scene) != (item.style, item.scene) for edit in asked)
        assert {edit.style for edit in asked if edit.is_style} == set(STYLES) - {item.style}


def test_scene_classifier_reads_true_renderings():
    asked = [(item, edit) for item in items(60)[::4] for edit in edits(item)]
    x = torch.stack([truth(item, edit, seed=7) for item, edit in asked])
    hits = classify_scene(x) == [SCENES.index(edit.scene) for _, edit in asked]
    assert len(hits) == 180 and hits.mean() >= 0.99


def test_object_region_holds_the_sprite_only():
    item = items(6)[2]
    alpha = sprite(item.name, item.style, 48)[..., 3] > 0.1
    mask = object_mask(item.name, item.style)
    assert (mask.numpy() == alpha).all()
    region = object_region(item.picture(), mask)
    assert region.shape == (1, 3, 48, 48)
    assert torch.equal(region[..., mask], item.picture()[..., 8:56, 8:56][..., mask])
    assert region[..., ~mask].abs().max() == 0


class FakeMeasures:
    """Stands in for the judges, which want 64-pixel pictures."""

    def __init__(self, backbone):
        pass

    def pictures(self, drawn, item, asked):
        assert drawn.shape[:2] == (len(asked), 2)
        return [dict.fromkeys(PICTURE_MEASURES, drawn[i].std().item()) for i in range(len(asked))]

    def words(self, name, words, v_star):
        return {"word_similarity": 0.5} if words else {}


CAT = Item("cat", "noto", "white")


def test_a_row_says_what_was_drawn_and_what_it_cost():
    asked = edits(CAT, ("beach",))[:2]  # and one style
    pictures = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    info = {"num_steps": 50, "seconds": 1.25, "words_after": [["dog", 0.9], ["pug", 0.8]]}
    concept = Concept(torch.zeros(1, 2), {}, "small", info=info)
    losses = {"loss": 0.111, "loss_elsewhere": 0.222}
    trial = Trial(12, pictures, concept, seconds_per_picture=0.75, extra_memory_mb=99.0)
    first, second = rows_of(FakeMeasures(None), "dte@rank=1", CAT, asked, trial, losses)
    assert (first.method, first.steps, first.concept, first.group) == (
        "dte@rank=1", 12, "cat", "nature",
    )  # fmt: skip
    assert (first.input_style, first.input_scene) == ("noto", "white")
    assert (first.edit, first.is_style) == ("beach", False) and second.is_style
    assert first.identity == pytest.approx(pictures[0].std().item(), rel=1e-4)
    assert second.identity == pytest.approx(pictures[1].std().item(), rel=1e-4)
    assert first.nearest_words == "dog pug" and first.word_similarity == 0.5
    assert [getattr(first, name) for name in TIMES] == [1.25, 0.75, 99]
    assert (first.loss, first.loss_elsewhere) == (0.111, 0.222)
    anchor = rows_of(FakeMeasures(None), "oracle", CAT, asked, Trial(0, pictures))[0]
    assert anchor.steps == 0 and anchor.nearest_words == ""
    assert {getattr(anchor, name) for name in (*TIMES, "loss", "word_similarity")} == {None}


def test_a_table_is_read_as_it_was_written(tmp_path):
    row = Row("dte", 12, "cat", "animals", "noto", "white", "fluent", True, nearest_words="a, b")
    for i, name in enumerate(NUMBERS):
        setattr(row, name, 1 / (i + 3))
    row = replace(row, diversity=None)  # rounds as well
    assert row.identity == 0.25 and row.clip_i_small == 0.33333
    (tmp_path / "t.csv").write_bytes(to_csv([row]))
    assert read_csv(tmp_path / "t.csv") == [row]
    head, line = (tmp_path / "t.csv").read_text().splitlines()
    assert head == ",".join(COLUMNS)
    assert line.startswith("dte,12,cat,animals,noto,white,fluent,1,0.33333,0.25,0.2,")
    head = "method,steps,concept,group,input_style,input_scene,edit,is_style,scene"
    (tmp_path / "old.csv").write_text(f"{head}\nti,0,cat,g,noto,white,red,0,0.5\n")
    (old,) = read_csv(tmp_path / "old.csv")
    assert old.scene == 0.5 and old.seconds is None and old.is_style is False


def test_anchors_are_the_truth_and_that_of_the_next_concept_with_other_seeds():
    chosen = items(3)
    asked = edits(chosen[2], ("beach",))[:2]
    own = anchor_trial(parse("oracle"), chosen[2], chosen, asked, seeds=2)
    other = anchor_trial(parse("other"), chosen[2], chosen, asked, seeds=2)
    for i, edit in enumerate(asked):
        for s in range(2):
            assert torch.equal(own.pictures[i, s], truth(chosen[2], edit, 100 + s))
            next_one = Item(chosen[0].name, chosen[2].style, chosen[2].scene)
            assert torch.equal(other.pictures[i, s], truth(next_one, edit, 100 + s))
    assert own.steps == other.steps == 0 and own.concept is None


def test_a_trial_draws_each_edit_with_each_seed(
    tiny_backbone, tiny_encoder, tiny_pixels, monkeypatch
):
    """Prompt and seed of every picture, by another route; steps that were not reached keep their
    name.
    """
    monkeypatch.setattr(Item, "picture", lambda self: (tiny_pixels[:1] * 127).round() / 127.5)
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)
    asked = edits(CAT, ("beach",))[:2]
    sampling = Sampling(seeds=2, num_inference_steps=2, guidance_scale=2.5)
    made = list(trials(Methods(pipe), parse("dte@batch_size=2:0,1"), CAT, asked, sampling, seed=5))
    assert [trial.steps for trial in made] == [0, 1]
    assert not torch.equal(made[0].pictures, made[1].pictures)
    for i, edit in enumerate(asked):
        for s in range(2):
            [[drawn]] = pipe.generate(
                made[1].concept, edit.prompt, [s], 2.5, num_inference_steps=2, progress=False
            )
            torch.testing.assert_close(
                pipe.pixels([drawn])[0], made[1].pictures[i, s], atol=0.02, rtol=0
            )
    assert made[1].seconds_per_picture > 0 and made[0].extra_memory_mb == made[1].extra_memory_mb
    with monkeypatch.context() as patch:
        early = replace(made[0].concept, info={"num_steps": 40})
        patch.setattr(Methods, "concepts", lambda *_: {0: early, 40: early})
        again = trials(Methods(pipe), parse("dte:0,40"), CAT, asked, sampling, seed=5)
        assert [trial.steps for trial in again] == [0, 40]


@pytest.fixture
def harness(tiny_backbone, tiny_encoder, tiny_pixels, monkeypatch):
    monkeypatch.setattr(run, "Measures", FakeMeasures)
    no_memory = SimpleNamespace(read=lambda: None)  # the true one collects all garbage first
    monkeypatch.setattr("dte_lab.evaluation.trials.PeakMemory", lambda device: no_memory)
    monkeypatch.setattr(Item, "picture", lambda self: tiny_pixels[len(self.name) % 3][None])
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)

    def evaluate(
        out_dir, specs=("dte@batch_size=2:0,1", "ti@batch_size=2:1"), config=None, **given
    ):
        asked = {"concepts": 2, "scenes": ("beach",), "num_inference_steps": 2, **(config or {})}
        return run.measure_methods(
            out_dir, pipe, specs, EvaluationConfig(**asked), progress=False, **given
        )

    evaluate.pipe = pipe
    return evaluate


def untimed(rows):
    return [replace(row, **dict.fromkeys(TIMES)) for row in rows]


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(harness, tmp_path, monkeypatch):
    whole = harness(tmp_path / "whole")
    fit, calls = Methods.concepts, []

    def cut_off(self, spec, pixels, seed, mask=None):
        calls.append(spec.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self, spec, pixels, seed, mask)

    monkeypatch.setattr(Methods, "concepts", cut_off)
    with pytest.raises(KeyboardInterrupt):
        harness(tmp_path / "parts")
    harness(tmp_path / "parts")
    assert calls == ["dte", "ti", "dte", "dte", "ti"]

    rows = {folder: read_csv(tmp_path / folder / "measures.csv") for folder in ("whole", "parts")}
    assert untimed(rows["whole"]) == untimed(rows["parts"])
    assert len(rows["whole"]) == 2 * 3 * 5  # concepts x edits x (dte twice, ti, two anchors)
    keys = [(r.concept, r.method, r.steps, r.edit) for r in rows["whole"]]
    assert len(set(keys)) == 30
    names = [item.name for item in items(2)]
    assert [key[0] for key in keys] == [names[0]] * 15 + [names[1]] * 15
    assert list(dict.fromkeys(key[1] for key in keys)) == [
        "dte@batch_size=2", "ti@batch_size=2", "oracle", "other",
    ]  # fmt: skip
    lines = {(line["method"], line["steps"]) for line in whole}
    assert ("dte@batch_size=2", 0) in lines and ("ti@batch_size=2", 1) in lines
    document = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert document["summary"] == whole and document["versions"]["torch"] == torch.__version__
    for changed in ({"concepts": 3}, {"seed": 1}, {"guidance_scale": 3.0}):
        with pytest.raises(ValueError, match=f"other settings.*{next(iter(changed))}"):
            harness(tmp_path / "whole", config=changed)
    weight = harness.pipe.encoder.token_head.hidden.weight
    monkeypatch.setattr(weight, "data", weight + 1)
    with pytest.raises(ValueError, match="other settings.*weights.encoder"):
        harness(tmp_path / "whole")

    grid = Image.open(tmp_path / "whole/pictures" / names[0].replace(" ", "-") / "oracle_0.png")
    assert grid.size == (3 * 64, 2 * 64), "edits from left to right, seeds from top to bottom"
    item = items(2)[0]
    at = np.asarray(grid)[64:, 64:128]  # second seed, second edit
    expected = to_pil(truth(item, edits(item, ("beach",))[1], 101)[None])[0]
    assert np.array_equal(at, np.asarray(expected))


def test_a_finished_run_can_be_given_more_methods_and_steps(harness, tmp_path, monkeypatch):
    specs = [["dte@batch_size=2:0,1,2", "ti@batch_size=2:1"], ["dte@batch_size=2:0,2"]]
    whole = harness(tmp_path / "whole", specs[0], {"seed": 3})
    harness(tmp_path / "parts", specs[1], {"seed": 3})
    fit, calls = Methods.concepts, []

    def counted(self, spec, pixels, seed, mask=None):
        calls.append((spec.text, seed))
        return fit(self, spec, pixels, seed, mask)

    monkeypatch.setattr(Methods, "concepts", counted)
    parts = harness(tmp_path / "parts", specs[0], {"seed": 3})
    assert calls == 2 * [("dte@batch_size=2:1", 3), ("ti@batch_size=2:1", 3)]

    def numbers(lines):
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    assert numbers(parts) == numbers(whole)
    for fewer in (["dte@batch_size=2:0,2", "ti@batch_size=2:1"], ["dte@batch_size=2:0,1,2"]):
        with pytest.raises(ValueError, match="other settings.*methods"):
            harness(tmp_path / "parts", fewer, {"seed": 3})


def test_what_cannot_run_is_said_before_any_work(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(Methods, "concepts", None)
    for specs, message in (
        (("ti:1", "dte@alpha_blend=x:1"), "alpha_blend is a number"),
        (("ti:1", "dte@rank=3:1"), "rank 1 to 2"),
        (("ti:1", "dte@encoder=nowhere:1"), "No encoder at nowhere"),
        (("ti:1", "ti:2"), "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            harness(tmp_path / "new", specs)
    with pytest.raises(ValueError, match="need `load`"):
        harness(tmp_path / "new", processes=2)
    with pytest.raises(ValueError, match="seeds is a whole number from 2"):
        harness(tmp_path / "new", config={"seeds": 1})
    with pytest.raises(ValueError, match="unconditional_offsets changes nothing.*guidance"):
        harness(
            tmp_path / "new", ["dte@unconditional_offsets=false:1"], config={"guidance_scale": 1.0}
        )
    assert not (tmp_path / "new").exists()


def test_weights_of_every_encoder_of_a_run_are_in_its_settings(harness, tmp_path, monkeypatch):
    from dte_lab.e4t import E4TEncoder

    backbone = harness.pipe.backbone
    e4t = E4TEncoder.from_backbone(backbone, harness.pipe.encoder.settings)
    e4t.save_pretrained(tmp_path / "e4t")
    methods = Methods(harness.pipe)
    before = methods.settings()["weights"]
    spec = parse(f"e4t@encoder={tmp_path / 'e4t'}:1")
    methods.check(spec)
    weights = methods.settings()["weights"]
    assert before.items() < weights.items() and len(weights) == 3
    with torch.no_grad():
        e4t.hypernetwork.deltas[0].add_(1)
    e4t.save_pretrained(tmp_path / "e4t")
    methods = Methods(harness.pipe)
    methods.check(spec)
    key = (weights.keys() - before.keys()).pop()
    assert methods.settings()["weights"][key] != weights[key]


def test_processes_share_jobs_and_threads_and_keep_the_order():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        jobs = [partial(abs, -3), torch.get_num_threads, partial(abs, 1)]
        assert list(in_processes(operator.call, jobs, processes=2, chunk=1)) == [3, 2, 1]
    finally:
        torch.set_num_threads(before)


def synthetic():
    """Two concepts, one scene and one style edit; identity margins that are easy to check."""
    rows = []
    margins = {
        ("dte", 0): (0.1, 0.2), ("dte", 12): (0.3, 0.4), ("ti", 12): (0.2, 0.1),
        ("oracle", 0): (0.5, 0.5), ("other", 0): (-0.1, 0.0),
    }  # fmt: skip
    for (method, steps), values in margins.items():
        for concept, margin in zip(("cat", "dog"), values, strict=True):
            for is_style in (False, True):
                measures = dict.fromkeys(PICTURE_MEASURES, 0.9 if is_style else 0.5)
                measures |= {
                    "scene": 1 if is_style else 0.8, "identity_margin": 9 if is_style else margin
                }  # fmt: skip
                rows.append(
                    Row(method, steps, concept, "animals", "noto", "white", str(is_style), is_style,
                        **measures)
                )  # fmt: skip
    return rows


def test_summary_scales_identity_by_the_truth_and_pairs_by_concept():
    rows = synthetic()
    cell = per_concept(rows)["dte", 12]["cat"]
    assert cell["identity_scaled"] == pytest.approx(0.3 / 0.5)
    assert cell["scene"] == 0.8 and cell["truth_similarity"] == 0.9
    assert cell["fidelity"] == pytest.approx(2 / (1 / 0.6 + 1 / 0.8))
    assert harmonic(0, 1) == 0 == harmonic(0, 0) and harmonic(0.25, 0.75) == 0.375
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


def test_ahead_is_against_twelve_steps_and_pairs_follow_the_concept():
    """Concepts stand in another order for each method; each has a value of its own."""
    fidelity = {
        ("dte", 12): {"cat": 0.2, "dog": 0.4, "bus": 0.5},
        ("dte", 50): {"dog": 0.8, "cat": 0.7, "bus": 0.9},
        ("ti", 12): {"bus": 0.1, "cat": 0.15, "dog": 0.3},
        ("oracle", 0): {"cat": 1, "bus": 1, "dog": 1},
        ("other", 0): {"cat": 0.5, "dog": 0, "bus": 0},
    }  # fmt: skip
    rows = []
    for (method, steps), values in fidelity.items():
        for concept, value in values.items():
            margin = value / (2 - value)  # the harmonic mean of it and 1 is the value
            measures = dict.fromkeys(PICTURE_MEASURES, 0.5) | {"scene": 1.0}
            measures["identity_margin"] = margin
            for is_style in (False, True):
                rows.append(Row(method, steps, concept, "any", "noto", "white", "x", is_style,
                                **measures))  # fmt: skip
    summary = {(line["method"], line["steps"]): line for line in summarise(rows)}
    ours, theirs = fidelity["dte", 12], fidelity["ti", 12]
    ahead = [ours[c] - theirs[c] for c in ("bus", "cat", "dog")]
    found = summary["ti", 12]["ahead"]
    assert found == pytest.approx(interval(ahead), abs=1e-4)
    assert summary["dte", 50]["ahead"]["mean"] < 0 and "ahead" not in summary["dte", 12]
    for key in (("dte", 50), ("ti", 12)):
        expected = interval(list(fidelity[key].values()))
        assert summary[key]["fidelity"] == pytest.approx(expected, abs=1e-4)
    (line,) = paired(rows, "dte", "ti")
    expected = interval([ours[c] - theirs[c] for c in ours])
    assert line["fidelity"] == pytest.approx(expected, abs=1e-4) and line["fidelity"]["n"] == 3
    assert line["fidelity"]["high"] == pytest.approx(0.4, abs=1e-4), "bus with bus"
    (back,) = paired(rows, "ti", "dte")
    assert back["fidelity"]["mean"] == -line["fidelity"]["mean"]
    assert least_steps(rows, share=0.5) == {"dte": {"any": 50}}
    assert least_steps(rows, share=0.4) == {"dte": {"any": 12}}


def test_scene_edits_tell_the_scene_and_style_edits_the_truth():
    """Each measure has values of its own in both kinds of edits, and an edit with its own value."""
    rows = []
    for method in ("dte", "oracle"):
        for edit, is_style, base in (("a", False, 0.01), ("b", False, 0.03), ("c", True, 0.05)):
            values = {m: base + 0.1 * i for i, m in enumerate(PICTURE_MEASURES)}
            rows.append(Row(method, 0, "cat", "animals", "noto", "white", edit, is_style, **values,
                            seconds=7.0 if edit == "a" else None))  # fmt: skip
    cell = per_concept(rows)["dte", 0]["cat"]
    for i, measure in enumerate(PICTURE_MEASURES):
        expected = 0.05 if measure in ("truth_similarity", "truth_rmse") else 0.02
        assert cell[measure] == pytest.approx(expected + 0.1 * i), measure
    assert cell["seconds"] == 7 and "loss" not in cell
    clip = {name: cell[name] for name in ("clip_i_small", "clip_t_small")}
    assert cell["fidelity_small"] == pytest.approx(2 * 0.02 * 0.42 / 0.44), clip


def test_stored_results_are_read_as_they_were_summarised():
    folder = Path(__file__).parents[1] / "results" / "rank"
    rows = read_csv(folder / "measures.csv")
    summary = summarise(rows)
    assert summary == json.loads((folder / "run.json").read_text())["summary"]
    text = (markdown(summary) + steps_table(rows)).rstrip() + "\n"
    assert text == (folder / "table.md").read_text()


def test_names_tell_the_options_and_the_encoder_but_not_the_steps():
    assert name_of("dte@num_steps=50@rank=2") == "tuning encoder, rank=2"  # of stored results
    assert name_of("dte@encoder=small/none") == "tuning encoder, encoder=small/none"
    trained = name_of("dte@alpha_blend=1@encoder=runs/encoders/rank-1-seed2/encoder")
    assert trained == "tuning encoder, alpha_blend=1, encoder=rank-1-seed2"


def test_report_writes_table_and_figures(tmp_path, capsys):
    rows = synthetic()
    (tmp_path / "measures.csv").write_bytes(to_csv(rows))
    settings = {"settings": {"scenes": ["beach"], "methods": ["dte:12"]}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "not finished" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(settings | {"summary": summarise(rows)}))
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path)])
    assert not exit_.value.code
    assert "tuning encoder" in (tmp_path / "table.md").read_text()
    for name in ("tradeoff.png", "steps.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5, "not empty"


def test_where_every_scene_is_right_the_figure_is_of_identity_alone():
    def line(method, steps, scene, identity):
        values = {"scene": scene, "identity_scaled": identity, "identity": 0.5}
        spread = {
            k: {"mean": v, "low": v - 0.1, "high": v + 0.1, "n": 7} for k, v in values.items()
        }
        return {"method": method, "steps": steps} | spread

    lines = [line("dte", 12, 1.0, 0.6), line("dte", 0, 1.0, 0.3), line("lora", 12, 1.0, 0.5)]
    (axes,) = tradeoff([*lines, line("oracle", 0, 0.2, 1.0)]).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [
        "tuning encoder, 0 steps",
        "tuning encoder, 12 steps",
        "DreamBooth LoRA, 12 steps",
    ]
    drawn = [bars.lines[0].get_xydata()[0].tolist() for bars in axes.containers]
    assert drawn == [[0.3, 0], [0.6, 1], [0.5, 2]]
    (axes,) = tradeoff([*lines, line("ti", 12, 0.98, 0.2)]).axes
    assert axes.get_xlabel().startswith("prompt fidelity") and len(axes.containers) == 3


def test_export_from_the_command_line(tiny_backbone, tiny_offsets, tmp_path, capsys):
    concept = Concept(torch.ones(1, 24), tiny_offsets(), tiny_backbone.name)
    concept.save(tmp_path / "concept.safetensors")
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(tmp_path / "concept.safetensors"), "--out", str(tmp_path / "out")])
    assert not exit_.value.code
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "load_lora_weights" in capsys.readouterr().out


def test_the_split_of_the_unseen_style():
    chosen = items(71, "fxemoji")
    assert [item.name for item in chosen] == unseen_names()
    assert {item.style for item in chosen} == {"fxemoji"}
    assert {item.scene for item in chosen} == {"white", "grass", "table"}
    others = chosen[5].others
    assert len(others) == 70 and chosen[5].name not in {item.name for item in others}
    assert {(item.style, item.scene) for item in others} == {("fxemoji", chosen[5].scene)}
    styles = [edit.style for edit in edits(chosen[5]) if edit.is_style]
    assert styles == ["noto", "twemoji", "fluent"]
    own = items(60, "test")[7]
    assert [item.name for item in own.others] == [n for n in split_names("test") if n != own.name]
    with pytest.raises(DTEError, match="use one of .*test, train, val, fxemoji"):
        items(2, "openmoji")
