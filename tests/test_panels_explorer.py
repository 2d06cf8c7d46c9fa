"""The explorer: settings, runs, history, and the panel driven through its widgets."""

import datetime
import io
import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from dte_lab.cli import explore
from dte_lab.common.errors import DTEError
from dte_lab.evaluation import base_model
from dte_lab.panels import explorer_history as history
from dte_lab.panels import explorer_measures, explorer_runs
from dte_lab.panels.explorer import explorer_panel
from dte_lab.panels.explorer_expeditions import expeditions
from dte_lab.panels.explorer_lanes import Stopped
from dte_lab.panels.explorer_measures import measured, scene_of, truth_of
from dte_lab.panels.explorer_runs import Explorer, Question, Subject, subjects
from dte_lab.panels.explorer_settings import (
    SWITCH_OF,
    ExplorerSetting,
    change_in_words,
    differences,
)
from dte_lab.panels.explorer_view import history_html, run_figure, run_html
from dte_lab.world import render_image

QUICK = {"num_inference_steps": 2, "batch_size": 2}
QUESTION = Question(Subject("bus", "fluent"), ("S* at night", "a picture of S* on the beach"))


@pytest.fixture
def explorer(random_pipe):
    return Explorer(random_pipe)


@pytest.fixture
def setting(random_pipe):
    return ExplorerSetting.of(random_pipe, steps=2, **QUICK)


@pytest.fixture
def panel(random_pipe, setting):
    """Its control, with quick settings: A tunes 2 steps, B none."""
    control = explorer_panel(random_pipe).control
    control.knobs.write(setting, replace(setting, steps=0))
    return control


def run(control):
    control.start()
    if control.thread is not None:
        control.thread.join()


def uploaded(name, data):
    """A file as the widget gives it."""
    when = datetime.datetime(2026, 1, 2)
    return {"name": name, "type": "", "size": len(data), "content": data, "last_modified": when}


def same_pixels(left, right):
    return np.array_equal(np.asarray(left), np.asarray(right))


def test_every_switch_is_a_field_and_the_usual_setting_is_the_pipelines(random_pipe):
    usual = ExplorerSetting.of(random_pipe)
    assert set(asdict(usual)) == set(SWITCH_OF)
    assert usual.method == random_pipe.encoder.method
    assert (
        usual.tuning.offset_learning_rate == random_pipe.backbone.recommended.offset_learning_rate
    )
    falling = replace(usual, alpha_end=0.1)
    assert falling.method.alpha_blend == (usual.alpha_start, 0.1)
    assert ExplorerSetting.read(json.loads(json.dumps(asdict(falling)))) == falling


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": -1}, "steps is a whole number"),
        ({"encoder": "other"}, "encoder is one of"),
        ({"alpha_end": 2.0}, "alpha_blend is a number"),
        ({"regulariser": "x"}, "regulariser is one of"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"part": "word", "prediction_interval": 1}, "draw with both"),
        ({"rank": 1, "trainable": "heads"}, "A cut rank"),
    ],
)
def test_a_setting_of_no_meaning_is_refused(random_pipe, wrong, said):
    with pytest.raises(DTEError, match=said):
        ExplorerSetting.of(random_pipe, **wrong)


def test_idle_switches_say_why(random_pipe, setting):
    assert not {"num_positives", "temperature", "granularity"} & set(setting.idle(random_pipe))
    untuned = replace(setting, steps=0).idle(random_pipe)
    assert {"num_positives", "temperature", "offset_learning_rate"} <= set(untuned)
    assert "alpha_start" not in untuned
    none = replace(setting, regulariser="none").idle(random_pipe)
    assert "does not read it" in none["temperature"]
    assert "granularity" in replace(setting, alpha_start=1.0, alpha_end=1.0).idle(random_pipe)
    assert "unconditional_offsets" in replace(setting, guidance_scale=1.0).idle(random_pipe)
    assert "rank" in replace(setting, prediction_interval=1).idle(random_pipe)


