"""The list of small faults applies to the code as it is, and the tool tells who notices them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import mutate

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "tools").is_dir(), reason="needs a checkout, not an installed package"
)
# In the first reading of the code no test noticed these.
FIRST = "p1 p2 p3 p4 p6 p7 p8 w1 w3 w4 t1 t2 t5 c4 c5 s3 a1 a2 a3 h2 e1 b4 m2 m3".split()


def test_every_mutation_still_applies():
    _, mutations = mutate.read_list(ROOT)
    assert not (said := mutate.faults(ROOT, mutations)), "\n".join(said)
    assert len(mutations) >= 80
    assert set(FIRST) <= {m.id for m in mutations}


@pytest.fixture
def toy(tmp_path):
    """toy(old of the second mutation) -> the folder of a project with three mutations."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "toy.py").write_text("def largest(a, b):\n    return a if a > b else b\n")
    (tmp_path / "test_toy.py").write_text(
        "from toy import largest\n\n\ndef test_larger():\n    assert largest(1, 2) == 2\n"
    )

    def write(old="a > b"):
        edits = {"killed": ("else b", "else a"), "alive": (old, "a >= b"), "broken": ("def", "df")}
        entries = [
            {"id": name, "file": "toy.py", "old": old, "new": new, "tests": ["test_toy.py"]}
            for name, (old, new) in edits.items()
        ]
        text = json.dumps({"preload": [], "mutations": entries})
        (tmp_path / mutate.LIST).write_text(text)
        return tmp_path

    return write


def run(root, *options):
    command = [sys.executable, mutate.__file__, "--root", str(root), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_survivors_are_named_and_what_tests_notice_is_not(toy):
    result = run(toy())
    assert result.returncode == 1, result.stderr
    ended, summary = result.stdout.split("\n\n")
    assert "by test_toy.py::test_larger" in ended and "alive            toy.py  SURVIVED" in ended
    assert summary.startswith("3 mutations, 1 survivors\nalive  toy.py\n  - a > b\n  + a >= b\n")
    assert run(toy(), "--only", "killed", "--only", "broken").returncode == 0
    assert (toy() / "toy.py").read_text().startswith("def largest(a, b):")


def test_a_list_at_fault_is_no_verdict(toy):
    assert "stands 4 times in toy.py" in (wrong := run(toy("a"), "--list")).stderr
    assert wrong.returncode == 2
    assert "alive: 'a < b' is gone in toy.py" in run(toy("a < b")).stderr
    root = toy()
    (root / "test_toy.py").write_text("def test_larger():\n    assert False\n")
    failing = run(root)
    assert failing.returncode == 2 and "test_toy.py::test_larger" in failing.stderr
