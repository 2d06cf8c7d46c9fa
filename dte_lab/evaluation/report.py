"""From a run's rows to numbers with bootstrap intervals over concepts, and tables of them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dte_lab.common.errors import DTEError
from dte_lab.common.files import check_path
from dte_lab.common.stats import bracketed, interval
from dte_lab.evaluation.measures import LOSSES, PICTURE_MEASURES, TIMES, WORD_MEASURES
from dte_lab.evaluation.records import AGAIN, Row, read_run
from dte_lab.evaluation.specifications import ANCHORS

REFERENCE = "dte"
FOLLOWING = ("truth_similarity", "truth_rmse")  # measured on style edits
Cell = dict[str, float]  # measure -> mean over the edits of one concept
OF_CONCEPT = (*WORD_MEASURES, *LOSSES, *TIMES)
METHOD_NAMES = {
    "dte": "tuning encoder", "ti": "Textual Inversion", "lora": "DreamBooth LoRA",
    "lora-prior": "DreamBooth LoRA, prior kept", "e4t": "E4T-style encoder",
    "oracle": "true rendering", "other": "another concept, true rendering",
}  # fmt: skip


def per_concept(rows: Iterable[Row]) -> dict[tuple[str, int], dict[str, Cell]]:
    """{(method, steps): {concept: {measure: value}}}, means over edits.

    Identity, prompt fidelity and diversity over the scene edits, distance to the truth over the
    style edits. Adds, per concept, `identity_scaled`: the margin of identity over other concepts in
    units of the mean margin of true renderings (0: no more like this concept than like any other);
    `fidelity`, the harmonic mean of it and `scene`; `fidelity_small`, that of the CLIP measures.
    """
    cells = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        cell = cells[row.method, row.steps][row.concept]
        of_edit = [name for name in PICTURE_MEASURES if row.is_style == (name in FOLLOWING)]
        for name in (*of_edit, *OF_CONCEPT):
            if (value := getattr(row, name)) is not None:
                cell[name].append(value)
    table = {
        key: {
            concept: {name: float(np.mean(values)) for name, values in cell.items()}
            for concept, cell in of_method.items()
        }
        for key, of_method in cells.items()
    }
    unit = np.mean([cell["identity_margin"] for cell in table["oracle", 0].values()])
    for of_method in table.values():
        for cell in of_method.values():
            cell["identity_scaled"] = float(np.clip(cell["identity_margin"] / unit, 0, 1))
            cell["fidelity"] = harmonic(cell["identity_scaled"], cell["scene"])
            cell["fidelity_small"] = harmonic(
                max(0.0, cell["clip_i_small"]), max(0.0, cell["clip_t_small"])
            )
    return table


def groups_of(rows: Iterable[Row]) -> dict[str, str]:
    """{concept: its group}"""
    return {row.concept: row.group for row in rows}


def harmonic(a: float, b: float) -> float:
    """Harmonic mean of two shares; 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def summarise(rows: Sequence[Row]) -> list[dict]:
    """One dict per method and steps: measure -> {mean, low, high, n}, intervals over concepts.

    `ahead` is how far the tuning encoder at its most steps (12 or fewer) is ahead on `fidelity`,
    paired by concept: an interval above 0 says it is ahead.
    """
    table = per_concept(rows)
    ours = [steps for method, steps in table if method == REFERENCE]
    ours = max([s for s in ours if s <= 12] or ours, default=None)
    summary = []
    for (method, steps), of_method in table.items():
        measures = defaultdict(list)
        for concept, cell in of_method.items():
            for name, value in cell.items():
                measures[name].append(value)
            reference = table.get((REFERENCE, ours), {}).get(concept)
            if reference and (method, steps) != (REFERENCE, ours):
                measures["ahead"].append(reference["fidelity"] - cell["fidelity"])
        values = {name: interval(np.array(v)) for name, v in measures.items()}
        summary.append({"method": method, "steps": steps, **values})
    return summary


def finished(run: Path) -> tuple[list[dict], list[Row]]:
    """Summary and rows of a run's folder.

    Raises DTEError for a run that is not there, not finished or damaged.
    """
    check_path("the run", run)
    run = Path(run)
    check_path("the run", run / "run.json")
    if not (run / "run.json").exists():
        raise DTEError(f"{run} holds no run.json: give the --out of dte evaluate.")
    document, rows = read_run(run)
    if "summary" not in document:
        raise DTEError(f"The run in {run} is not finished: call dte evaluate again to go on.")
    try:
        for row in rows:
            name_of(row.method)
        summary = summarise(rows)
        same = all(map(_agree, summary, document["summary"]))
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise DTEError(
            f"{run / 'measures.csv'} lacks measures, or has methods that there are not "
            f"({error}): {AGAIN}."
        ) from error
    if not same:
        raise DTEError(f"The measures and the summary in {run} are of two runs: {AGAIN}.")
    return summary, rows