def test_what_is_said_to_be_idle_changes_no_pixel(explorer, random_pipe, setting):
    """And what is not, does: the guidance."""
    a = replace(setting, steps=0, part="word")
    others = {"num_positives": 9, "rank": 1, "offsets_on": "hard"}
    assert set(others) <= set(a.idle(random_pipe))
    b, c = replace(a, **others), replace(a, guidance_scale=4.0)
    first, second, third = explorer.compare(QUESTION, (a, b, c))
    assert same_pixels(first.pictures[0][0], second.pictures[0][0])
    assert not same_pixels(first.pictures[0][0], third.pictures[0][0])


def test_the_change_is_told_in_words(setting):
    other = replace(setting, part="word", steps=0)
    assert differences(setting, other) == [("part", "both", "word"), ("steps", 2, 0)]
    assert change_in_words(setting, other, ["steps"]) == (
        "B differs from A in 2 of 26 switches: what draws the word alone in place of word and "
        "weights; steps 0 in place of 2 (which changes nothing here)."
    )
    assert change_in_words(setting, setting) == "A and B are the same setting."


def test_one_run_of_tuning_holds_all_shorter_ones(explorer, random_pipe, setting, monkeypatch):
    subject, runs = QUESTION.subject, []
    real = random_pipe.personalize
    monkeypatch.setattr(random_pipe, "personalize", lambda *a, **k: runs.append(a) or real(*a, **k))
    ticks = []
    both = (replace(setting, steps=1), setting, replace(setting, steps=0))
    explorer.compare(QUESTION, both, ticks.append)
    assert len(runs) == 1
    assert ticks == sorted(ticks) and ticks[-1] == pytest.approx(1)
    for steps in (0, 1, 2):
        kept = explorer.learn(subject, replace(setting, steps=steps))
        alone = real(
            subject.picture.image, steps, config=setting.tuning, method=setting.method,
            progress=False,
        )  # fmt: skip
        assert torch.equal(kept.v_star, alone.v_star)
        assert all(torch.equal(kept.offsets[k][1], alone.offsets[k][1]) for k in kept.offsets)
        assert kept.info["words_after"] == alone.info["words_after"]
        assert kept.info["num_steps"] == steps
    assert len(runs) == 1
    explorer.learn(subject, replace(setting, offset_learning_rate=0.5))
    assert len(runs) == 2


def test_measures_are_what_they_say(explorer, setting):
    (found,) = explorer.compare(QUESTION, [replace(setting, steps=0)])
    measures, pipe = found.measures, explorer.pipe
    assert {"clip_input", "clip_prompt", "scene", "truth_error", "word_length"} <= set(measures)
    night = [[render_image("bus", "fluent", "night")]]
    assert measured(pipe, QUESTION.subject, ["S* at night"], night)["truth_error"] == pytest.approx(
        0, abs=1e-6
    )
    true = [[render_image("bus", "fluent", scene)] for scene in ("night", "beach")]
    assert measured(pipe, QUESTION.subject, QUESTION.prompts, true)["scene"] == 1
    assert measured(pipe, QUESTION.subject, QUESTION.prompts, true[::-1])["scene"] == 0
    given = [[QUESTION.subject.picture.image]]
    own = Subject.of_upload(given[0][0])
    of_own = measured(pipe, own, ["S* dancing"], given)
    assert set(of_own) == {"clip_input", "clip_prompt"}
    assert of_own["clip_input"] == pytest.approx(1, abs=1e-4)
    assert measures["word_length"] > 0 and pipe is explorer.pipe


def test_the_panel_warms_up_while_one_looks(random_pipe, monkeypatch):
    """What the first run would load is there when the thread has ended, and no run loads it."""
    for kept in (explorer_measures.outside_judge, base_model._border_means):
        kept.cache_clear()
    before = set(threading.enumerate())
    explorer_panel(random_pipe)
    for thread in set(threading.enumerate()) - before:
        thread.join()
    for kept in (explorer_measures.outside_judge, base_model._border_means):
        assert kept.cache_info().currsize == 1


