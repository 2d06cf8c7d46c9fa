"""What a run writes: a `Row` per edit that was measured, and how everything was made."""

import csv
import hashlib
import io
import json
import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import nn

from dte_lab import __version__
from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import read_settings, write_atomically

AGAIN = "bring back the folder as it was, or give dte evaluate another"


@dataclass
class Row:
    """What was measured of one edit: the pictures of a method after a number of steps.

    Numbers of pictures are means over seeds; what belongs to the concept stands in each of its
    rows. measures.py says what the numbers are; None where one was not measured.
    """

    method: str  # its label
    steps: int
    concept: str
    group: str
    input_style: str
    input_scene: str
    edit: str
    is_style: bool
    clip_i_small: float | None = None
    identity: float | None = None
    identity_margin: float | None = None
    nearest: float | None = None
    clip_t_small: float | None = None
    scene: float | None = None
    truth_similarity: float | None = None
    truth_rmse: float | None = None
    borders: float | None = None
    diversity: float | None = None
    word_similarity_small: float | None = None
    word_similarity: float | None = None
    word_norm: float | None = None
    loss: float | None = None
    loss_elsewhere: float | None = None
    nearest_words: str = ""
    seconds: float | None = None
    seconds_per_picture: float | None = None
    extra_memory_mb: float | None = None

    def __post_init__(self) -> None:
        """A row is what its line in the table says: numbers with five digits."""
        for name in NUMBERS:
            if getattr(self, name) is not None:
                setattr(self, name, float(f"{float(getattr(self, name)):.5g}"))


COLUMNS = [field.name for field in fields(Row)]
NUMBERS = [field.name for field in fields(Row) if field.type == float | None]


def to_csv(rows: Iterable[Row]) -> bytes:
    """The rows as a table with a head."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_written(getattr(row, name)) for name in COLUMNS] for row in rows)
    return buffer.getvalue().encode()


def _written(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[Row]:
    """The rows of a table that `to_csv` wrote; columns that it lacks are None.

    Raises DTEError, with the file and the line, for what is no such table.
    """
    rows, place = [], "its head"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file, strict=True):
                place = f"line {len(rows) + 2}"
                if None in line or None in line.values():
                    raise ValueError("it has not as many values as there are columns")
                rows.append(Row(**{k: _read(k, line[k]) for k in COLUMNS if k in line}))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DTEError(f"{path} is damaged in {place} ({reason_of(error)}): {AGAIN}.") from error
    return rows


def read_run(folder: Path) -> tuple[dict, list[Row]]:
    """Settings, and the summary where it is finished, of a run's folder; and its rows.

    Raises DTEError for what no run has left, and for rows that are not those of the summary.
    """
    path, table = folder / "run.json", folder / "measures.csv"
    document = read_settings(path, AGAIN)
    settings, summary = document.get("settings"), document.get("summary", [])
    for name in ("methods", "scenes"):
        texts = settings.get(name) if isinstance(settings, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DTEError(f"{path} has no settings of a run: {AGAIN}.")
    rows = read_csv(table) if table.exists() or summary else []
    if "summary" in document:
        edits, concepts, asked = defaultdict(list), Counter(), defaultdict(set)
        for row in rows:
            edits[row.method, row.steps, row.concept].append(row.edit)
        for (method, steps, concept), names in edits.items():
            concepts[method, steps] += 1
            asked[concept].add(frozenset(names))  # of every method the same
        try:
            told = {(x["method"], x["steps"]): x["identity"]["n"] for x in summary}
        except (TypeError, LookupError) as error:
            raise DTEError(f"The summary in {path} is damaged: {AGAIN}.") from error
        alike = all(len(kinds) == 1 for kinds in asked.values())
        once = all(len(set(names)) == len(names) for names in edits.values())
        if told != concepts or not alike or not once:
            raise DTEError(f"{table} has not the rows of which {path} has the summary: {AGAIN}.")
    return document, rows


def _read(column: str, text: str) -> str | int | bool | float | None:
    if column in NUMBERS:
        if text and not math.isfinite(float(text)):
            raise ValueError(f"{column} is {text}")
        return float(text) if text else None
    if column in ("steps", "is_style"):
        return int(text) if column == "steps" else bool(int(text))
    return text


def versions() -> dict[str, str]:
    """Of what numbers depend on, and the date."""
    packages = ("torch", "diffusers", "transformers", "numpy")
    names = {"dte_lab": __version__, "python": platform.python_version()}
    return names | {name: version(name) for name in packages} | {"date": time.strftime("%Y-%m-%d")}


def fingerprint(*modules: nn.Module) -> str:
    """Changes when any weight of the modules does: the first 16 digits of a SHA-256."""
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def write_document(path: Path, document: dict, lists: tuple[str, ...]) -> None:
    """JSON in which each row of the named lists, which come last, has one line."""
    head = {key: value for key, value in document.items() if key not in lists}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    for key in lists:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in document[key])
        text += f',\n "{key}": [\n{lines}\n ]'
    write_atomically(path, (text + "\n}\n").encode())
