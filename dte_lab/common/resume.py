"""Going on with a run: with the same settings, and without what was logged after its last state.

A run's settings are a dict by group, {"train": TrainConfig(...), "encoder": EncoderConfig(...)},
of dataclasses or of anything that JSON knows.
"""

import json
from collections.abc import Collection
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from dte_lab.common.errors import DTEError
from dte_lab.common.files import naming, write_atomically

LOG = "log.jsonl"  # of a run, in its folder


def as_json(settings: dict) -> dict:
    """Settings as they are read back from a JSON file: dataclasses are dicts, tuples lists."""
    return json.loads(json.dumps(settings, default=asdict))


def changed_settings(before: dict, now: dict, free: Collection[str] = ()) -> list[str]:
    """Names of the settings of `now` that were others `before`, such as "encoder.rank".

    before: what `as_json` gave. A field of a dataclass that it lacks, since it is new, had its
    default. free: names of fields that may change.
    """
    changed = []
    for group, value in now.items():
        old = before.get(group)
        if is_dataclass(value) and isinstance(old, dict):
            defaults = {f.name: f.default for f in fields(value) if f.default is not MISSING}
            old = as_json(defaults) | old
        value = as_json({group: value})[group]
        if isinstance(value, dict) and isinstance(old, dict):
            names = [k for k in value | old if k not in old or value.get(k) != old[k]]
            changed += [f"{group}.{name}" for name in names if name not in free]
        elif value != old and group not in free:
            changed.append(group)
    return changed


def check_settings(path: Path, before: dict, now: dict, free: Collection[str] = ()) -> None:
    """Raise DTEError when the run at `path` was begun with other settings: `changed_settings`."""
    if changed := changed_settings(before, now, free):
        raise DTEError(
            f"{path} holds a run with other settings ({', '.join(changed)}): use them again, or "
            f"another {'folder' if path.is_dir() else 'file'}."
        )


def append_line(path: Path, line: dict) -> None:
    """Add one line of JSON to a log."""
    with naming(path), open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a log that are of later steps than `step`, or half written."""
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [x for x in text.splitlines() if _step_of(x) <= step]
        write_atomically(path, "".join(x + "\n" for x in lines).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        RecursionError,
    ):  # the run was killed while it wrote this line
        return float("inf")
