"""How a command ends: its signals, what was wrong with what it was given, what nobody could read.

Imports the standard library alone: what else a command needs takes a second to import, in which it
can be ended, too.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn, TextIO

from dte_lab.common.errors import DTEError, is_out_of_memory, one_line, reason_of, sentence_of
from dte_lab.common.quiet import close_bars

ENDED = {"SIGINT": "interrupted.", "SIGTERM": "terminated."}  # signals that end a command
BROKEN_PIPE = 128 + 13  # the status of what SIGPIPE ends, such as `cat | head`


class Ended(SystemExit):
    """A signal has come; the status is 128 and its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.message = ENDED[signal.Signals(number).name]


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """End the process with main's status; what the user can put right is one line on stderr.

    That is a DTEError, an OSError or used-up memory, status 2; SIGINT and SIGTERM, 130 and 143.
    Any other exception is a fault of the program, and shows its traceback; DTE_DEBUG=1 shows all.
    What stderr does not take is lost; where it is what stdout does not take, the work is done to
    its end all the same, and then the status is 141 for a closed pipe, and 2 for a full disk.
    """
    with patient_streams(), _ended_by_signals():
        code, lost = _status_of(main), _lost(sys.stdout)
        if lost is not None and not code:
            told = f"what it had to say cannot be written to standard output ({reason_of(lost)})."
            code = BROKEN_PIPE if isinstance(lost, BrokenPipeError) else fail(told)
        sys.exit(code)


def _status_of(main: Callable[[], int | None]) -> object:
    try:
        return main()
    except Ended as ended:
        return fail(ended.message, ended.code)
    except SystemExit as ended:
        return ended.code
    except KeyboardInterrupt:
        return fail(ENDED["SIGINT"], 128 + signal.SIGINT)
    except (DTEError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("DTE_DEBUG"):
            raise
        if is_out_of_memory(error):
            return fail(
                "the memory is used up: a smaller batch, --gradient-checkpointing or --offload, "
                "where the command has them, take less; dte memory says how much."
            )
        if not isinstance(error, DTEError | OSError):
            raise
        return fail(sentence_of(error))


def fail(message: object, code: int = 2) -> int:
    """Say what was wrong in one line on stderr, below any bar; returns the exit status."""
    close_bars()
    if str(message):  # empty after a help text
        print(one_line(f"error: {message}"), file=sys.stderr)
    return code


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM inside raise `Ended`, once."""
    in_charge = threading.current_thread() is threading.main_thread()
    numbers = [signal.Signals[name] for name in ENDED] if in_charge else []
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    for name in ENDED:  # once is enough: what follows puts things in order
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    raise Ended(number)


def patient_streams() -> ExitStack:
    """Let stdout and stderr take whatever is written: no letter and no full disk ends the work.

    Where the process was started without one of its streams, what it would write there, or a
    library of C, does not get into the file that it opens next. All is as before after `close()`
    of what is returned.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    undo = ExitStack()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or _is_of(stream, number):
            patient = _patient(stream, number)
            undo.callback(setattr, sys, name, stream)
            undo.callback(patient.flush)
            setattr(sys, name, patient)
        elif hasattr(stream, "reconfigure"):  # cp1252 and ASCII have no letter for every name
            stream.reconfigure(errors="backslashreplace")
    return undo


class PatientFile(io.FileIO):
    """An open descriptor; what cannot be written is dropped, and `lost` says why."""

    lost: OSError | None = None

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def _lost(stream: TextIO) -> OSError | None:
    """Why not all that was written to a stream has arrived."""
    stream.flush()
    file = getattr(stream, "buffer", None)
    return getattr(getattr(file, "raw", file), "lost", None)


def _patient(stream: TextIO | None, number: int) -> TextIO:
    """A stream like `stream`, buffered as it is, that does not fail."""
    file = PatientFile(number, "wb", closefd=False)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(file), "utf-8", line_buffering=True)
    stream.flush()
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # it is with PYTHONUNBUFFERED
        stream.encoding, "backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def _is_of(stream: TextIO, number: int) -> bool:
    """Whether a stream writes to a descriptor by itself; a console of Windows has its own way."""
    try:
        mine = stream.fileno() == number and isinstance(stream, io.TextIOWrapper)
    except (AttributeError, OSError, ValueError):
        return False
    return mine and not (os.name == "nt" and stream.isatty())
