"""The explorer's history: what was asked and what came of it, as a table and as a small file.

The file is JSON without pictures: settings, prompts, seeds, measures and words, so that somebody
else can take a run up again. Somebody else's file is read as what it is, text of a stranger.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.common.settings import check_number, check_text, cited
from dte_lab.common.sources import ImageError, each_picture, opened
from dte_lab.panels.explorer_measures import LOWER_IS_BETTER, NAMES
from dte_lab.panels.explorer_runs import Outcome, Question, Subject
from dte_lab.panels.explorer_settings import ExplorerSetting
from dte_lab.world.sprites import sprite

HISTORY_FORMAT = "dte-explorer-2"
MOST_BYTES, MOST_RUNS = 5_000_000, 1000
MOST = 1e9  # of a measure


@dataclass(frozen=True)
class Side:
    """One setting of a run and what came of it; error: what was wrong, where nothing came."""

    setting: ExplorerSetting
    measures: dict[str, float] = field(default_factory=dict)
    words_before: list = field(default_factory=list)
    words_after: list = field(default_factory=list)
    error: str = ""

    @classmethod
    def of(cls, setting: ExplorerSetting, outcome: Outcome | DTEError) -> Self:
        if isinstance(outcome, DTEError):
            return cls(setting, error=str(outcome))
        seconds = {name: getattr(outcome, name) for name in ("seconds", "drawing_seconds")}
        return cls(setting, outcome.measures | seconds, outcome.words_before, outcome.words_after)

    @classmethod
    def read(cls, values: dict) -> Self:
        """From JSON. Raises DTEError for anything else than what `asdict` made."""
        setting, measures, *words, error = held("a side", values, [f.name for f in fields(cls)])
        if not isinstance(measures, dict) or not measures.keys() <= NAMES.keys():
            raise DTEError(f"measures are some of {', '.join(NAMES)}, not {cited(measures)}.")
        for name, value in measures.items():
            check_number(name, value, -MOST, MOST)
        for found in words:
            for word, cosine in (listed("a word", pair, 2) for pair in listed("words", found)):
                check_text("a word", word)
                check_number("a cosine", cosine, -MOST, MOST)
        check_text("error", error)
        return cls(ExplorerSetting.read(setting), measures, *words, error)


@dataclass(frozen=True)
class Run:
    """A question and its two sides; where: the stop of an expedition, or ""."""

    question: Question
    sides: tuple[Side, Side]
    where: str = ""

    @classmethod
    def of(
        cls,
        question: Question,
        settings: Sequence[ExplorerSetting],
        outcomes: Sequence[Outcome | DTEError],
        where: str = "",
    ) -> Self:
        """Of what `Explorer.compare` answered."""
        a, b = (Side.of(*pair) for pair in zip(settings, outcomes, strict=True))
        return cls(question, (a, b), where)

    @property
    def named(self) -> list[tuple[str, Side]]:
        return list(zip("AB", self.sides, strict=True))

    @property
    def told(self) -> str:
        """What came of the change from A to B, in one sentence of the measures that differ."""
        a, b = self.sides
        if a.error or b.error:
            return " ".join(f"{name}: {side.error}" for name, side in self.named if side.error)
        said = []
        for name, (label, digits) in NAMES.items():
            if name in a.measures and name in b.measures:
                x, y = (round(side.measures[name], digits) for side in self.sides)
                if x != y and not name.endswith("seconds"):
                    better = name != "word_length" and (y < x) == (name in LOWER_IS_BETTER)
                    mark = ", better" if better else ""
                    said.append(f"{label} {y:.{digits}f} against {x:.{digits}f}{mark}")
        if not said:
            return "No measure tells B from A."
        count = len(self.question.prompts) * len(self.question.seeds)
        return f"B against A, mean of {count}: {'; '.join(said)}."

    def as_json(self) -> dict:
        subject = self.question.subject
        return {
            "picture": {"name": subject.name, "style": subject.style, "digest": subject.digest},
            "prompts": list(self.question.prompts), "seeds": list(self.question.seeds),
            "where": self.where, "sides": [asdict(side) for side in self.sides],
        }  # fmt: skip

    @classmethod
    def read(cls, values: dict) -> Self:
        """From JSON. Raises DTEError for anything else than what `as_json` made."""
        names = ["picture", "prompts", "seeds", "where", "sides"]
        picture, prompts, seeds, where, sides = held("a run", values, names)
        name, style, digest = held("picture", picture, ["name", "style", "digest"])
        for what, text in (("name", name), ("digest", digest), ("where", where)):
            check_text(what, text)
        if style is not None:
            check_text("style", style)
            sprite(name, style)  # complains of what there is not
        question = Question(
            Subject(name, style, digest=digest),
            tuple(listed("prompts", prompts)), tuple(listed("seeds", seeds)),
        )  # fmt: skip
        question.check()
        read = []
        for letter, side in zip("AB", listed("sides", sides, 2), strict=True):
            with told_at(letter):
                read.append(Side.read(side))
        return cls(question, tuple(read), where)


def held(what: str, values: object, names: Sequence[str]) -> list[Any]:
    """The values of an object that has these names and no others. Raises DTEError."""
    if not isinstance(values, dict) or values.keys() != set(names):
        raise DTEError(f"{what} holds {', '.join(names)}, and nothing else.")
    return [values[name] for name in names]


def listed(what: str, values: object, length: int | None = None) -> list:
    """A list, of this length. Raises DTEError for anything else."""
    if not isinstance(values, list) or length not in (None, len(values)):
        of = "" if length is None else f" of {length}"
        raise DTEError(f"{what}: a list{of} is needed, not {cited(values)}.")
    return values


@contextmanager
def told_at(place: str) -> Iterator[None]:
    """A DTEError inside says where in the file it is."""
    try:
        yield
    except DTEError as error:
        raise DTEError(f"{place}: {error}") from error


def dumped(runs: Sequence[Run]) -> str:
    """The file's text."""
    return json.dumps({"format": HISTORY_FORMAT, "runs": [run.as_json() for run in runs]}, indent=1)


def save_history(runs: Sequence[Run], path: str | Path) -> None:
    """Write the history whole. Raises OSError where it cannot be written."""
    write_atomically(path, dumped(runs).encode())


def load_history(source: object) -> list[Run]:
    """Runs from a path, or from what an upload widget gives.

    Raises DTEError, one sentence, for what is damaged, of another kind, or too large.
    """
    try:
        found = each_picture(source)
    except ImageError:  # an upload widget that is empty
        found = []
    if len(found) != 1:
        raise DTEError(f"One history at a time can be read, not {len(found)}.")
    given, name = found[0]
    name = "the history" if name == "the picture" else name
    file = opened(given, name)
    data = b"" if isinstance(file, Image.Image) else file.read()
    if len(data) > MOST_BYTES:
        raise DTEError(f"{name} is no history: it has more than {MOST_BYTES // 10**6} MB.")
    try:
        document = json.loads(data)
        format_, runs = held("the file", document, ["format", "runs"])
        if format_ != HISTORY_FORMAT:
            raise DTEError(f"its format is not {HISTORY_FORMAT}")
        if len(listed("runs", runs)) > MOST_RUNS:
            raise DTEError(f"it holds more than {MOST_RUNS} runs")
        read = []
        for number, values in enumerate(runs, 1):
            with told_at(f"run {number}"):
                read.append(Run.read(values))
        return read
    except (ValueError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise DTEError(
            f"{name} is no readable history of the explorer ({reason}): save it again."
        ) from error
