"""Make both editions of every notebook from its one source.

    python -m tools.notebooks build [NAME ...] [--execute]
    python -m tools.notebooks publish ADDRESS
    python -m tools.notebooks reset NAME ...
    python -m tools.notebooks --check

A source is `notebooks/src/NAME.py`, a solved notebook in jupytext's percent format. From it come

    notebooks/NAME.ipynb             solved, with its outputs stored
    notebooks/exercises/NAME.ipynb   solutions replaced by skeletons and folded below them, with
                                     the picture that a right answer leads to, where there is one

An exercise is a cell with the tag "exercise"; in it, nbgrader's comments `### BEGIN SOLUTION` and
`### END SOLUTION` enclose what the reader writes. A cell that says how long the notebook takes is
put after the title; its numbers are those of the stored run. A cell with the tag "setup" becomes
the one that installs the package where it is missing (first_cell.py). `build` alone keeps stored
outputs while no other code cell changed.

The address of the repository is `repository` under [tool.dte_lab] in pyproject.toml; it goes into
the notebooks' metadata. While it is empty there are no badges, so that no link is dead. `publish`
sets it, keeps the outputs, and says which git commands make the links true. `reset` puts back what
a reader changed, and keeps it beside (reset.py).
"""

import argparse
import copy
import hashlib
import json
import os
import re
import sys
import textwrap
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from tools.expected_pictures import CHECK, Expected, expected_pictures
from tools.first_cell import setup_cell
from tools.marks import between
from tools.notebook_faults import WIDGET, faults, is_bar, prose_faults
from tools.reset import reset

ROOT = Path(__file__).parents[1]
MAX_BYTES = 1_000_000
MARK = "<!-- table of notebooks: python -m tools.notebooks build -->"
SOLUTION = re.compile(
    r"^(?P<indent> *)### BEGIN SOLUTION\n(?P<body>.*?)^ *### END SOLUTION\n?", re.M | re.S
)
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab, and in JupyterLab
REPOSITORY = re.compile(r'^repository = ".*"$', re.M)
# Plain bars, since the state of widgets is not stored; readers still get the widget.
PRELUDE = "import tqdm, tqdm.auto; tqdm.auto.tqdm = tqdm.tqdm"
EPILOGUE = """
import json
from dte_lab.pipeline import peak_memory_mb
print(json.dumps({"device": device, "peak_memory_gb": round(peak_memory_mb(device) / 1024, 1)}))
"""


def read_source(path: Path) -> NotebookNode:
    """The source as a notebook; its `dte_lab` metadata are what the opening needs."""
    return jupytext.read(path, fmt="py:percent")


def solved_edition(source: NotebookNode, name: str, measured: dict) -> NotebookNode:
    """The complete notebook, not executed. measured: what `execute` returned, or {}."""
    return _edition(source, name, measured, solved=True)


def exercise_edition(
    source: NotebookNode, name: str, measured: dict, solved: NotebookNode | None = None
) -> NotebookNode:
    """The notebook with a skeleton and a folded solution for every exercise.

    solved: the executed edition, of which it shows what an exercise leads to.

    Exercise cells carry the tag "raises-exception", with which Jupyter, nbclient and nbmake go on
    after the NotImplementedError of the skeleton.
    """
    return _edition(source, name, measured, False, expected_pictures(solved))


def repository(root: Path | None = None) -> tuple[str, str]:
    """(address of the repository or "", the tag of this version)."""
    settings = tomllib.loads(((root or ROOT) / "pyproject.toml").read_text())
    address = settings.get("tool", {}).get("dte_lab", {}).get("repository", "")
    return address.rstrip("/"), f"v{settings['project']['version']}"


def colab_link(address: str, tag: str, page: str) -> str:
    """Where Colab opens a notebook of the repository."""
    path = address.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{path}/blob/{tag}/{page}"


