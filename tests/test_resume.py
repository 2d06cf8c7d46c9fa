"""A run goes on with the same settings only, and its log says what happened before its state."""

import json
from dataclasses import dataclass

import pytest

from dte_lab.common.resume import append_line, as_json, changed_settings, check_settings, cut_back


@dataclass
class Recipe:
    steps: int
    rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class Method:
    rate: float = 0.25


def test_settings_are_compared_by_group_and_field(tmp_path):
    now = {"train": Recipe(3), "method": Method(), "seed": 7}
    before = as_json(now)
    assert before["train"] == {"steps": 3, "rate": 0.5, "betas": [0.9, 0.99]}
    assert changed_settings(before, now) == []
    check_settings(tmp_path, before, now)
    others = {"train": Recipe(4, betas=(0.9, 0.98)), "method": Method(1.0), "seed": 8}
    names = ["train.steps", "train.betas", "method.rate", "seed"]
    assert changed_settings(before, others) == names
    assert changed_settings(before, others, free=("steps", "seed")) == names[1:3]
    with pytest.raises(ValueError, match=r"holds a run with other settings \(train.steps, tr"):
        check_settings(tmp_path, before, others)


def test_a_setting_that_is_new_had_its_default_and_one_that_is_gone_is_seen():
    before = {"train": {"steps": 3, "rate": 0.5}}
    assert changed_settings(before, {"train": Recipe(3)}) == []
    assert changed_settings(before, {"train": Recipe(3, betas=(0.5, 0.5))}) == ["train.betas"]
    assert changed_settings({"train": {"rate": 0.5}}, {"train": Recipe(3)}) == ["train.steps"]
    gone = {"train": {"steps": 3, "momentum": 0.9}}
    assert changed_settings(gone, {"train": Recipe(3)}) == ["train.momentum"]
    assert changed_settings({}, {"train": Recipe(3)}) == ["train"]


def test_a_log_is_cut_back_to_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_back(log, 3)
    assert not log.exists()
    for step in (2, 3, 4):
        append_line(log, {"step": step, "loss": 0.1})
    with log.open("a") as file:
        file.write('[5]\n{"loss": 1}\n{"step": 3, "lo')
    cut_back(log, 3)
    assert [json.loads(x) for x in log.read_text().splitlines()] == [
        {"step": 2, "loss": 0.1}, {"step": 3, "loss": 0.1},
    ]  # fmt: skip
    assert log.read_text().endswith("\n")
