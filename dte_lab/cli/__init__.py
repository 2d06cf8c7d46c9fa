"""The `dte` command: see app.py. What it imports takes a second, in which it can be ended, too."""

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

ENDED = {"SIGINT": "interrupted.", "SIGTERM": "terminated."}  # signals that end a command


class Ended(SystemExit):
    """A signal has come; the status is 128 and its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.message = ENDED[signal.Signals(number).name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `dte` and exit: see app.main; 130 on Ctrl-C and 143 on SIGTERM, with one line."""
    in_charge = threading.current_thread() is threading.main_thread()
    numbers = [signal.Signals[name] for name in ENDED] if in_charge else []
    before = {number: signal.signal(number, _end) for number in numbers}
    for stream in (sys.stdout, sys.stderr):  # cp1252 and ASCII have no letter for every name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        from dte_lab.cli.app import main

        main(arguments)
    except Ended as ended:
        from dte_lab.common.quiet import close_bars

        close_bars()
        print(f"error: {ended.message}", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    for name in ENDED:  # once is enough: what follows puts things in order
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    raise Ended(number)
