"""The explorer's history: what was asked and what came of it, as a table and as a small file.

The file is JSON without pictures: settings, prompts, seeds, measures and words, so that somebody
else can take a run up again. Somebody else's file is read as what it is, text of a stranger.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import write_atomically
from dte_lab.common.settings import check_number, check_text
from dte_lab.common.sources import each_picture
from dte_lab.panels.explorer_measures import LOWER_IS_BETTER, NAMES
from dte_lab.panels.explorer_runs import Outcome, Question, Subject
from dte_lab.panels.explorer_settings import ExplorerSetting
from dte_lab.world.sprites import sprite

HISTORY_FORMAT = "dte-explorer-1"
MOST_BYTES, MOST_RUNS = 5_000_000, 1000
FAULTS = (ValueError, TypeError, KeyError, RecursionError)  # of a file that is none of ours


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
        """From JSON. Raises one of FAULTS."""
        measures = values["measures"]
        for name, value in measures.items():
            if name not in NAMES:
                raise DTEError(f"There is no measure {name!r}.")
            check_number(name, value)
        words = [[[w, c] for w, c in values[name]] for name in ("words_before", "words_after")]
        for word, cosine in (pair for both in words for pair in both):
            check_text("a word", word)
            check_number("a cosine", cosine)
        check_text("the error", values["error"])
        return cls(ExplorerSetting.read(values["setting"]), dict(measures), *words, values["error"])


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
        """From JSON. Raises one of FAULTS."""
        subject = Subject(*(values["picture"][name] for name in ("name", "style")),
                          digest=values["picture"]["digest"])  # fmt: skip
        for text in (subject.name, subject.digest, values["where"]):
            check_text("a name", text)
        if subject.style is not None:
            check_text("a style", subject.style)
            sprite(subject.name, subject.style)  # complains of what there is not
        question = Question(subject, tuple(values["prompts"]), tuple(values["seeds"]))
        question.check()
        a, b = values["sides"]
        return cls(question, (Side.read(a), Side.read(b)), values["where"])


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
    found = each_picture(source)
    if len(found) != 1:
        raise DTEError(f"One history at a time can be read, not {len(found)}.")
    given, name = found[0]
    try:
        data = bytes(given) if not isinstance(given, str | Path) else Path(given).read_bytes()
    except OSError as error:
        raise DTEError(f"{name} cannot be read ({reason_of(error)}).") from error
    if len(data) > MOST_BYTES:
        raise DTEError(f"{name} is no history: it has more than {MOST_BYTES // 10**6} MB.")
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format") != HISTORY_FORMAT:
            raise ValueError(f"its format is not {HISTORY_FORMAT}")
        if not isinstance(document["runs"], list) or len(document["runs"]) > MOST_RUNS:
            raise ValueError(f"it holds no list of at most {MOST_RUNS} runs")
        return [Run.read(values) for values in document["runs"]]
    except (*FAULTS, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DTEError(
            f"{name} is no readable history of the explorer ({reason}): save it again."
        ) from error
