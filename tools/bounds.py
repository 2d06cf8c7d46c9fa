"""Run the tests with the oldest versions that pyproject.toml allows, and with the newest.

    python -m tools.bounds FOLDER [ARGUMENT OF PYTEST ...]

FOLDER/oldest and FOLDER/newest become environments of their own, of several GB each. The oldest
versions are those of constraints-oldest.txt, the bounds, as a test checks. CI runs neither.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from dte_lab.common.command import run_command

ROOT = Path(__file__).parents[1]
VERSIONS = {
    "oldest": ("--constraint", str(ROOT / "constraints-oldest.txt")),
    "newest": ("--upgrade", "--upgrade-strategy", "eager"),
}
EXTRAS = "test,evaluate,heic"


def main(folder: Path, arguments: Sequence[str] = ("tests",)) -> int:
    """The number of the two environments that could not be made or in which a test failed."""
    return sum(not passes(folder / name, options, arguments) for name, options in VERSIONS.items())


def passes(environment: Path, options: Sequence[str], arguments: Sequence[str]) -> bool:
    """Whether the tests pass in an environment, which is made where there is none."""
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    install = [python, "-m", "pip", "install", *options, "--editable", f"{ROOT}[{EXTRAS}]"]
    for command in (install, [python, "-m", "pytest", *arguments]):
        if subprocess.run(list(map(str, command)), cwd=ROOT).returncode:
            return False
    return True


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run_command(lambda: main(Path(sys.argv[1]).resolve(), sys.argv[2:] or ("tests",)))
