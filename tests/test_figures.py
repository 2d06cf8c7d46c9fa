"""The pictures in figures/ show what the weights and results that lie here give."""

import subprocess
import sys
from pathlib import Path

import pytest

MAKE = Path(__file__).parents[1] / "figures" / "make.py"
pytestmark = pytest.mark.skipif(not MAKE.is_file(), reason="needs a checkout")


def test_no_figure_is_stale():
    check = subprocess.run([sys.executable, MAKE, "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
