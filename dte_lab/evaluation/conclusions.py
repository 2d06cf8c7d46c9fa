"""What is concluded from the stored tables, in sentences that are checked against their numbers.

A sentence says of two methods that the first is ahead of the second, behind it, or level with it.
It holds where the 95 % interval of their difference, paired by concept, lies above 0, below it, or
includes it. Its numbers are put in when it is written: `python -m tools.results check` prints the
sentences, and a test looks for them in the README, word by word. What the notebooks' prose claims
of stored results is here as well: `python -m tools.notebooks --check` asks the results.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dte_lab.common.errors import DTEError
from dte_lab.common.stats import bracketed, interval, verdict
from dte_lab.evaluation.records import read_csv
from dte_lab.evaluation.report import per_concept
from dte_lab.evaluation.specifications import ADAMW, split_steps


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
        "With the optimizer of the tuning-encoder, LoRA is at {other}, and the difference "
        "{difference}.",
        "table", "dte:12", "lora@optimizer=muon@lora_learning_rate=0.03:12", "ahead",
    ),
    Conclusion(
        "With its prior kept, it is at {other}, and the difference {difference}.",
        "table", "dte:12", "lora-prior:12", "ahead",
    ),
    Conclusion(
        "It is ahead of the E4T-style encoder at 12 steps ({other}), as in the paper: "
        "{difference}.",
        "table", "dte:12", "e4t@token_learning_rate=0.05:12", "ahead",
    ),
    Conclusion(
        "To say in tuning what else the picture shows keeps the scenes, {one} of them against "
        "{other}: {difference}.",
        "table", "dte:12", 'dte@prompts=["a picture of S*"]:12', "ahead", "scene",
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
    Conclusion(
        "The tuning-encoder's 12 steps are level with LoRA's 120, {one} against {other}: "
        "{difference}.",
        "long", "dte:12", "lora@lora_learning_rate=0.006:120", "level",
    ),
    Conclusion(
        "They are level with LoRA's 120 with its prior kept ({other}), too: {difference}.",
        "long", "dte:12", "lora-prior@lora_learning_rate=0.006:120", "level",
    ),
    Conclusion(
        "They are ahead of 500 steps of Textual Inversion ({other}): {difference}.",
        "long", "dte:12", "ti@batch_size=4:500", "ahead",
    ),
    Conclusion(
        "They are level with 50 steps of the E4T-style encoder ({other}): {difference}.",
        "long", "dte:12", "e4t@token_learning_rate=0.05:50", "level",
    ),
    Conclusion(
        "25 steps of the tuning-encoder are level with those 50, {one} against {other}: "
        "{difference}.",
        "long", "dte:25", "e4t@token_learning_rate=0.05:50", "level",
    ),
    Conclusion(
        "After 25 steps, 25 more bring nothing ({one}): {difference}.",
        "long", "dte:50", "dte:25", "level",
    ),
    Conclusion(
        "Cut from rank 16 to rank 4 before tuning, the prediction is as good, {one} against "
        "{other}: {difference}.",
        "rank", "dte@rank=4:0", "dte@rank=16:0", "level",
    ),
    Conclusion(
        "What 12 steps make of it is not, {one} against {other}: {difference}.",
        "rank", "dte@rank=4:12", "dte@rank=16:12", "behind",
    ),
    Conclusion(
        "To predict anew at every step of sampling takes {other} to {one}: {difference}.",
        "refresh", "dte@prediction_interval=1:12", "dte:12", "behind",
    ),
    Conclusion(
        "In 12 steps the contrastive term is level with no regulariser, {one} and {other}: "
        "{difference}.",
        "regularisers", "dte@regulariser=contrastive:12", "dte@regulariser=none:12", "level",
    ),
    Conclusion(
        "To take the nearest real word for v* costs most, {one} after 12 steps: {difference}.",
        "regularisers", "dte@regulariser=nearest:12", "dte@regulariser=none:12", "behind",
    ),
    Conclusion(
        "An encoder trained with the contrastive term is level with one trained without it after "
        "12 steps, {one} and {other}: {difference}.",
        "editability", "dte:12", "dte@encoder=small/none:12", "level",
    ),
    Conclusion(
        "So it is where the soft path draws alone, {one} and {other}: {difference}.",
        "editability", "dte@alpha_blend=1:12", "dte@alpha_blend=1@encoder=small/none:12", "level",
    ),
    Conclusion(
        "Before tuning, the blend of both paths is behind the soft path alone, {one} against "
        "{other}: {difference}.",
        "editability", "dte:0", "dte@alpha_blend=1:0", "behind",
    ),
    Conclusion(
        "After 12 steps the blend is ahead, {one} against {other}: {difference}.",
        "editability", "dte:12", "dte@alpha_blend=1:12", "ahead",
    ),
    Conclusion(
        "From no encoder, orthogonal updates of the offsets (Muon) are ahead of AdamW's after 12 "
        "steps, {one} against {other}: {difference}.",
        "optimizer", "dte@encoder=zero-shot:12", f"dte@encoder=zero-shot@{ADAMW}:12", "ahead",
    ),
    Conclusion(
        "From the encoder's prediction 12 things do not tell them apart, {one} against {other}: "
        "{difference}.",
        "optimizer", "dte:12", f"dte@{ADAMW}:12", "level",
    ),
    Conclusion(
        "For DreamBooth LoRA Muon is ahead ({one} against {other}): {difference}.",
        "optimizer", "lora@optimizer=muon@lora_learning_rate=0.03:12", "lora:12", "ahead",
    ),
    Conclusion(
        "For the E4T-style encoder both are level, {one} against {other}: {difference}.",
        "optimizer",
        "e4t@token_learning_rate=0.05@optimizer=muon@multiplicative_learning_rate=0.015:12",
        "e4t@token_learning_rate=0.05:12", "level",
    ),
    Conclusion(
        "After 50 steps they are level for the tuning-encoder as well, {one} against {other}: "
        "{difference}.",
        "optimizer", "dte:50", f"dte@{ADAMW}:50", "level",
    ),
    Conclusion(
        "But that takes a rate that falls: at one that stays Muon is behind after 50 steps, {one} "
        "against {other}: {difference}.",
        "optimizer", "dte@constant_steps=50:50", "dte:50", "behind",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A sentence of a notebook's prose that compares what is stored; it stands there word by word.

    It has no numbers, so it stays as it is while it is true. notebook: such as "05_tuning".
    holds: asks the folder of results.
    """

    notebook: str
    text: str
    holds: Callable[[Path], bool]