def _agree(one: Mapping, other: Mapping) -> bool:
    """Whether a line of a summary says the same as another; LookupError where it says less."""
    return one["method"] == other["method"] and all(
        np.allclose([one[name][k] for k in value], list(value.values()))
        for name, value in other.items()
        if isinstance(value, Mapping)
    )


def paired(rows: Sequence[Row], one: str, other: str) -> list[dict]:
    """Method `one` minus method `other`, both by label: per number of steps that both have, measure
    -> {mean, low, high, n} of the differences by concept.
    """
    table = per_concept(rows)
    lines = []
    for steps in [s for method, s in table if method == one and (other, s) in table]:
        first, second = table[one, steps], table[other, steps]
        both = [(first[concept], second[concept]) for concept in first if concept in second]
        shared = [k for k in both[0][0] if all(k in a and k in b for a, b in both)]
        values = {k: interval(np.array([a[k] - b[k] for a, b in both])) for k in shared}
        lines.append({"steps": steps, **values})
    return lines


def least_steps(rows: Sequence[Row], share: float = 0.95) -> dict[str, dict[str, int]]:
    """{method: {group: the least number of steps with `share` of its best mean `fidelity`}}."""
    means, group_of = defaultdict(lambda: defaultdict(dict)), groups_of(rows)
    for (method, steps), of_method in per_concept(rows).items():
        groups = defaultdict(list)
        for concept, cell in of_method.items():
            groups[group_of[concept]].append(cell["fidelity"])
        for group, values in groups.items():
            means[method][group][steps] = np.mean(values)
    return {
        method: {
            group: min(s for s, v in by_steps.items() if v >= share * max(by_steps.values()))
            for group, by_steps in groups.items()
        }
        for method, groups in means.items()
        if any(len(by_steps) > 1 for by_steps in groups.values())
    }


HEADINGS = {
    "fidelity": "harmonic mean", "ahead": "DTE ahead by", "identity_scaled": "identity, 0 to 1",
    "nearest": "own thing nearest",
    "scene": "scene is right", "truth_similarity": "style edit: similarity to truth",
    "identity": "similarity to input", "clip_i_small": "CLIP-I (small)",
    "clip_t_small": "CLIP-T (small)",
    "word_similarity": "words (MiniLM)", "word_similarity_small": "words (small CLIP)",
    "word_norm": "norm of v*", "borders": "borders", "diversity": "diversity", "seconds": "seconds",
    "seconds_per_picture": "seconds per picture", "extra_memory_mb": "extra MB",
}  # fmt: skip


def markdown(summary: Sequence[Mapping]) -> str:
    """The summary as a table, mean [95 % interval over n concepts]."""
    shown = {k: v for k, v in HEADINGS.items() if any(k in line for line in summary)}
    lines = [
        "| Method | Steps | n | " + " | ".join(shown.values()) + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for line in summary:
        steps = "" if line["method"] in ANCHORS else line["steps"]
        cells = [name_of(line["method"]), str(steps), str(line["identity"]["n"])]
        cells += [cell_text(line.get(name)) for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_table(rows: Sequence[Row]) -> str:
    """`least_steps` as a table with a title, to follow `markdown`; empty where there are none."""
    if not (by_group := least_steps(rows)):
        return ""
    text = "\n\nLeast number of steps with 95 % of a method's best harmonic mean:\n\n"
    groups = sorted({group for groups in by_group.values() for group in groups})
    text += "| Method | " + " | ".join(groups) + " |\n" + "|---" * (len(groups) + 1) + "|\n"
    for name, groups_of in by_group.items():
        text += f"| {name} | " + " | ".join(str(groups_of.get(g, "")) for g in groups) + " |\n"
    return text


def name_of(label: str) -> str:
    """'dte@rank=2' -> 'tuning encoder, rank=2'; the number of steps is told beside it.

    Of an encoder that `encoders.py` trained, DIR/NAME/encoder, the NAME is told.
    """
    name, *options = label.split("@")
    options = [re.sub(r"^encoder=.*?([^/]+)/encoder$", r"encoder=\1", o) for o in options]
    return ", ".join([METHOD_NAMES[name], *(o for o in options if not o.startswith("num_steps="))])


def cell_text(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value["mean"]) >= 100 else 1 if abs(value["mean"]) >= 10 else 3
    return bracketed(value, digits)