def test_prompts_of_the_world_have_a_truth():
    assert scene_of("S* on a red background.") == "red" and scene_of("S* dancing") is None
    assert truth_of("bus", "noto", "a fluent picture of S* at night") == ("fluent", "night")
    assert truth_of("bus", "noto", "S* at night") == ("noto", "night")
    assert truth_of("bus", "noto", "two S* at night") is None
    assert truth_of("mine", None, "S* at night") is None


def test_part_alone_and_anew(explorer, setting):
    settings = [replace(setting, steps=0, part=part) for part in ("both", "word", "weights")]
    settings.append(replace(setting, steps=0, prediction_interval=1))
    pictures = [outcome.pictures[0][0] for outcome in explorer.compare(QUESTION, settings)]
    for i, one in enumerate(pictures):
        assert not any(same_pixels(one, other) for other in pictures[:i])


def test_a_wrong_sibling_leaves_the_other_answered(panel, setting):
    """The ablation belongs to the shipped model, so it does not fit this one."""
    panel.knobs.write(setting, replace(setting, encoder="small/none"))
    assert 'role="alert"' in panel.told.value
    run(panel)
    (only,) = panel.runs
    a, b = only.sides
    assert a.measures and not a.error and b.error and not b.measures
    assert panel.view.value.startswith("<img") and 'role="alert"' in panel.view.value
    assert "B: " in panel.view.value and "Traceback" not in panel.view.value
    figure = run_figure(
        QUESTION, panel.explorer.compare(QUESTION, [side.setting for side in only.sides])
    )
    assert [ax.get_title() for ax in figure.axes[:3]] == ["the input", "A", "the truth"]


def test_panel_answers_shows_and_remembers(panel):
    run(panel)
    assert panel.status.value == "<p>Done.</p>" and panel.bar.value == pytest.approx(1)
    assert panel.view.value.startswith('<img alt="bus, fluent, then drawn under A and B')
    assert "seconds to learn" in panel.view.value and "words nearest" in panel.view.value
    assert "steps 0 in place of 2" in panel.told.value
    assert panel.table.value.count("<tr>") == 2 and 'download="explorer.json"' in panel.link.value
    assert not panel.run.disabled and panel.stop.disabled


def test_knobs_rest_where_they_change_nothing(panel):
    assert [side["temperature"].disabled for side in panel.knobs.sides] == [False, True]
    assert "B: nothing is tuned in 0 steps" in panel.knobs.labels["temperature"][1].value
    assert "≠" in panel.knobs.labels["steps"][0].value
    panel.knobs.sides[1]["steps"].value = 2
    assert not panel.knobs.sides[1]["temperature"].disabled
    assert "≠" not in panel.knobs.labels["steps"][0].value


def test_stop_ends_the_run_and_keeps_what_was_shown(panel, monkeypatch):
    run(panel)
    before = panel.view.value
    real, seen = panel._tick, []

    def tick(done):
        seen.append(done)
        panel.halt()  # as the button, while it runs
        real(done)

    monkeypatch.setattr(panel, "_tick", tick)
    panel.seeds.value = "5"
    run(panel)
    assert len(seen) == 1 and panel.status.value.startswith("<p>Stopped")
    assert panel.view.value == before and len(panel.runs) == 1
    assert not panel.run.disabled and panel.stop.disabled
    monkeypatch.undo()
    run(panel)
    assert len(panel.runs) == 2


def test_stopping_in_tuning_keeps_no_half_run(explorer, setting):
    def tick(done):
        raise Stopped

    with pytest.raises(Stopped):
        explorer.compare(QUESTION, [setting], tick)
    assert not explorer.kept


@pytest.mark.parametrize(
    ("prompts", "seeds", "said"),
    [
        ("a bus", "0", "does not contain S*"),
        ("", "0", "prompts are one or more"),
        ("S* at night", "zero", "Seeds are whole numbers"),
        ("S* at night", " ".join(map(str, range(20))), "at most 16"),
    ],
)
def test_a_wrong_question_is_answered_in_the_panel(panel, prompts, seeds, said):
    panel.prompts.value, panel.seeds.value = prompts, seeds
    run(panel)
    assert 'role="alert"' in panel.status.value and said in panel.status.value
    assert not panel.runs and not panel.run.disabled


