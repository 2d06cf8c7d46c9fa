"""Experiment 1 measures what it says, goes on where it stopped, and pairs by concept."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import DTEPipeline
from dte_lab.evaluation import regularisation as experiment
from dte_lab.evaluation import v_star_paths
from dte_lab.tuning import TuneConfig


class Letters:
    """A judge that knows only which letters a text has."""

    def embed(self, texts):
        rows = [[float(text.count(chr(c))) for c in range(97, 123)] for text in texts]
        return F.normalize(torch.tensor(rows) + 0.01, dim=-1)


SWEEP = {"num_positives": (1, 3), "temperature": (0.1,), "contrastive_weight": (0, 1)}


def run(pipe, out, **options):
    return experiment.regularisation(
        out, pipe, 2, watched=1, long=3, tuning=TuneConfig(num_steps=2, batch_size=2),
        judge=Letters(), progress=False, **options,
    )  # fmt: skip


@pytest.fixture
def pipe(tiny_backbone, tiny_encoder, monkeypatch):
    monkeypatch.setattr(experiment, "SWEEP", SWEEP)
    monkeypatch.setattr(tiny_encoder.method, "norm_free", 0.0)  # its v* is shorter than a word
    return DTEPipeline(tiny_backbone, tiny_encoder)


def test_rows_measure_the_tuned_words(pipe, tmp_path):
    document = run(pipe, tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(document))
    rows = document["rows"]
    assert [(row["regulariser"], row["steps"]) for row in rows[:4]] == [
        ("contrastive", 0), ("contrastive", 2), ("none", 0), ("none", 2),
    ]  # fmt: skip
    before, tuned, also_before, free = rows[:4]
    assert {k: v for k, v in before.items() if k != "regulariser"} == {
        k: v for k, v in also_before.items() if k != "regulariser"
    }
    assert tuned["nearest_cosine"] != free["nearest_cosine"] and before["words_kept"] == 1
    judge, table = Letters(), pipe.prompt_encoder.table
    for row in rows:
        name, *words = judge.embed([row["concept"], *row["words"]])
        assert row["word_similarity"] == pytest.approx(
            (torch.stack(words) @ name).mean().item(), rel=1e-4
        )
        assert set(row["words"]) <= set(table.words) and row["diffusion"] > 0

    # One weight of 0, where N does not matter, and N = 1 and 3 at the weight 1.
    assert len(document["sweep"]) == 3
    paths = v_star_paths.read_paths(tmp_path / "e.safetensors")
    assert set(paths) == {f"tuning.{kind}.strawberry" for kind in experiment.COMPARED}
    (steps, with_term), (_, without) = paths.values()
    assert steps == [0, 1, 2, 3] and with_term.shape == (4, 24)
    torch.testing.assert_close(with_term[0], without[0])
    assert not torch.allclose(with_term[-1], without[-1], atol=1e-4)


def test_summary_pairs_by_concept():
    def row(concept, kind, steps, value):
        measures = dict.fromkeys(experiment.TUNED_MEASURES, value)
        names = {"concept": concept, "start": "shipped", "regulariser": kind, "steps": steps}
        return names | measures

    rows = [
        row(concept, kind, steps, base + (kind == "contrastive") * gain * steps)
        for concept, base, gain in (("cat", 1.0, 0.25), ("dog", 5.0, 0.75))
        for kind in experiment.COMPARED
        for steps in (0, 2)
    ]
    result = experiment.summary(rows)
    before, after = result["differences"]
    assert before["norm"]["mean"] == before["norm"]["high"] == 0
    norm = after["norm"]
    assert (norm["mean"], norm["low"], norm["high"], norm["n"]) == (1.0, 0.5, 1.5, 2)
    assert [line["norm"]["mean"] for line in result["means"]] == [3, 3, 4, 3]
    assert np.array_equal(experiment.values(rows, "norm", "shipped", "none", True), [1, 5])


def test_goes_on_where_it_stopped(pipe, tmp_path, monkeypatch):
    whole = run(pipe, tmp_path / "whole.json")
    measured = experiment.Experiment.concept_rows

    def stop_at_second(self, item):
        if (tmp_path / "pieces.json").is_file():
            raise KeyboardInterrupt
        return measured(self, item)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Experiment, "concept_rows", stop_at_second)
        run(pipe, tmp_path / "pieces.json")
    assert len(json.loads((tmp_path / "pieces.json").read_text())["rows"]) == 4
    assert run(pipe, tmp_path / "pieces.json") == whole
    with pytest.raises(ValueError, match="seed"):
        run(pipe, tmp_path / "pieces.json", seed=1)


def test_runs_of_pretraining_start_each_regulariser_with_its_own_encoder(
    pipe, tiny_backbone, tiny_config, tmp_path
):
    from dte_lab import TuningEncoder

    runs = {}
    for seed, kind in enumerate(experiment.COMPARED):
        runs[kind] = tmp_path / kind
        encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config, seed=seed)
        for parameter in encoder.token_head.parameters():  # its last layer starts at 0
            torch.nn.init.constant_(parameter, 0.1 + seed)
        encoder.save_pretrained(runs[kind] / "encoder")
        lines = [{"step": 20 * i, "v_star": [[i] * 24] * 4} for i in range(100)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (runs[kind] / "predictions.jsonl").write_text(text)
    document = run(pipe, tmp_path / "e.json", runs=runs)
    own = [row for row in document["rows"] if row["start"] == "own"]
    assert [row["regulariser"] for row in own[:4]] == ["contrastive"] * 2 + ["none"] * 2
    assert own[0]["norm"] != own[2]["norm"], "before tuning they differ already"
    starts = [(line["start"], line["after"]) for line in document["differences"]]
    assert starts == [("shipped", False), ("shipped", True), ("own", False), ("own", True)]
    paths = v_star_paths.read_paths(tmp_path / "e.safetensors")
    steps, v_star = paths["pretraining.none.cupcake"]
    assert len(steps) == v_star_paths.MOST_POINTS and steps[0] == 0 and steps[-1] == 1980
    assert v_star[:, 0].tolist() == [s / 20 for s in steps]

    alone = run(pipe, tmp_path / "alone.json")
    added = run(pipe, tmp_path / "alone.json", runs={"none": runs["none"]})
    assert added == alone, "one run brings its path only"
    paths = v_star_paths.read_paths(tmp_path / "alone.safetensors")
    assert {key.split(".")[0] for key in paths} == {"tuning", "pretraining"}
