"""Whatever stands in a history of the explorer, it is read whole or told in one sentence."""

import copy
import io
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_damage import JSON, bounded, in_one_sentence

from dte_lab.common.errors import DTEError
from dte_lab.panels import explorer_history as history
from dte_lab.panels.explorer_runs import Question, Subject
from dte_lab.panels.explorer_settings import ExplorerSetting
from dte_lab.panels.explorer_view import history_html, run_html

HOSTILE = st.sampled_from(
    [10**400, -(10**30), 10**308, math.nan, -math.inf, 1e308, True, "\ud800", "S*" * 999, "<b>"]
    + [[[[[]]]], {"a": {}}, [["bus", 0.5, 1]], "ab", ["ab"], {"S* at night": 1}]
)


def two_runs():
    """The document of a history with two runs, of a thing of the world and of an upload."""
    side = history.Side(ExplorerSetting(), {"clip_input": 0.5, "seconds": 2}, [["bus", 0.5]], [])
    failed = history.Side(ExplorerSetting(steps=0), error="no such encoder")
    runs = [
        history.Run(Question(subject, ("S* at night", "S*"), (0, 7)), (side, failed), "a stop")
        for subject in (Subject("bus", "fluent"), Subject("your picture", digest="ab"))
    ]
    return json.loads(history.dumped(runs))


def places(part, path=()):
    """The paths of everything in a document."""
    yield path
    if isinstance(part, dict | list):
        for key in part if isinstance(part, dict) else range(len(part)):
            yield from places(part[key], (*path, key))


def loaded(data, name="h.json"):
    """The runs, which can be shown and saved; or None, after one sentence."""
    runs = in_one_sentence(lambda: history.load_history([{"name": name, "content": data}]), name)
    if runs is not None:
        assert "<b>" not in history_html(runs) + "".join(map(run_html, runs))
        assert history.load_history(history.dumped(runs).encode()) == runs
    return runs


@bounded(300)
@given(data=st.data())
def test_any_history(data):
    document = two_runs()
    *path, last = data.draw(st.sampled_from([p for p in places(document) if p]))
    part = document
    for key in path:
        part = part[key]
    before, fault = copy.deepcopy(part), data.draw(st.sampled_from(["gone", "odd", "other"]))
    if fault == "gone":
        del part[last]
    elif fault == "odd" and isinstance(part, dict):
        part[data.draw(st.text(max_size=4))] = part[last]
    else:
        part[last] = data.draw(HOSTILE | JSON)
    runs = loaded(json.dumps(document).encode())
    assert runs is not None or part != before


@pytest.mark.parametrize("kept", [1, 200, 2000, -1])
def test_half_a_history_is_none(kept):
    whole = json.dumps(two_runs()).encode()
    assert loaded(whole[:kept]) is None and loaded(whole[:kept] + b"\xff") is None
    assert len(loaded(whole)) == 2


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("runs", 1, "seeds", 0), "0", "run 2: seed is a whole number"),
        (("runs", 1, "sides", 1, "error"), 3, "run 2: B: error is a text"),
        (("runs", 0, "sides", 0, "measures", "seconds"), 10**400, "run 1: A: seconds is a number"),
        (("runs", 0, "sides", 0, "setting", "batch_size"), 65, "run 1: A: batch_size is a number"),
        (("runs", 0, "picture", "more"), 1, "run 1: picture holds name, style, digest, and"),
        (("runs", 0, "prompts"), {"S*": 1}, "run 1: prompts: a list is needed"),
    ],
)
def test_the_sentence_names_the_part(where, value, said):
    document = part = two_runs()
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(DTEError, match=rf"^h\.json is no readable history .*\({said}"):
        history.load_history({"h.json": json.dumps(document).encode()})


@pytest.mark.parametrize("what", ["folder", "circle", "pipe", "endless", "large", "\0", "\udcff"])
def test_a_path_to_no_history(what, tmp_path):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what == "circle":
        path.symlink_to(path)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "endless":
        path.symlink_to("/dev/zero")
    elif what == "large":
        path.write_bytes(b" " * (history.MOST_BYTES + 1))
    assert in_one_sentence(lambda: history.load_history(path), tmp_path) is None


@pytest.mark.parametrize("source", [None, 10**12, (), [b"{}", b"{}"], Image.new("L", (2, 2)), {}])
def test_what_is_no_file_is_one_sentence(source):
    assert in_one_sentence(lambda: history.load_history(source)) is None


def test_a_file_that_is_open_is_read():
    assert len(history.load_history(io.BytesIO(json.dumps(two_runs()).encode()))) == 2