def test_a_fault_of_the_program_is_said_too(panel, monkeypatch):
    def broken(*arguments):
        raise KeyError("<b>")

    monkeypatch.setattr(panel.explorer, "compare", broken)
    run(panel)
    assert "KeyError" in panel.status.value and "&lt;b&gt;" in panel.status.value


def test_own_picture(panel, setting):
    buffer = io.BytesIO()
    render_image("house", "noto", "white").save(buffer, "png")
    panel.picture.value = None
    run(panel)
    assert "Upload a picture" in panel.status.value
    panel.upload.value = (uploaded("x.png", b"no picture"),)
    assert "x.png is not a picture" in panel.status.value
    panel.upload.value = (uploaded("y.png", buffer.getvalue()),)
    assert panel.picture.value is None and panel.own.digest
    panel.prompts.value = "S* dancing"
    run(panel)
    assert panel.view.value.startswith('<img alt="your picture')
    read = history.Run.read(json.loads(json.dumps(panel.runs[0].as_json())))
    assert read.question.subject == panel.own  # by its digest: the pixels stay here
    panel.own = None
    panel.take_up(read.question, setting, setting)
    run(panel)
    assert "not in the history" in panel.view.value or "not in the history" in panel.status.value


def test_history_survives_its_file(panel, tmp_path):
    run(panel)
    path = tmp_path / "explorer.json"
    history.save_history(panel.runs, path)
    assert path.stat().st_size < 20_000
    (back,) = history.load_history(path)
    assert back.as_json() == json.loads(json.dumps(panel.runs[0].as_json()))
    assert history_html([back]) == history_html(panel.runs)
    assert run_html(back) == run_html(panel.runs[0])
    fresh = explorer_panel(panel.explorer.pipe).control
    fresh.load.value = (uploaded("explorer.json", path.read_bytes()),)
    assert fresh.runs == [back]
    fresh.again.value = 0
    fresh.take.click()
    assert fresh.knobs.read() == tuple(side.setting for side in panel.runs[0].sides)
    assert fresh.question() == panel.runs[0].question


def damaged(document, where, value):
    *path, last = where
    part = document
    for key in path:
        part = part[key]
    part[last] = value
    return document


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), "other"),
        (("runs",), {}),
        (("runs", 0), []),
        (("runs", 0, "sides"), []),
        (("runs", 0, "seeds"), ["0"]),
        (("runs", 0, "prompts"), ["no placeholder"]),
        (("runs", 0, "picture", "name"), "no such thing"),
        (("runs", 0, "picture"), None),
        (("runs", 0, "sides", 0, "setting", "steps"), 10**9),
        (("runs", 0, "sides", 0, "setting", "steps"), "<script>"),
        (("runs", 0, "sides", 0, "measures", "clip_input"), "<script>"),
        (("runs", 0, "sides", 0, "measures"), {"<script>": 1}),
        (("runs", 0, "sides", 0, "words_after"), [["word"]]),
        (("runs", 0, "where"), 3),
    ],
)
def test_a_damaged_history_is_one_sentence(panel, setting, where, value):
    side = history.Side(setting, {"clip_input": 0.5}, [("bus", 0.5)], [("bus", 0.4)])
    text = history.dumped([history.Run(QUESTION, (side, side))])
    data = json.dumps(damaged(json.loads(text), where, value)).encode()
    with pytest.raises(DTEError, match="is no readable history") as told:
        history.load_history(data)
    assert "\n" not in str(told.value)
    panel.load.value = (uploaded("h.json", data),)
    assert 'role="alert"' in panel.status.value and "<script>" not in panel.status.value
    assert not panel.runs


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"[]", b"{}"])
def test_what_is_no_history_is_one_sentence(data, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DTEError, match="x.json is no readable history"):
        history.load_history(path)
    with pytest.raises(DTEError, match="does not exist"):
        history.load_history(tmp_path / "none.json")


