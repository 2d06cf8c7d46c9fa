"""What README and model card say in numbers, from the stored runs."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from dte_lab.evaluation.base_model_tables import measures_table
from dte_lab.evaluation.conclusions import CONCLUSIONS
from dte_lab.evaluation.report import cell_text, finished, name_of
from tools.marks import between

PARTS = {  # (method, steps) -> what its pictures are drawn from
    ("dte@part=weights", 0): "weights alone, predicted",
    ("dte@part=word", 0): "word alone, predicted",
    ("dte", 0): "prediction",
    ("dte", 12): "after 12 steps",
    ("other", 0): "another thing, true rendering",
    ("oracle", 0): "true rendering",
}
OF_PARTS = {
    "fidelity": "Harmonic mean", "identity_scaled": "Identity", "nearest": "Own thing nearest",
    "scene": "Scene right", "borders": "Borders of cells",
}  # fmt: skip
OF_METHODS = {
    "fidelity": "Harmonic mean", "ahead": "Tuning encoder at 12 steps ahead by",
    "identity_scaled": "Identity", "scene": "Scene right", "seconds": "Seconds",
}  # fmt: skip


def of_parts(results: Path) -> str:
    """What word, weights and steps draw, of unseen things and of an unseen style."""
    lines = head("Drawn from", OF_PARTS)
    for run, title in (
        ("table", "{n} `test` things"),
        ("unseen_style", "{n} `val` and `test` things in an unseen style"),
    ):
        found = by_method(finished(results / run)[0])
        n = found["dte", 12]["identity"]["n"]
        lines.append(f"| **{title.format(n=n)}** |" + " |" * len(OF_PARTS))
        lines += [row(name, found[key], OF_PARTS) for key, name in PARTS.items()]
    return "\n".join(lines)


def of_methods(results: Path) -> str:
    """All methods at 12 steps, and a few with more."""
    lines = head("Method", OF_METHODS)
    for run, title in (("table", "12 steps, {n} things"), ("long", "more steps, {n} things")):
        if not (results / run / "run.json").is_file():  # hours of a core
            continue
        found = by_method(finished(results / run)[0])
        n = found["dte", 12]["identity"]["n"]
        lines.append(f"| **{title.format(n=n)}** |" + " |" * len(OF_METHODS))
        for (method, steps), line in found.items():
            if steps and "part=" not in method:
                lines.append(row(f"{name_of(method)}, {steps} steps", line, OF_METHODS))
    return "\n".join(lines)


def by_method(summary: Sequence[Mapping]) -> dict[tuple[str, int], Mapping]:
    return {(line["method"], line["steps"]): line for line in summary}


def head(first: str, columns: Mapping[str, str]) -> list[str]:
    return [
        f"| {first} | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]


def row(name: str, line: Mapping, columns: Mapping[str, str]) -> str:
    return f"| {name} | " + " | ".join(cell_text(line.get(c)) for c in columns) + " |"


def concluded(results: Path) -> str:
    """The sentences on each run, a paragraph for each."""
    runs = dict.fromkeys(conclusion.run for conclusion in CONCLUSIONS)
    texts = (" ".join(c.sentence(results) for c in CONCLUSIONS if c.run == run) for run in runs)
    return "\n\n".join(textwrap.fill(text, 100, break_on_hyphens=False) for text in texts)


VOICE = {
    "norm": "norm of the predicted v* of a `test` thing, in a word's",
    "share": "change of its drawing with v* = 0, over that with the word least like v*",
}


def of_base_model(results: Path) -> str:
    """Its own measures, and what a predicted word changes in its drawings."""
    lines = [measures_table(json.loads((results / "world.json").read_text()))]
    voice = json.loads((results / "word_voice.json").read_text())
    for key, name in VOICE.items():
        mean, low, high = (f"{voice[key][part]:.2f}" for part in ("mean", "low", "high"))
        lines.append(f"| {name} | {mean} | {low} to {high} | {voice[key]['n']} |")
    return "\n".join(lines)


PAGES = {  # {page: {name: what is written between its two lines `<!-- NAME: ... -->`}}
    "README.md": {
        "table of parts": of_parts, "table of methods": of_methods, "conclusions": concluded,
    },
    "dte_lab/weights/small/README.md": {"measures of the base model": of_base_model},
}  # fmt: skip


def written(page: str, text: str, results: Path) -> str:
    """A page's text with what is written by command anew."""
    for name, table in PAGES[page].items():
        marker = f"<!-- {name}: python -m tools.results write -->"
        text = between(text, marker, table(results))
    return text
