"""Both editions of a notebook from its one source, not executed.

In a source, an exercise is a cell with the tag "exercise"; in it, nbgrader's comments `### BEGIN
SOLUTION` and `### END SOLUTION` enclose what the reader writes. A cell that says how long the
notebook takes is put after the title; its numbers are those of the stored run. A cell with the tag
"setup" becomes the one that installs the package where it is missing (first_cell.py).

The address of the repository is `repository` under [tool.dte_lab] in pyproject.toml; it goes into
the notebooks' metadata. While it is empty there are no badges, so that no link is dead.
"""

import copy
import hashlib
import re
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.expected_pictures import CHECK, Expected, expected_pictures
from tools.first_cell import setup_cell

ROOT = Path(__file__).parents[1]
SOLUTION = re.compile(
    r"^(?P<indent> *)### BEGIN SOLUTION\n(?P<body>.*?)^ *### END SOLUTION\n?", re.M | re.S
)
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab, and in JupyterLab


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
