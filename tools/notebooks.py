"""Make both editions of every notebook from its one source.

    python -m tools.notebooks build [NAME ...] [--execute]
    python -m tools.notebooks publish ADDRESS
    python -m tools.notebooks reset NAME ...
    python -m tools.notebooks --check

A source is `notebooks/src/NAME.py`, a solved notebook in jupytext's percent format. From it come

    notebooks/NAME.ipynb             solved, with its outputs stored
    notebooks/exercises/NAME.ipynb   solutions replaced by skeletons and folded below them, with
                                     the picture that a right answer leads to, where there is one

How they are made of it is in notebook_editions.py. `build` alone keeps stored outputs while no
code cell but the first changed. `publish` sets the address of the repository, keeps the outputs,
and says which git commands make the links true. `reset` puts back what a reader changed, and keeps
it beside (reset.py).
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from tools.marks import between
from tools.notebook_editions import (
    ROOT,
    exercise_edition,
    read_source,
    repository,
    solved_edition,
)
from tools.notebook_faults import faults, prose_faults
from tools.notebook_runs import execute, tidy
from tools.reset import reset

MAX_BYTES = 1_000_000
MARK = "<!-- table of notebooks: python -m tools.notebooks build -->"
REPOSITORY = re.compile(r'^repository = ".*"$', re.M)


def build(root: Path, names: Sequence[str] = (), run: bool = False) -> list[str]:
    """Write both editions of the named notebooks, or of all. Returns what a person should know."""
    notes = []
    for path in _sources(root, names):
        name, solved_path = path.stem, root / "notebooks" / f"{path.stem}.ipynb"
        source, stored = read_source(path), _read(solved_path)
        if run:
            stored = solved_edition(source, name, {})
            measured = execute(stored, solved_path.parent)
            notes.append(f"{name}: {measured['seconds']} s, {measured['peak_memory_gb']} GB")
        else:
            measured = _measured(stored)
        notebook = solved_edition(source, name, measured)
        if stored and _codes(stored) == _codes(notebook):
            tidy(stored)
            _copy_outputs(stored, notebook)
        else:
            notes.append(f"{name}: the code is new, so no outputs are stored; use --execute")
        _write(notebook, solved_path)
        exercises = exercise_edition(source, name, measured, notebook)
        _write(exercises, root / "notebooks" / "exercises" / f"{name}.ipynb")
    if (text := _readme(root)) is not None:
        write_atomically(root / "README.md", text.encode())
    return notes


def _readme(root: Path) -> str | None:
    """README.md with the table of notebooks between its two marks; None where it has none."""
    path = root / "README.md"
    rows = [
        "| Notebook | Promise | Runs in | Peak memory | With exercises |",
        "|---|---|---|---|---|",
    ]
    for source in _sources(root):
        solved = _read(root / "notebooks" / f"{source.stem}.ipynb")
        said, measured = read_source(source).metadata["dte_lab"], _measured(solved)
        seconds, memory = (measured.get(key, "?") for key in ("seconds", "peak_memory_gb"))
        rows.append(
            f"| [{source.stem}](notebooks/{source.stem}.ipynb) | {said['promise']} | {seconds} s | "
            f"{memory} GB | {said['minutes']} minutes |"
        )
    return between(path.read_text(), MARK, "\n".join(rows)) if path.is_file() else None


def check(root: Path) -> list[str]:
    """Everything that is wrong with the stored notebooks, one sentence each."""
    problems = []
    sources = {path.stem: path for path in _sources(root)}
    reasoned = _reasoned(root)
    for folder in ("notebooks", "notebooks/exercises"):
        for path in sorted((root / folder).glob("*.ipynb")):
            if path.stem not in sources and ".mine-" not in path.stem:
                problems.append(f"{path.relative_to(root)} has no source in notebooks/src.")
    for name, path in sources.items():
        source = read_source(path)
        said = prose_faults(source, name, root / "results", reasoned)
        problems += [f"{path.relative_to(root)} {fault}" for fault in said]
        solved_path = root / "notebooks" / f"{name}.ipynb"
        solved = _read(solved_path)
        measured = _measured(solved)
        for is_solved, target, expected in (
            (True, solved_path, solved_edition(source, name, measured)),
            (False, root / "notebooks" / "exercises" / f"{name}.ipynb",
             exercise_edition(source, name, measured, solved)),
        ):  # fmt: skip
            label, stored = target.relative_to(root), _read(target)
            if stored is None:
                problems.append(f"{label} is missing: run python -m tools.notebooks build {name}.")
                continue
            if _without_outputs(stored) != _without_outputs(expected):
                problems.append(f"{label} differs from {path.relative_to(root)}: build it anew.")
            problems += [f"{label} {fault}" for fault in faults(stored, is_solved)]
            if (size := target.stat().st_size) > MAX_BYTES:
                problems.append(f"{label} has {size / 1e6:.2f} MB, more than 1 MB.")
    if (text := _readme(root)) is not None and text != (root / "README.md").read_text():
        problems.append(
            "README.md has an old table of notebooks: run python -m tools.notebooks build."
        )
    return problems


def _reasoned(root: Path) -> list[str]:
    """Sentences that compare without results, one a line; lines with # say what the file is."""
    path = root / "notebooks" / "src" / "reasoned.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if line and not line.startswith("#")]


