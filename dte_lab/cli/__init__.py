"""The `dte` command: see app.py. What it imports takes a second, in which it can be ended, too."""

from collections.abc import Sequence
from typing import NoReturn

from dte_lab.common.command import run_command


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `dte` and exit: 0, 2 after a mistake that the user can put right; see `run_command`."""

    def command() -> int | None:
        from dte_lab.cli.app import run

        return run(arguments)

    run_command(command)
