"""The explorer's two lanes: answers as of one, in threads that share weights and no module."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dte_lab.common.errors import DTEError
from dte_lab.panels import explorer_lanes, explorer_runs
from dte_lab.panels.explorer_lanes import Progress, Stopped, lanes_for, side_by_side, twin
from dte_lab.panels.explorer_runs import Explorer, Question, Subject
from dte_lab.panels.explorer_settings import ExplorerSetting

QUESTION = Question(Subject("bus", "fluent"), ("S* at night", "a picture of S* on the beach"))


@pytest.fixture
def pair(random_pipe):
    """Two settings that learn otherwise, block the other's text and draw otherwise."""
    quick = {"num_inference_steps": 3, "batch_size": 2, "steps": 2}
    a = ExplorerSetting.of(random_pipe, alpha_start=0.3, alpha_end=0.3, **quick)
    return a, replace(a, offset_learning_rate=0.1, granularity="block", guidance_scale=4.0)


def test_two_lanes_answer_as_one(random_pipe, pair, monkeypatch):
    found = {}
    for lanes in (1, 2):
        monkeypatch.setattr(explorer_runs, "lanes_for", lambda pipe, lanes=lanes: lanes)
        explorer = Explorer(random_pipe)
        found[lanes] = explorer.compare(QUESTION, pair)
        assert bool(explorer.twins) == (lanes == 2)
    for one, two in zip(found[1], found[2], strict=True):
        assert one.words_after == two.words_after and one.measures == pytest.approx(two.measures)
        for row, other in zip(one.pictures, two.pictures, strict=True):
            np.testing.assert_array_equal(np.stack(row), np.stack(other))
    assert not np.array_equal(*(np.stack(answer.pictures[0]) for answer in found[2]))


def test_a_twin_has_the_same_weights_and_modules_of_its_own(random_pipe):
    other = twin(random_pipe)
    for left, right in (
        (random_pipe.backbone.unet, other.backbone.unet),
        (random_pipe.encoder, other.encoder),
    ):
        ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
        assert ours.keys() == theirs.keys() and all(ours[k] is theirs[k] for k in ours)
        assert not set(left.modules()) & set(right.modules())
    assert other.prompt_encoder.text_encoder is other.backbone.text_encoder
    assert other.prompt_encoder.text_encoder is not random_pipe.backbone.text_encoder


def test_what_was_answered_is_not_asked_again(random_pipe, pair, monkeypatch):
    explorer, asked, ticks = Explorer(random_pipe), [], []
    real = Explorer._answer
    monkeypatch.setattr(
        Explorer, "_answer", lambda self, question, setting, *rest: (
            asked.append(setting) or real(self, question, setting, *rest)
        )
    )  # fmt: skip
    a, b = pair
    before = explorer.compare(QUESTION, (a, b))
    c = replace(b, guidance_scale=2.0)
    after = explorer.compare(QUESTION, (a, c))
    assert asked == [a, b, c] and after[0] is before[0] and after[1] is not before[1]
    assert explorer.compare(QUESTION, (b, a), ticks.append) == before[::-1] and ticks == [1]
    explorer.compare(replace(QUESTION, seeds=(1,)), (a,))
    assert asked == [a, b, c, a]


def test_jobs_keep_their_places_and_run_at_once():
    meet = threading.Barrier(2, timeout=30)  # breaks where one waits for the other's end
    threads = torch.get_num_threads()

    def work(job, lane):
        meet.wait()
        if job == 2:
            raise DTEError("two")
        return job, lane, torch.get_num_threads()

    progress = Progress(1, lambda done: None)
    a, b, c, d = side_by_side(work, [0, 1, 2, 3], 2, progress)
    assert (a[:2], b[:2], d[:2]) == ((0, 0), (1, 1), (3, 1)) and str(c) == "two"
    assert a[2] == max(1, threads // 2) and torch.get_num_threads() == threads
    fresh = []
    later = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert fresh == [threads]


def test_a_stop_ends_both_lanes():
    ticks = []

    def tick(done):
        ticks.append(done)
        raise Stopped

    progress = Progress(10, tick)
    begun = threading.Barrier(2, timeout=30)

    def work(job, lane):
        begun.wait()
        while True:
            progress(1)
            time.sleep(0.001)

    with pytest.raises(Stopped):
        side_by_side(work, "ab", 2, progress)
    assert ticks == [0.1]


def test_a_fault_in_one_lane_ends_the_other():
    progress = Progress(10, lambda done: None)

    def work(job, lane):
        if lane == 1:
            raise ZeroDivisionError
        while True:
            progress(0)
            time.sleep(0.001)

    with pytest.raises(ZeroDivisionError):
        side_by_side(work, "ab", 2, progress)


def test_one_lane_where_there_is_one_core_or_another_model(random_pipe, monkeypatch):
    for threads, lanes in ((1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(explorer_lanes.torch, "get_num_threads", lambda n=threads: n)
        assert lanes_for(random_pipe) == lanes
    monkeypatch.setattr(type(random_pipe.backbone), "draws_small_world", False)
    assert lanes_for(random_pipe) == 1