def _sources(root: Path, names: Sequence[str] = ()) -> list[Path]:
    paths = sorted((root / "notebooks" / "src").glob("*.py"))
    if unknown := set(names) - {path.stem for path in paths}:
        raise SystemExit(f"error: no source notebooks/src/{sorted(unknown)[0]}.py")
    return [path for path in paths if not names or path.stem in names]


def _read(path: Path) -> NotebookNode | None:
    return nbformat.read(path, as_version=4) if path.is_file() else None


def _write(notebook: NotebookNode, path: Path) -> None:
    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _bytes(notebook))


def _bytes(notebook: NotebookNode) -> bytes:
    return (nbformat.writes(notebook) + "\n").encode()


def _measured(notebook: NotebookNode | None) -> dict:
    return dict(notebook.metadata.get("dte_lab", {}).get("measured", {})) if notebook else {}


def _codes(notebook: NotebookNode) -> list[str]:
    """What the cells compute; the first one, which installs the package, prints nothing."""
    return [
        "" if "setup" in cell.metadata.get("tags", []) else cell.source
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _copy_outputs(stored: NotebookNode, notebook: NotebookNode) -> None:
    codes = [[c for c in nb.cells if c.cell_type == "code"] for nb in (stored, notebook)]
    for old, new in zip(*codes, strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count


def _without_outputs(notebook: NotebookNode) -> tuple:
    cells = [
        (c.id, c.cell_type, c.source, c.metadata, c.get("attachments")) for c in notebook.cells
    ]
    return cells, notebook.metadata


def publish(root: Path, address: str) -> str:
    """Set the address, build badges and first cells, check, and say what git must do.

    Raises SystemExit for an address that is none, and when the check finds something.
    """
    address = address.rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise SystemExit(f"error: the address is https://github.com/NAME/REPOSITORY, not {address}")
    file = root / "pyproject.toml"
    text, found = REPOSITORY.subn(f'repository = "{address}"', file.read_text())
    if found != 1:
        raise SystemExit(f"error: {file} must have one line repository = under [tool.dte_lab].")
    write_atomically(file, text.encode())
    if problems := build(root) + check(root):
        raise SystemExit("\n".join(["error: it is not ready to be published:", *problems]))
    tag = repository(root)[1]
    return "\n".join(
        [
            f"Badges and first cells name {address}, tag {tag}. Now:",
            "  git add pyproject.toml README.md notebooks",
            f'  git commit -m "Publish at {address}"',
            f"  git tag {tag}",
            f"  git push {address} HEAD:main {tag}",
        ]
    )


def restore(root: Path, names: Sequence[str]) -> list[str]:
    """Put the named notebooks back as the repository has them; one sentence for each file."""
    said = []
    for path in _sources(root, names):

        def built(folder: str, path: Path = path) -> bytes:
            edition = exercise_edition if folder.endswith("exercises") else solved_edition
            return _bytes(edition(read_source(path), path.stem, {}))

        said += reset(root, path.stem, built)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks")
    parser.add_argument("--check", action="store_true", help="fail where a notebook is stale")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("build", help="write both editions")
    command.add_argument("names", nargs="*", metavar="NAME", help="such as 00_quickstart")
    command.add_argument("--execute", action="store_true", help="run them and store the outputs")
    command = commands.add_parser("publish", help="name the public address in badges and cells")
    command.add_argument("address", metavar="ADDRESS", help="https://github.com/NAME/REPOSITORY")
    command = commands.add_parser("reset", help="put notebooks back, and keep what was there")
    command.add_argument("names", nargs="+", metavar="NAME", help="such as 00_quickstart")
    arguments = parser.parse_args()
    if arguments.command == "reset":
        print("\n".join(restore(ROOT, arguments.names)))
    elif arguments.command == "build":
        print("\n".join(build(ROOT, arguments.names, arguments.execute)))
    elif arguments.command == "publish":
        print(publish(ROOT, arguments.address))
    elif arguments.check:
        problems = check(ROOT)
        print("\n".join(problems) or "The notebooks are in step with their sources.")
        sys.exit(bool(problems))
    else:
        parser.error("say build, publish, reset or --check")


if __name__ == "__main__":
    run_command(main)
