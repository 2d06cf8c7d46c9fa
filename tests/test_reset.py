"""`python -m tools.notebooks reset NAME` brings a notebook back and loses nothing."""

import subprocess
from pathlib import Path

import nbformat
import pytest

from tools import notebooks, reset

SOURCE = """\
# ---
# jupyter:
#   dte_lab:
#     promise: ""
#     minutes: 3
# ---

# %% [markdown]
# # A title

# %% tags=["exercise"]
### BEGIN SOLUTION
answer = 42
### END SOLUTION
"""
EDITIONS = ("notebooks/one.ipynb", "notebooks/exercises/one.ipynb")


@pytest.fixture
def root(tmp_path):
    for name, value in (("pyproject.toml", '[project]\nversion = "1"\n'),
                        ("notebooks/src/one.py", SOURCE)):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value)
    notebooks.build(tmp_path)
    return tmp_path


def in_git(root: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True)


def test_changed_notebooks_come_back_and_the_work_is_kept_each_time(root):
    in_git(root)
    first = [(root / name).read_bytes() for name in EDITIONS]
    for attempt in (1, 2):
        for name in EDITIONS:
            (root / name).write_text(f"attempt {attempt} at {name}")
        said = notebooks.restore(root, ["one"])
        assert [(root / name).read_bytes() for name in EDITIONS] == first
        for name, line in zip(EDITIONS, said, strict=True):
            kept = name.replace(".ipynb", f".mine-{attempt}.ipynb")
            assert line.startswith(name) and kept in line
    for name in EDITIONS:
        for attempt in (1, 2):
            kept = root / name.replace(".ipynb", f".mine-{attempt}.ipynb")
            assert kept.read_text() == f"attempt {attempt} at {name}"


def test_what_is_unchanged_is_left_and_what_is_lost_comes_back(root):
    in_git(root)
    stored = (root / EDITIONS[1]).read_bytes()
    (root / EDITIONS[1]).unlink()
    said = notebooks.restore(root, ["one"])
    assert said[0] == f"{EDITIONS[0]} is as the repository has it."
    assert (root / EDITIONS[1]).read_bytes() == stored
    assert not list(root.rglob("*.mine-*"))


def test_without_git_the_source_is_enough(root, monkeypatch):
    monkeypatch.setattr(reset, "committed_file", lambda *_: None)
    for name in EDITIONS:
        (root / name).write_text("mine")
    said = notebooks.restore(root, ["one"])
    texts = [nbformat.read(root / name, as_version=4).cells[-1].source.strip() for name in EDITIONS]
    assert texts[0] == "answer = 42" and "<summary>Solution</summary>" in texts[1]
    assert sum("without outputs" in line for line in said) == 2
    assert (root / "notebooks/one.mine-1.ipynb").read_text() == "mine"


def test_no_git_and_no_commit_are_no_error(root, monkeypatch):
    assert reset.committed_file(root, EDITIONS[0]) is None  # a folder without git
    monkeypatch.setenv("PATH", "")
    assert reset.committed_file(root, EDITIONS[0]) is None  # no git at all


def test_kept_work_is_neither_an_unknown_notebook_nor_committed(root, monkeypatch):
    for slow in ("faults", "prose_faults"):  # they read results
        monkeypatch.setattr(notebooks, slow, lambda *_: [])
    (root / "notebooks/one.mine-1.ipynb").write_text("mine")
    (root / "notebooks/other.ipynb").write_text("{}")
    problems = " ".join(notebooks.check(root))
    assert "other.ipynb has no source" in problems and "mine-1" not in problems
    ignored = ["git", "check-ignore", "-q", "notebooks/exercises/one.mine-1.ipynb"]
    ran = subprocess.run(ignored, cwd=Path(__file__).parents[1])
    assert ran.returncode in (0, 128)  # 128: not a checkout


def test_an_unknown_name_is_answered(root):
    with pytest.raises(SystemExit, match="no source notebooks/src/two.py"):
        notebooks.restore(root, ["two"])