def _document(results: Path, name: str) -> dict:
    return json.loads((results / name).read_text())


def _whole_matrices_cost_most(results: Path) -> bool:
    variants = _document(results, "encoders.json")["variants"]
    ranks = [v for v in variants if str(v.get("rank", "")).isdigit() or v["name"] == "base"]
    (whole,) = (v for v in variants if v.get("rank") == "full")
    seconds = [v["minutes"] / v["steps"] for v in (whole, *ranks)]
    numbers = [v["hypernetwork"] for v in (whole, *ranks)]
    return max(seconds[1:]) < seconds[0] and max(numbers[1:]) < numbers[0]


def _two_paths_cost_little_more(results: Path) -> bool:
    document = _document(results, "dual_path.json")
    return document["ways"]["dual attention figure"]["over_single"] <= document["goal"]


def _concepts_differ_more_than_settings(results: Path) -> bool:
    """The standard deviation of identity over concepts in one setting, and over settings' means."""
    by_setting = {}
    for row in _document(results, "blending.json")["rows"]:
        if row["alpha_blend"] is not None:
            key = row["offsets_on"], row["granularity"], row["alpha_blend"]
            by_setting.setdefault(key, []).append(row["identity"])
    table = np.array(list(by_setting.values()))  # (settings, concepts)
    return bool(table.std(1).mean() > table.mean(1).std())


def _loss_falls_while_pictures_get_worse(results: Path) -> bool:
    """From 12 steps to the last number: of each concept, the differences, by interval."""
    points = [p for p in _document(results, "steps.json")["points"] if p["method"] == "dte"]
    last = max(point["steps"] for point in points)

    def change(measure: str) -> dict[str, float]:
        at = {(p["concept"], p["steps"]): p[measure] for p in points}
        names = sorted({p["concept"] for p in points})
        return interval(np.array([at[name, last] - at[name, 12] for name in names]))

    return change("loss")["high"] < 0 and change("fidelity")["high"] < 0


CLAIMS = [
    Claim(
        "03_lora_hypernetwork",
        "whole matrices cost the most, in numbers and in seconds per step.",
        _whole_matrices_cost_most,
    ),
    Claim(
        "04_dual_path",
        "Two prompts and two sets of weights in one model, for little more than one costs.",
        _two_paths_cost_little_more,
    ),
    Claim(
        "04_dual_path",
        "Concepts differ more than settings do:",
        _concepts_differ_more_than_settings,
    ),
    Claim(
        "05_tuning",
        "show that the loss goes on falling while the pictures get worse;",
        _loss_falls_while_pictures_get_worse,
    ),
]
