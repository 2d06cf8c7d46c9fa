"""The stored results: what is up to date, what a command makes of it, and what is concluded."""

import errno
import json
import os
import subprocess

import numpy as np
import pytest

from dte_lab.baselines import BaselineConfig
from dte_lab.common import files
from dte_lab.common.errors import DTEError
from dte_lab.evaluation.conclusions import CONCLUSIONS, Conclusion
from dte_lab.evaluation.records import Row, to_csv
from dte_lab.evaluation.specifications import parse
from tools import results, results_tables


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Results, runs and weights of a test's own."""
    weights = tmp_path / "weights" / "small"
    for part in ("unet", "encoder"):
        (weights / part).mkdir(parents=True)
        (weights / part / "x.safetensors").write_bytes(part.encode())
    monkeypatch.setattr(results, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "MADE", tmp_path / "results" / "made.json")
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    (tmp_path / "results").mkdir()
    made = {
        "one": results.evaluation("--experiment", "table"),
        "two": results.document("a.module", "--wide", "WIDE", keeps=("two.json",), reads=("unet",)),
    }
    monkeypatch.setattr(results, "RESULT", made)
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """Commands write the files that they are asked for, and are kept."""
    seen = []

    def run(command, cwd):
        seen.append(command)
        out = results.Path(command[command.index("--out") + 1])
        names = results.FOLDER if not out.suffix else (out.name,)
        for name in names:
            (out / name if not out.suffix else out).write_text(name)
        return subprocess.CompletedProcess(command, run.code)

    run.code = 0
    monkeypatch.setattr(results.subprocess, "run", run)
    monkeypatch.setattr(results, "usable_cores", lambda: 3)
    return seen, run


def test_a_result_is_made_stored_and_then_up_to_date(places, commands, capsys):
    seen, _ = commands
    assert results.main(["make"]) == 0  # not "two", which needs the wide world
    (command,) = seen
    out = places / "runs" / f"one-{results.RESULT['one'].digest()}"
    assert command[1:] == [
        "-m", "dte_lab", "evaluate", "--out", str(out), "--processes", "3", "--experiment", "table",
    ]  # fmt: skip
    stored = sorted(path.name for path in (places / "results" / "one").iterdir())
    assert stored == sorted(results.FOLDER)
    assert json.loads(results.MADE.read_text())["one"]["processes"] == 3
    results.main(["make"])
    assert len(seen) == 1
    capsys.readouterr()
    results.main([])
    first, second = capsys.readouterr().out.splitlines()
    assert "up to date" in first and "to be made" in second


def test_other_weights_or_another_command_make_it_old(places, commands, monkeypatch):
    results.main(["make", "one"])
    assert results.is_current("one")
    (places / "weights" / "small" / "encoder" / "x.safetensors").write_bytes(b"other")
    assert not results.is_current("one")
    results.main(["make", "one"])
    changed = results.evaluation("--experiment", "long")
    monkeypatch.setitem(results.RESULT, "one", changed)
    assert not results.is_current("one")
    before = results.RESULT["two"].digest()
    (places / "weights" / "small" / "encoder" / "x.safetensors").write_bytes(b"third")
    assert results.RESULT["two"].digest() == before, "it reads the unet alone"


def test_other_settings_of_the_methods_make_it_old(places, commands, monkeypatch):
    """What measures the base model alone does not read them."""
    monkeypatch.setitem(results.RESULT, "base", results.evaluation(reads=results.BASE))
    before = {name: result.digest() for name, result in results.RESULT.items()}
    usual = (*results.USUAL[:-1], BaselineConfig(lora_learning_rate=0.123))
    monkeypatch.setattr(results, "USUAL", usual)
    changed = {name for name, was in before.items() if results.RESULT[name].digest() != was}
    assert changed == {"one", "two"}


ENTRY = {"digest": "ab", "minutes": 1.5, "processes": 2}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "holds digest, minutes and processes"),
        (ENTRY | {"more": 1}, "holds digest, minutes and processes"),
        (ENTRY | {"digest": 3}, "digest is a text"),
        (ENTRY | {"minutes": "1"}, "minutes is a number"),
        (ENTRY | {"minutes": float("nan")}, "minutes is a number"),
        (ENTRY | {"minutes": 10**400}, "minutes is a number"),
        (ENTRY | {"processes": 0}, "processes is a whole number"),
    ],
)
def test_a_damaged_entry_is_named(places, commands, entry, said):
    text = json.dumps({"one": ENTRY, "two": entry})
    results.MADE.write_text(text)
    for arguments in ([], ["make", "one"]):
        with pytest.raises(DTEError, match=rf"made\.json: 'two' is damaged \(.*{said}.*bring it"):
            results.main(arguments)
    assert results.MADE.read_text() == text


