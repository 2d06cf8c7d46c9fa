"""Experiment 2 draws each setting from one tuning, measures it, and goes on where it stopped."""

import json

import numpy as np
import pytest

from dte_lab import DTEPipeline
from dte_lab.evaluation import blending
from dte_lab.evaluation.blending import Blend
from dte_lab.evaluation.edits import Item, items
from dte_lab.evaluation.trials import Sampling

FEW = [Blend("soft", "attention", 0), Blend("soft", "block", 0.5), Blend("hard", "attention", 1)]


class FakeMeasures:
    """Stands in for the judges, which want 64-pixel pictures."""

    def __init__(self, backbone):
        pass

    def pictures(self, drawn, item, asked):
        assert drawn.shape[:2] == (len(asked), 2)
        mean = drawn.mean((1, 2, 3, 4)).tolist()
        return [dict.fromkeys(blending.MEASURED, value) for value in mean]


@pytest.fixture
def experiment(tiny_backbone, tiny_encoder, tiny_pixels, monkeypatch):
    monkeypatch.setattr(blending, "Measures", FakeMeasures)
    monkeypatch.setattr(blending, "BLENDS", FEW)
    monkeypatch.setattr(Item, "picture", lambda self: tiny_pixels[len(self.name) % 3][None])
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)

    def run(out, count=2):
        return blending.blending(
            out, pipe, count, num_steps=1, scenes=("beach",), progress=False,
            sampling=Sampling(2, num_inference_steps=1),
        )  # fmt: skip

    return run


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(experiment, tmp_path, monkeypatch):
    whole = experiment(tmp_path / "whole.json")
    assert len(whole["rows"]) == 2 * (1 + len(blending.BLENDS))
    assert whole["versions"]["torch"] and whole["settings"]["concepts"] == 2
    assert {line["identity"]["n"] for line in whole["means"]} == {2}

    concept_rows, calls = blending.concept_rows, []

    def cut_off(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return concept_rows(*arguments)

    monkeypatch.setattr(blending, "concept_rows", cut_off)
    out = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        experiment(out)
    assert {line["identity"]["n"] for line in json.loads(out.read_text())["means"]} == {1}
    parts = experiment(out)
    assert len(calls) == 3 and parts["rows"] == whole["rows"] and parts["means"] == whole["means"]
    with pytest.raises(ValueError, match="other settings.*concepts"):
        experiment(out, count=3)


def test_settings_differ_in_sampling_alone(experiment, tmp_path, monkeypatch):
    tuned, drawn, shown = [], [], []
    personalize, generate = DTEPipeline.personalize, DTEPipeline.generate

    def note_tuning(self, *arguments, **options):
        tuned.append(personalize(self, *arguments, **options))
        return tuned[-1]

    def note_drawing(self, concept, *arguments, **options):
        config = concept.config
        drawn.append((concept.v_star, config.offsets_on, config.granularity, config.alpha_blend))
        pictures = generate(self, concept, *arguments, **options)
        shown.append(np.mean([np.asarray(p) / 127.5 - 1 for row in pictures for p in row]))
        return pictures

    monkeypatch.setattr(DTEPipeline, "personalize", note_tuning)
    monkeypatch.setattr(DTEPipeline, "generate", note_drawing)
    rows = experiment(tmp_path / "run.json")["rows"]
    assert len(tuned) == 2 and len(drawn) == 2 * len(blending.BLENDS)
    assert [call[1:] for call in drawn] == 2 * blending.BLENDS
    assert all(call[0] is tuned[0].v_star for call in drawn[: len(blending.BLENDS)])
    assert rows[1]["hard_word"] == tuned[0].nearest_words[0][0]
    values = [row["identity"] for row in rows[1 : 1 + len(FEW)]]
    assert len(set(values)) == len(FEW), "the settings must draw different pictures"
    assert values == pytest.approx([float(f"{x:.5g}") for x in shown[: len(FEW)]], abs=1e-4)
    assert [row["concept"] for row in rows] == 4 * [items(2, "val")[0].name] + 4 * [
        items(2, "val")[1].name
    ]


def test_identity_is_scaled_by_the_truth():
    def row(concept, setting, margin):
        measures = dict.fromkeys(blending.MEASURED, 0.5) | {"identity_margin": margin}
        return {"concept": concept} | Blend(*setting)._asdict() | measures

    true, soft = (None, None, None), ("soft", "attention", 1)
    rows = [row("cat", true, 0.4), row("cat", soft, 0.3), row("dog", true, 0.6),
            row("dog", soft, -0.1)]  # fmt: skip
    table = blending.by_setting(rows)
    assert list(table) == [soft]
    assert np.allclose(table[soft]["identity_scaled"], [0.6, -0.2])
    (line,) = blending.means(rows)
    assert line["alpha_blend"] == 1 and line["identity_scaled"]["mean"] == pytest.approx(0.2)
    assert line["identity_scaled"]["low"] == pytest.approx(-0.2)
