"""Ctrl-C and SIGTERM end every command with one line, and leave no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dte_lab.common.processes import in_processes

LINES = {signal.SIGINT: "error: interrupted.", signal.SIGTERM: "error: terminated."}
# A command that says when it is where the signal shall meet it, and then takes its time.
IMPORTING = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            print("ready", flush=True); time.sleep(60)
sys.meta_path.insert(0, Slow())
from dte_lab.cli import main
main(["--version"])
"""
WORKING = """
import time
from dte_lab.cli import app, main
def read_pictures(*_):
    from tqdm import tqdm
    for _ in tqdm(range(9)):
        print("ready", flush=True); time.sleep(60)
app.read_pictures = read_pictures
main(["personalize", "a.png", "--prompt", "S*", "--out", "x"])
"""
SHARING = """
import time
from dte_lab.cli import app, main
from dte_lab.common.processes import in_processes
from tests.test_signals import sleep_long
def read_pictures(*_):
    list(in_processes(sleep_long, [1, 2, 3, 4], 2, 1))
app.read_pictures = read_pictures
if __name__ == "__main__":
    main(["personalize", "a.png", "--prompt", "S*", "--out", "x"])
"""


def sleep_long(_):
    print("ready", flush=True)
    time.sleep(60)


def identity(x):
    return x


def started(code, folder):
    """A process that runs `code` and has come to where it is slow, and its children."""
    script = folder / "script.py"
    script.write_text(code)
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert command.stdout.readline() == "ready\n"
    return command, psutil.Process(command.pid).children(recursive=True)


@pytest.mark.parametrize("number", LINES)
@pytest.mark.parametrize("code", [IMPORTING, WORKING, SHARING], ids=["start", "work", "processes"])
def test_a_signal_is_answered_by_one_line(code, number, tmp_path):
    command, children = started(code, tmp_path)
    assert bool(children) == (code == SHARING)
    command.send_signal(number)
    _, error = command.communicate(timeout=30)
    assert command.returncode == 128 + number
    lines = [line for line in error.splitlines() if "it/s" not in line]
    assert lines[-1] == LINES[number] and "Traceback" not in error, error
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_processes_end_with_a_killed_parent(tmp_path):
    command, children = started(SHARING, tmp_path)
    command.kill()
    assert children and not psutil.wait_procs(children, timeout=15)[1]


def test_the_results_come_in_order_and_signals_are_as_before():
    before = signal.getsignal(signal.SIGINT)
    assert list(in_processes(identity, list(range(7)), 2, 2)) == list(range(7))
    assert signal.getsignal(signal.SIGINT) is before
