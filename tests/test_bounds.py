"""The oldest versions are those that pyproject.toml names, and what runs the tests with them."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import bounds

ROOT = Path(__file__).parents[1]


def oldest() -> dict[str, str]:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    texts += [text for extra in project["optional-dependencies"].values() for text in extra]
    lowest = {}
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name == "dte-lab":
            continue
        [low] = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        lowest[name] = max(low, lowest.get(name, low))
    assert {name: Version(version) for name, version in oldest().items()} == lowest


@pytest.mark.parametrize(
    ("broken", "failures", "calls"), [("", 0, 4), ("pip", 2, 2), ("pytest", 2, 4)]
)
def test_both_environments_are_made_and_run_the_tests(
    monkeypatch, tmp_path, broken, failures, calls
):
    made, ran = [], []
    monkeypatch.setattr(bounds.venv, "create", lambda path, with_pip: made.append(path.name))

    def run(command, cwd):
        ran.append(command)
        return SimpleNamespace(returncode=int(command[2] == broken))

    monkeypatch.setattr(bounds.subprocess, "run", run)
    assert bounds.main(tmp_path, ["tests/test_x.py"]) == failures
    assert made == ["oldest", "newest"] and len(ran) == calls
    assert all(str(tmp_path) in command[0] for command in ran)
    assert str(ROOT / "constraints-oldest.txt") in ran[0] and "--upgrade" in ran[calls // 2]
    if not broken:
        assert ran[1][1:] == ["-m", "pytest", "tests/test_x.py"]


def test_without_a_folder_it_says_how():
    ended = subprocess.run(
        [sys.executable, "-m", "tools.bounds"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode and "python -m tools.bounds FOLDER" in ended.stderr