def test_three_expeditions_lead_somewhere(panel, setting):
    found = expeditions()
    assert len(found) == 3
    known = subjects()
    assert len(known) == 36 and len(set(known)) == 36
    splits = {s.label.endswith("(trained on)") for s in known}
    assert splits == {True, False}
    for button, stop in zip(panel.trips, (s for e in found for s in e.stops), strict=True):
        assert stop.question.subject in known
        a, b = stop.settings(panel.usual)
        assert differences(a, b)
        idle = a.idle(panel.explorer.pipe), b.idle(panel.explorer.pipe)
        alive = [
            name for name, _, _ in differences(a, b) if not (name in idle[0] and name in idle[1])
        ]
        assert alive, "a stop must compare what can differ"
        button.click()
        assert panel.question() == stop.question and panel.knobs.read() == (a, b)


def test_a_run_knows_its_stop(panel, setting):
    stop = expeditions()[0].stops[0]
    panel.usual = setting
    panel.go_to(stop)
    run(panel)
    panel.seeds.value = "3"
    run(panel)
    assert [r.where for r in panel.runs] == [stop.title, ""]


def test_few_runs_are_kept(explorer, setting, monkeypatch):
    monkeypatch.setattr(explorer_runs, "KEPT_RUNS", 1)
    for seed in (0, 1):
        explorer.learn(QUESTION.subject, replace(setting, steps=0, seed=seed))
    ((_, learning),) = explorer.kept
    assert learning == replace(setting, seed=1).learning


def test_the_picture_of_a_run_is_labelled(explorer, setting):
    question = replace(QUESTION, prompts=("S* dancing", "S* at night"), seeds=(0, 4))
    outcomes = explorer.compare(question, [replace(setting, steps=0)] * 2)
    figure = run_figure(question, outcomes)
    assert [ax.get_title() for ax in figure.axes[:4]] == ["the input", "A", "B", "the truth"]
    assert len(figure.axes) == 16
    shown = figure.axes[3 * 4 + 2].get_images()[0].get_array()
    assert np.array_equal(shown, np.asarray(outcomes[1].pictures[1][1]))
    white = figure.axes[3].get_images()[0].get_array()
    assert (np.asarray(white) == 255).all(), "nobody knows how S* dances"
    assert isinstance(outcomes[0].pictures[0][0], Image.Image)


def test_the_app_is_a_notebook_of_the_panel(small_world_path, monkeypatch, tmp_path):
    monkeypatch.chdir(small_world_path.parent)
    text = explore.app_notebook(small_world_path.name, "small/none", "cpu")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    (cell,) = notebook.cells
    compile(cell.source, "cell", "exec")
    assert repr(str(small_world_path.resolve())) in cell.source and "'small/none'" in cell.source


def test_without_voila_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(explore, "find_spec", lambda name: None)
    with pytest.raises(DTEError, match=r'pip install "dte_lab\[explore\]"'):
        explore.explore(device="cpu")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"backbone": "nowhere"}, "nowhere"),
        ({"encoder": "small/unknown"}, "no encoder at small/unknown"),
        ({"encoder": ""}, "no encoder at"),
        ({"device": "gpu"}, "gpu"),
    ],
)
def test_what_cannot_be_explored_opens_no_page(asked, said, monkeypatch):
    monkeypatch.setattr(explore, "find_spec", lambda name: object())
    monkeypatch.setattr(explore.subprocess, "run", lambda command: pytest.fail("it was started"))
    with pytest.raises(DTEError, match=said):
        explore.explore(**{"device": "cpu"} | asked)


def test_the_command_starts_voila_and_leaves_nothing(monkeypatch):
    calls = []

    def run(command):
        calls.append((command, Path(command[3]).is_file()))
        return SimpleNamespace(returncode=len(calls) - 1)

    monkeypatch.setattr(explore.subprocess, "run", run)
    monkeypatch.setattr(explore, "find_spec", lambda name: name)
    explore.explore(device="cpu", port=9001, no_browser=True)
    ((command, was_there),) = calls
    assert command[1:3] == ["-m", "voila"] and command[4:] == ["--port=9001", "--no-browser"]
    assert was_there and not Path(command[3]).exists()
    with pytest.raises(DTEError, match="status 1"):
        explore.explore(device="cpu")
    with pytest.raises(DTEError, match="port is a whole number"):
        explore.explore(device="cpu", port=0)
