"""How a command ends whose streams take nothing: the work is done, and no traceback is shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Says a lot on both streams, and has a library of C say something while it writes a file.
TALKING = """
import os, sys
from contextlib import suppress
from dte_lab.common.command import run_command
def main():
    print("y" * 9000)
    print("x" * 9000, file=sys.stderr)
    with open("made", "wb") as file:
        with suppress(OSError):
            os.write(2, b"noise\\n")
        file.write(b"whole")
    print("done")
    return int(sys.argv[1])
run_command(main)
"""
LOST = "error: what it had to say cannot be written to standard output"
FULL = f"{LOST} (No space left on device)."
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs sh and /dev/full")


def talk(folder, redirections, status=0, unbuffered=False, **streams):
    """(exit status, lines of stderr but for what was printed there) of TALKING."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {})
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", TALKING]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    done = subprocess.run([*command, str(status)], cwd=folder, env=environment, **options)
    assert (folder / "made").read_bytes() == b"whole"
    said = (done.stderr or b"").decode().splitlines()
    return done.returncode, [line for line in said if line != "x" * 9000 and line != "noise"]


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    ("redirections", "status", "said"),
    [
        ("", 0, []),
        (">/dev/full", 2, [FULL]),
        ("2>/dev/full", 0, []),
        (">/dev/full 2>/dev/full", 2, []),
        (">&-", 0, []),
        ("2>&-", 0, []),
        ("<&-", 0, []),
        ("<&- >&- 2>&-", 0, []),
    ],
)
def test_streams_that_are_full_or_closed(redirections, status, said, unbuffered, tmp_path):
    assert talk(tmp_path, redirections, unbuffered=unbuffered) == (status, said)


@pytest.mark.parametrize(("stream", "status"), [("stdout", 141), ("stderr", 0)])
def test_a_pipe_that_nobody_reads(stream, status, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    assert talk(tmp_path, "", **{stream: writing}) == (status, [])
    os.close(writing)


def test_a_command_that_failed_keeps_its_own_status(tmp_path):
    assert talk(tmp_path, ">/dev/full", status=5) == (5, [])


def test_every_program_ends_in_the_same_way():
    """But for the one that runs where dte_lab is not there."""
    alone = {"tools/install.py"}
    folders = ("dte_lab", "tools", "recipes", "figures", "benchmarks")
    programs = {
        path.relative_to(ROOT).as_posix(): text
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if '\nif __name__ == "__main__":' in (text := path.read_text(encoding="utf-8"))
    }
    assert "dte_lab/evaluation/steps.py" in programs
    for name, text in programs.items():
        last = text.rpartition("\nif __name__")[2]
        ends = re.search(r"^    run_command\(", last, re.M) or "cli import main" in text
        assert ends or name in alone, f"{name} does not end with run_command"