@pytest.mark.parametrize(
    "fault", [b"", b"[]", b"{", b"[" * 10**5, b"\xff", "folder", "link", "pipe"]
)
def test_what_is_no_record_of_results_is_named(places, fault):
    if isinstance(fault, bytes):
        results.MADE.write_bytes(fault)
    elif fault == "link":
        results.MADE.symlink_to("nowhere")
    else:
        results.MADE.mkdir() if fault == "folder" else os.mkfifo(results.MADE)
    with pytest.raises(DTEError, match=r"made\.json .*bring it back as it was\.$"):
        results.main([])


def test_a_full_disk_leaves_the_stored_result(places, commands, monkeypatch):
    results.main(["make", "one"])
    before = {p: p.read_bytes() for p in (places / "results").rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (places / "weights" / "small" / "encoder" / "x.safetensors").write_bytes(b"other")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        results.main(["make", "one"])
    assert caught.value.filename == str(places / "results" / "one" / "measures.csv")
    assert {p: p.read_bytes() for p in (places / "results").rglob("*") if p.is_file()} == before


def test_a_file_is_stored_under_its_own_name(places, commands):
    results.main(["make", "two", "--wide", "cache"])
    seen, _ = commands
    assert seen[0][-2:] == ["--wide", "cache"]
    assert (places / "results" / "two.json").read_text() == "two.json"


def test_what_fails_is_said_and_stores_nothing(places, commands, capsys):
    _, run = commands
    run.code = 1
    with pytest.raises(DTEError, match="goes on with"):
        results.main(["make", "one"])
    assert not results.MADE.exists() and not (places / "results" / "one").exists()
    with pytest.raises(DTEError, match="--wide"):
        results.main(["make", "two"])
    with pytest.raises(SystemExit):
        results.main(["make", "three"])
    assert "no result 'three'" in capsys.readouterr().err


def test_commands_of_all_results_can_be_read():
    for result in results.RESULT.values():
        arguments = result.arguments
        for k, word in enumerate(arguments):
            if word == "--method":
                parse(arguments[k + 1])
        assert all((results.WEIGHTS / "small" / part).is_dir() for part in result.reads)


def stored(folder, values):
    """A table of two methods on things a, b, ...: `scene` is given, identity alike."""
    rows = []
    for (method, steps), scenes in values.items():
        for name, scene in zip("abcdefgh", scenes, strict=False):
            rows.append(Row(
                method=method, steps=steps, concept=name, group="g", input_style="s",
                input_scene="white", edit="beach", is_style=False, scene=scene,
                identity_margin=0.5, identity=0.5, clip_i_small=0.1, clip_t_small=0.1,
            ))  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "measures.csv").write_bytes(to_csv(rows))


def test_conclusions_hold_where_the_interval_says_so(tmp_path):
    a = [0.9, 0.8, 0.9, 0.7, 0.9, 0.8]
    b = [0.5, 0.5, 0.6, 0.4, 0.6, 0.3]
    stored(tmp_path / "run", {("dte", 12): a, ("ti", 12): b, ("oracle", 0): [1.0] * 6})

    def conclusion(one, other, said):
        text = "{one} against {other}: {difference}"
        return Conclusion(text, "run", one, other, said, measure="scene")

    held = conclusion("dte:12", "ti:12", "ahead")
    found = held.numbers(tmp_path)
    assert found["difference"]["mean"] == pytest.approx(np.mean(a) - np.mean(b))
    assert held.holds(tmp_path)
    assert held.sentence(tmp_path).startswith(f"{np.mean(a):.3f} against {np.mean(b):.3f}: 0.350 [")
    assert not conclusion("dte:12", "ti:12", "level").holds(tmp_path)
    assert conclusion("ti:12", "dte:12", "behind").holds(tmp_path)
    assert conclusion("oracle", "dte:12", "ahead").holds(tmp_path)
    mixed = [0.9, 0.2, 0.9, 0.2, 0.9, 0.4]
    stored(tmp_path / "run", {("dte", 12): b, ("ti", 12): mixed, ("oracle", 0): [1.0] * 6})
    assert conclusion("dte:12", "ti:12", "level").holds(tmp_path), "the table was read anew"
    with pytest.raises(DTEError, match="has no dte:50"):
        conclusion("dte:50", "ti:12", "ahead").holds(tmp_path)


@pytest.mark.parametrize("conclusion", CONCLUSIONS, ids=lambda c: f"{c.one} {c.said} {c.other}")
def test_the_readme_says_what_the_tables_say(conclusion):
    assert conclusion.holds(results.RESULTS)
    sentence = conclusion.sentence(results.RESULTS)
    assert sentence in " ".join((results.ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("page, line", [
    ("README.md", "| prediction |"), ("dte_lab/weights/small/README.md", "| CLIP, style |"),
])  # fmt: skip
def test_pages_have_the_numbers_of_the_stored_results(page, line):
    text = (results.ROOT / page).read_text()
    assert results_tables.written(page, text, results.RESULTS) == text
    damaged = text.replace(line, f"{line} 9", 1)
    assert damaged != text and results_tables.written(page, damaged, results.RESULTS) == text