def _edition(
    source: NotebookNode,
    name: str,
    measured: dict,
    solved: bool,
    pictures: Mapping[str, Expected] = MappingProxyType({}),
) -> NotebookNode:
    address, tag = repository()
    opening = new_markdown_cell(_opening(source.metadata["dte_lab"], name, measured, solved))
    cells = [source.cells[0], opening]
    for cell in source.cells[1:]:
        if "setup" in cell.metadata.get("tags", []):
            text = setup_cell(address, tag)
            tags = {"tags": ["setup", "hide-input"]}
            cells.append(new_code_cell(text, metadata=tags | FOLDED))
        elif "exercise" not in cell.metadata.get("tags", []):
            cells.append(cell)
        elif solved:
            text = SOLUTION.sub(lambda match: match["body"], cell.source)
            cells.append(new_code_cell(text, metadata={"tags": ["exercise"]}))
        else:
            text = SOLUTION.sub(_skeleton, cell.source)
            tags = {"tags": ["exercise", "raises-exception"]}
            cells.append(new_code_cell(text, metadata=tags))
            (exercise,) = CHECK.findall(cell.source) or ("",)
            if exercise in pictures:
                cells.append(pictures[exercise].cell(exercise))
            cells.append(new_markdown_cell(_folded(cell.source)))
    notebook = new_notebook(
        cells=[copy.deepcopy(cell) for cell in cells],
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "dte_lab": {
                **source.metadata["dte_lab"],
                "repository": address,
                "measured": measured,
            },  # fmt: skip
        },
    )
    seen = {}
    for cell in notebook.cells:  # ids that depend on the content alone, so that diffs stay small
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", *FOLDED)}
    return notebook


def _skeleton(match: re.Match) -> str:
    return f'{match["indent"]}raise NotImplementedError("Write this part, then run the cell.")\n'


def _folded(text: str) -> str:
    bodies = [textwrap.dedent(match["body"]).rstrip() for match in SOLUTION.finditer(text)]
    code = "\n\n".join(bodies)
    return f"<details>\n<summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"


def _opening(metadata: dict, name: str, measured: dict, solved: bool) -> str:
    """The cell below the title: badges, times, memory, and where the other edition is."""
    rows = []
    address, tag = repository()
    if address:
        folder = "notebooks" if solved else "notebooks/exercises"
        badge = "https://colab.research.google.com/assets/colab-badge.svg"
        link = colab_link(address, tag, f"{folder}/{name}.ipynb")
        rows.append(f"[![Open in Colab]({badge})]({link})")
    seconds, cores = measured.get("seconds"), measured.get("cores")
    ran = f"{seconds} s on {cores} CPU cores, as stored here" if seconds else "not measured yet"
    memory = f"{measured['peak_memory_gb']} GB" if measured else "not measured yet"
    rows.append(
        "| Running it: laptop CPU | T4 GPU | peak memory | Reading it, with exercises |\n"
        "|---|---|---|---|\n"
        f"| {ran} | not measured yet | {memory} | {metadata['minutes']} minutes |"
    )
    rows.append(
        f"This is the solved edition. To do the exercises, open "
        f"[exercises/{name}.ipynb](exercises/{name}.ipynb)."
        if solved
        else f"This is the exercise edition. The solved one, with all outputs, is "
        f"[../{name}.ipynb](../{name}.ipynb)."
    )
    return "\n\n".join(rows)


def execute(notebook: NotebookNode, folder: Path) -> dict:
    """Run the notebook in place, in `folder`, offline. Returns {seconds, cores, ...} of the run.

    Raises nbclient.exceptions.CellExecutionError when a cell fails.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    notebook.cells = [new_code_cell(PRELUDE), *notebook.cells, new_code_cell(EPILOGUE)]
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, record_timing=False, resources=resources).execute()
    seconds = time.perf_counter() - start
    del notebook.cells[0]
    tidy(notebook)
    said = {output.name: output.text for output in notebook.cells.pop().outputs}
    measured = json.loads(said["stdout"])
    return {"seconds": round(seconds), "cores": os.cpu_count(), **measured}


def tidy(notebook: NotebookNode) -> None:
    """Leave of the outputs what a page can show: no widgets, bars in their last state.

    Bars become ordinary text: a page shows what went to stderr in red.
    """
    notebook.metadata.pop("widgets", None)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(codes, start=1):
        cell.execution_count = count
        kept = []
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                continue
            if output.output_type == "execute_result":
                output.execution_count = count
            if output.output_type == "stream" and is_bar(output.text):
                output.name = "stdout"
            if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text)
        cell.outputs = kept


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
