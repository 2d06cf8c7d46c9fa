"""Atomic writing: a file is either the old one or the whole new one, never half of it.

A process that is killed while it writes leaves a temporary file, `.NAME.dte-PROCESS.tmp`; the next
one that writes into the same folder removes it.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.settings import check_text, cited

COPY_AGAIN = "it is damaged or of another model, so copy it again"
LONGEST = 200  # letters of a name that a temporary name takes over; most systems allow 255 bytes


def check_path(what: str, path: Path | str) -> None:
    """Raise DTEError where the system cannot say whether anything is at `path`, or it is no path.

    That is: a name that is too long or no UTF-8, a folder without rights, links in a circle.
    """
    if not isinstance(path, str | os.PathLike):
        raise DTEError(f"{what} is a path, not {cited(path)}.")
    check_text(what, os.fspath(path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise DTEError(f"{what} {path} cannot be reached ({reason_of(error)}).") from error


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, flush it to disk and rename it.

    A new file gets the rights that the user's umask allows, an existing one keeps its own. Raises
    OSError, which names `path`, when it cannot be written; an existing file is then left as it was.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(temporary, path.stat().st_mode & 0o777)
            os.replace(temporary, path)


def read_settings(path: Path, remedy: str = COPY_AGAIN) -> dict[str, Any]:
    """The JSON object in a file. Raises DTEError, which names it, where there is none.

    remedy: the end of the sentence, what to do.
    """
    if path.exists() and not path.is_file():  # such as a pipe, which would be waited for
        raise DTEError(f"{path} is not a file: {remedy}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DTEError(f"{path} cannot be read ({reason_of(error)}): {remedy}.") from error
    if not isinstance(document, dict):
        raise DTEError(f"{path} holds no settings: {remedy}.")
    return document


@contextmanager
def told_of(what: Path | str) -> Iterator[None]:
    """A DTEError inside names what of a model it is about, and that it is to be copied again."""
    try:
        yield
    except DTEError as error:
        raise DTEError(f"{what}: {str(error).rstrip('.')}; {COPY_AGAIN}.") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names `path`, whatever file or none it names itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name for a file or folder beside `path`, where nothing is left at the end."""
    remove_leftovers(Path(os.path.realpath(path.parent)))
    name = os.fsencode(path.name)[:LONGEST].decode(errors="ignore")
    temporary = path.parent / f".{name}.dte-{os.getpid()}.tmp"
    _remove(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)


@cache
def remove_leftovers(folder: Path) -> None:
    """Remove what processes that no longer run were writing into a folder; once a process."""
    for path in folder.iterdir():
        found = re.fullmatch(r"\..*\.dte-(\d+)\.tmp", path.name)
        if found and not _runs(int(found[1])):
            _remove(path)


def _runs(process: int) -> bool:
    """Whether a process is there; on Windows, where asking would end it, always true."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prepare_folder(out: Path | str) -> None:
    """Make the output folder and try it, so that a full run cannot end without a place to write.

    Raises DTEError when it cannot be made or written.
    """
    check_path("the output folder", out)  # safetensors opens no file in one that is no UTF-8
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DTEError(f"{out} is a file: results need a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DTEError(
            f"the output folder {out} cannot be written ({reason_of(error)})."
        ) from error


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise DTEError when one of the outputs would be written over one of the inputs."""
    given = {os.path.realpath(path) for path in inputs}  # unlike resolve, of links in a circle, too
    for path in outputs:
        if os.path.realpath(path) in given:
            raise DTEError(
                f"{path} is read and would be written over: choose another folder for --out."
            )
