"""Put a notebook back as the repository has it, for `python -m tools.notebooks reset NAME`."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from dte_lab.common.files import write_atomically


def reset(root: Path, name: str, built: Callable[[str], bytes]) -> list[str]:
    """Restore both editions of a notebook; one sentence each on what was done.

    What differs is kept beside the restored file, under a name that git does not take along. The
    editions come from git's last commit; where there is no git, such as in an unpacked zip file,
    from `built`, which makes one of the source, without outputs.
    """
    said = []
    for folder in ("notebooks", "notebooks/exercises"):
        label = f"{folder}/{name}.ipynb"
        path, committed = root / label, committed_file(root, label)
        wanted = built(folder) if committed is None else committed
        mine = path.read_bytes() if path.is_file() else None
        if mine == wanted:
            said.append(f"{label} is as the repository has it.")
            continue
        kept = ""
        if mine is not None:
            copy = free_name(path)
            write_atomically(copy, mine)
            kept = f"; what was there is {copy.relative_to(root).as_posix()}"
        write_atomically(path, wanted)
        said.append(f"{label} is as the repository has it again{kept}.")
        if committed is None:
            said.append("  There is no git here, so it was made anew, without outputs.")
    return said


def committed_file(root: Path, label: str) -> bytes | None:
    """A file as the last commit of `root` has it; None where there is no git, or no such file."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{label}"], cwd=root, capture_output=True)
    except FileNotFoundError:
        return None
    return shown.stdout if shown.returncode == 0 else None


def free_name(path: Path) -> Path:
    """NAME.mine-1.ipynb beside `path`, or with the next number that is free."""
    number = 1
    while (copy := path.with_name(f"{path.stem}.mine-{number}.ipynb")).exists():
        number += 1
    return copy
