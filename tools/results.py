"""Every stored result by one command, and what is concluded from them.

    python -m tools.results                                  what is up to date, and minutes
    python -m tools.results make [NAME ...] [--wide CACHE]   the named, or all that are not
    python -m tools.results write                            them into README and model card
    python -m tools.results check                            conclusions, against the numbers

A result is up to date as long as its command, the weights that it was made with and the settings of
the methods are what they were: `results/made.json` keeps a digest of them, and the minutes that it
took. Runs lie in `runs/results`, one folder for each digest: what was cut off goes on. Needs the
extra `evaluate`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dte_lab.backbone import WEIGHTS
from dte_lab.baselines import BaselineConfig
from dte_lab.common.command import run_command
from dte_lab.common.errors import DTEError
from dte_lab.common.files import read_settings, write_atomically
from dte_lab.common.processes import usable_cores
from dte_lab.common.settings import check_number, check_text, check_whole
from dte_lab.config import MethodConfig
from dte_lab.evaluation.conclusions import CONCLUSIONS
from dte_lab.recommended import SMALL_WORLD
from dte_lab.tuning import TuneConfig
from tools import results_tables

ROOT = Path(__file__).parents[1]
RESULTS, RUNS = ROOT / "results", ROOT / "runs" / "results"
MADE = RESULTS / "made.json"
BRING_BACK = "bring it back as it was"
BASE = ("unet", "vae", "text_encoder", "image_encoder")
ENCODER = (*BASE, "encoder")
ALL = (*ENCODER, "ablations", "e4t")
TABLE = ("measures.csv", "run.json", "table.md")  # what is kept of a run
FOLDER = (*TABLE, "tradeoff.png")
USUAL = (SMALL_WORLD, TuneConfig(), MethodConfig(), BaselineConfig())
SCENES = ("--scene", "beach", "--scene", "night", "--scene", "red")


@dataclass(frozen=True)
class Result:
    """What is made by `python -m` with these arguments.

    OUT among them becomes the run's folder, CORES the number of processes, WIDE the cache of the
    wide world. reads: folders of the small backbone. keeps: files of the run's folder that are
    stored, in a folder of the result's name where it is a run of `dte evaluate`.
    """

    arguments: tuple[str, ...]
    reads: tuple[str, ...] = ENCODER
    keeps: tuple[str, ...] = FOLDER

    def digest(self) -> str:
        """Of the command, of the weights that it reads, and of the usual settings of methods."""
        found = hashlib.sha256(json.dumps(self.arguments).encode())
        if self.compares_methods:
            found.update(json.dumps([asdict(usual) for usual in USUAL]).encode())
        for part in self.reads:
            for path in sorted((WEIGHTS / "small" / part).rglob("*.safetensors")):
                found.update(path.read_bytes())
        return found.hexdigest()[:16]

    @property
    def needs_wide(self) -> bool:
        return "WIDE" in self.arguments

    @property
    def compares_methods(self) -> bool:
        """Whether anything is tuned or trained for it, or the base model alone is measured."""
        return self.needs_wide or self.reads != BASE

    @property
    def is_folder(self) -> bool:
        return self.keeps[: len(TABLE)] == TABLE


def evaluation(
    *arguments: str, reads: tuple[str, ...] = ENCODER, keeps: tuple[str, ...] = FOLDER
) -> Result:
    """A run of `dte evaluate`."""
    command = ("dte_lab", "evaluate", "--out", "OUT", "--processes", "CORES", *arguments)
    return Result(command, reads, keeps)


def methods(*specifications: str) -> tuple[str, ...]:
    return tuple(word for text in specifications for word in ("--method", text))


def document(module: str, *arguments: str, keeps: tuple[str, ...], reads=ENCODER) -> Result:
    """What a module of its own measures and writes as the first of `keeps`."""
    return Result((module, "--out", f"OUT/{keeps[0]}", *arguments), reads, keeps)


MEASURES = "dte_lab.evaluation"
CHOOSING = ("--split", "val", "--concepts", "12")
RESULT = {
    "rates": evaluation("--experiment", "rates", *CHOOSING, *SCENES, reads=ALL),
    "optimizer": evaluation("--experiment", "optimizer", *CHOOSING, *SCENES, reads=ALL),
    "mask": evaluation(
        *methods("dte:0,12", "dte@masked=true:0,12"), "--split", "val", "--concepts", "24", *SCENES
    ),
    "table": evaluation("--experiment", "table", *SCENES, reads=ALL),
    "unseen_style": evaluation(
        *methods("dte:0,12", "dte@part=word:0", "dte@part=weights:0"),
        *("--split", "fxemoji", "--concepts", "36"),
        *SCENES,
    ),
    "long": evaluation("--experiment", "long", "--concepts", "10", *SCENES, reads=ALL),
    "world": Result(
        ("dte_lab", "world", "evaluate", "--captions", "500", "--out", "OUT/world.json"),
        BASE,
        ("world.json",),
    ),
    "word_voice": document(f"{MEASURES}.word_voice", keeps=("word_voice.json",)),
    "rank": evaluation("--experiment", "rank", "--concepts", "20", *SCENES),
    "refresh": evaluation(
        *methods("dte:0,12", *(f"dte@prediction_interval={n}:0,12" for n in (1, 5))),
        *CHOOSING,
        *SCENES,
    ),
    "editability": evaluation(
        *methods(
            *(f"dte{e}:0,12" for e in ("", "@encoder=small/none")),
            *(f"dte@alpha_blend=1{e}:0,12" for e in ("", "@encoder=small/none")),
        ),
        *SCENES,
        reads=ALL,
    ),
    "regularisers": evaluation("--experiment", "regulariser", "--concepts", "20", *SCENES),
    "blending": document(f"{MEASURES}.blending", keeps=("blending.json",)),
    "regularisation": document(
        f"{MEASURES}.regularisation", keeps=("regularisation.json", "regularisation.safetensors")
    ),
    "steps": document(
        f"{MEASURES}.steps",
        *("--run", "OUT/run", "--processes", "CORES"),
        keeps=("steps.json",),
        reads=ALL,
    ),
    "own_encoder": Result(
        ("dte_lab.evaluation.own_encoder", "--out", "OUT/own_encoder", "--run", "OUT/run"),
        keeps=("own_encoder/run.json", "own_encoder/pictures.png"),
    ),
    "encoders": document(
        f"{MEASURES}.encoders",
        *("--runs", "OUT/encoders", "--wide", "WIDE", "--seeds", "3"),
        keeps=("encoders.json",),
        reads=BASE,
    ),
}


def made() -> dict[str, dict]:
    """{name: digest, minutes and processes} of what is stored.

    Raises DTEError, which names file and entry, where the file holds anything else.
    """
    if not os.path.lexists(MADE):
        return {}
    found = read_settings(MADE, BRING_BACK)
    for name, entry in found.items():
        try:
            if not isinstance(entry, dict) or entry.keys() != {"digest", "minutes", "processes"}:
                raise DTEError("it holds digest, minutes and processes, and nothing else")
            check_text("digest", entry["digest"])
            check_number("minutes", entry["minutes"], 0)
            check_whole("processes", entry["processes"], 1)
        except DTEError as error:
            reason = str(error).rstrip(".")
            raise DTEError(f"{MADE}: {name!r} is damaged ({reason}): {BRING_BACK}.") from error
    return found


def is_current(name: str) -> bool:
    return made().get(name, {}).get("digest") == RESULT[name].digest()


def plan() -> list[str]:
    """A line for each result."""
    lines = []
    for name in RESULT:
        minutes = made().get(name, {}).get("minutes")
        took = "never made here" if minutes is None else f"took {minutes:.0f} min"
        lines.append(f"{name:16}{'up to date' if is_current(name) else 'to be made':12}{took}")
    return lines


def make(name: str, wide: Path | None = None) -> None:
    """Run a result's command and store what it keeps.

    Raises DTEError for a command that fails, and without the wide world for one that needs it.
    """
    result = RESULT[name]
    if result.needs_wide and wide is None:
        raise DTEError(f"{name} trains encoders: give --wide, what `dte world build --wide` wrote.")
    digest = result.digest()
    run = RUNS / f"{name}-{digest}"
    run.mkdir(parents=True, exist_ok=True)
    words = {"OUT": str(run), "CORES": str(usable_cores()), "WIDE": str(wide)}
    arguments = [
        words.get(a, a.replace("OUT/", f"{run}/", 1) if a.startswith("OUT/") else a)
        for a in result.arguments
    ]
    started = time.monotonic()
    if subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT).returncode:
        raise DTEError(f"{name} was not made: see above; the same command goes on with {run}.")
    minutes = (time.monotonic() - started) / 60
    folder = RESULTS / name if result.is_folder else RESULTS
    folder.mkdir(exist_ok=True)
    for file in result.keeps:
        write_atomically(folder / file, (run / file).read_bytes())
    entry = {"digest": digest, "minutes": round(minutes, 1), "processes": usable_cores()}
    write_atomically(MADE, json.dumps(made() | {name: entry}, indent=1).encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The number of conclusions that do not hold; 0 for the other commands."""
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=__doc__)
    parser.add_argument(
        "command", nargs="?", choices=("plan", "make", "write", "check"), default="plan"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RESULT))
    parser.add_argument("--wide", type=Path)
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - RESULT.keys():
        parser.error(f"no result {min(unknown)!r}: use {', '.join(RESULT)}.")
    if given.command == "check":
        wrong = [c for c in CONCLUSIONS if not c.holds(RESULTS)]
        for conclusion in CONCLUSIONS:
            print("DOES NOT HOLD" if conclusion in wrong else "holds", conclusion.sentence(RESULTS))
        return len(wrong)
    if given.command == "write":
        for page in results_tables.PAGES:
            text = results_tables.written(page, (ROOT / page).read_text(), RESULTS)
            write_atomically(ROOT / page, text.encode())
        return 0
    if given.command == "plan":
        print("\n".join(plan()))
        return 0
    possible = (n for n, result in RESULT.items() if given.wide or not result.needs_wide)
    for name in given.names or possible:
        if given.names or not is_current(name):
            make(name, given.wide)
    return 0


if __name__ == "__main__":
    run_command(main)
