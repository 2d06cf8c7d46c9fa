"""The folder that a tool builds as a whole, such as the site or the page for a browser."""

import os
import shutil
from pathlib import Path

from dte_lab.common.errors import DTEError
from dte_lab.common.files import naming, temporary_beside


def check_ours(folder: Path, mark: str) -> None:
    """Raise DTEError for a folder that holds something, and no file `mark`, which a tool writes."""
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise DTEError(
            f"{folder} holds something that was not built here: choose another folder, or empty it."
        )


def put(built: Path, folder: Path) -> None:
    """Copy what was built to a folder, in the place of what was there, which stays until then.

    Raises OSError, which names the folder, where it cannot be written.
    """
    with naming(folder):
        folder = Path(os.path.realpath(folder))  # a link stays one
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder) as whole:
            shutil.copytree(built, whole)
            shutil.rmtree(folder, ignore_errors=True)
            whole.rename(folder)
