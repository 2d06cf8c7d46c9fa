"""What is concluded from the stored tables, in sentences that are checked against their numbers.

A sentence says of two methods that the first is ahead of the second, behind it, or level with it.
It holds where the 95 % interval of their difference, paired by concept, lies above 0, below it, or
includes it. Its numbers are put in when it is written: `python -m tools.results check` prints the
sentences, and a test looks for them in the README, word by word.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dte_lab.common.errors import DTEError
from dte_lab.common.stats import bracketed, interval, verdict
from dte_lab.evaluation.records import read_csv
from dte_lab.evaluation.report import per_concept
from dte_lab.evaluation.specifications import split_steps


@dataclass(frozen=True)
class Conclusion:
    """A sentence with {one}, {other} and {difference}, which become numbers.

    run: folder of a stored run. one, other: a method with one number of steps, as in dte:12, or an
    anchor. said: ahead, behind or level. measure: of `report.per_concept`.
    """

    text: str
    run: str
    one: str
    other: str
    said: str
    measure: str = "fidelity"

    def numbers(self, results: Path) -> dict[str, dict[str, float]]:
        """{mean, low, high, n} of both and of their difference by concept.

        Raises DTEError for a method that the run does not have.
        """
        one, other = (self._of(results, method) for method in (self.one, self.other))
        both = [name for name in one if name in other]
        pairs = np.array([[one[name], other[name]] for name in both])
        return {
            "one": interval(pairs[:, 0]),
            "other": interval(pairs[:, 1]),
            "difference": interval(pairs[:, 0] - pairs[:, 1]),
        }

    def _of(self, results: Path, method: str) -> dict[str, float]:
        label, steps = split_steps(method)
        table = stored_cells(results / self.run / "measures.csv")
        try:
            of_method = table[label, *(steps or (0,))]
        except KeyError as error:
            raise DTEError(f"The run {self.run} has no {method}: it was made otherwise.") from error
        return {name: cell[self.measure] for name, cell in of_method.items()}

    def holds(self, results: Path) -> bool:
        difference = self.numbers(results)["difference"]
        return self.said == verdict(difference, "ahead", "behind", "level")

    def sentence(self, results: Path) -> str:
        """The text with its numbers, and their intervals."""
        numbers = self.numbers(results)
        one, other = (f"{numbers[name]['mean']:.3f}" for name in ("one", "other"))
        return self.text.format(one=one, other=other, difference=bracketed(numbers["difference"]))


def stored_cells(path: Path) -> dict:
    """`per_concept` of a stored table."""
    return _cells(path, path.stat().st_mtime)


@cache
def _cells(path: Path, changed: float) -> dict:  # changed: so that it is read anew when it has
    return per_concept(read_csv(path))


CONCLUSIONS = [
    Conclusion(
        "After 12 steps the tuning-encoder is ahead of Textual Inversion at 12, {one} against "
        "{other}: {difference}.",
        "table", "dte:12", "ti@token_learning_rate=0.2:12", "ahead",
    ),
    Conclusion(
        "It is ahead of DreamBooth LoRA at 12 steps ({other}): {difference}.",
        "table", "dte:12", "lora:12", "ahead",
    ),
    Conclusion(
        "With its prior kept, LoRA is at {other}, and the difference {difference}.",
        "table", "dte:12", "lora-prior:12", "ahead",
    ),
    Conclusion(
        "The E4T-style encoder at 12 steps ({other}) is level with it, against the paper: "
        "{difference}.",
        "table", "dte:12", "e4t@token_learning_rate=0.05:12", "level",
    ),
    Conclusion(
        "To say in tuning what else the picture shows changes nothing at 12 steps ({other} "
        "without): {difference}.",
        "table", "dte:12", 'dte@prompts=["a picture of S*"]:12', "level",
    ),
    Conclusion(
        "Before tuning, the predicted word alone is level with the whole prediction, {one} against "
        "{other}: {difference}.",
        "table", "dte@part=word:0", "dte:0", "level",
    ),
    Conclusion(
        "Twelve steps bring {one} from {other} in a style that no training saw: {difference}.",
        "unseen_style", "dte:12", "dte:0", "ahead",
    ),
]  # fmt: skip
