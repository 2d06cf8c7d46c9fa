"""How many tuning steps are enough: curves over the steps, and the least that satisfy per group.

    python -m dte_lab.evaluation.steps --out results/steps.json

Runs the experiment `steps` of `dte evaluate`: each method optimises a concept once, and is looked
at on the way. `--run` is that run's folder; the same command goes on where it was cut off. Needs
the extra `evaluate`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dte_lab.common.command import run_command
from dte_lab.common.stats import interval
from dte_lab.evaluation.measures import LOSSES
from dte_lab.evaluation.records import Row
from dte_lab.evaluation.report import Cell, groups_of, name_of, per_concept
from dte_lab.evaluation.specifications import ANCHORS, STEP_GRID

Points = Mapping[str, Mapping[int, Cell]]  # {concept: {steps: {measure: value}}} of a method
CURVES = ("fidelity", "identity_scaled", "scene", "seconds", *LOSSES)
QUALITIES = ("fidelity", "identity_scaled", "scene")
SHARE = 0.9  # what satisfies: this share of the best mean that any method reaches in the group
FEW = 12  # the paper's number of steps: before it and after it the loss tells different things


def steps_needed(curve: dict[int, float], level: float, patience: int = 0) -> int | None:
    """The least number of steps at which the curve {steps: value} satisfies.

    Its value there, and at the next `patience` numbers of steps that the curve has, is `level` or
    more; where the curve ends fewer will do. None where that never happens.
    """
    steps = sorted(curve)
    good = [curve[s] >= level for s in steps]
    return next((s for i, s in enumerate(steps) if all(good[i : i + patience + 1])), None)


def summarise_steps(rows: Sequence[Row]) -> dict:
    """Curves, least steps, and how well the losses tell the quality, from the rows of a run."""
    table = {k: cells for k, cells in per_concept(rows).items() if k[0] not in ANCHORS}
    points = defaultdict(lambda: defaultdict(dict))  # method, concept, steps
    for method, steps in sorted(table, key=lambda key: key[1]):
        for concept, cell in table[method, steps].items():
            points[method][concept][steps] = cell
    groups, group_of = defaultdict(set), groups_of(rows)
    for concept in set().union(*points.values()):
        groups[group_of[concept]].add(concept)
    return {
        "names": {method: name_of(method) for method in points},
        "curves": {method: step_curves(cells) for method, cells in points.items()},
        "least": {
            group: least(points, sorted(members))
            for group, members in [("all", set().union(*groups.values())), *sorted(groups.items())]
        },
        "guide": {method: guide(cells) for method, cells in points.items()},
        "points": [
            {"method": method, "concept": concept, "steps": steps}
            | {k: round(cell[k], 4) for k in CURVES if k in cell}
            for method, of_method in points.items()
            for concept, by_steps in of_method.items()
            for steps, cell in by_steps.items()
        ],
    }


def step_curves(by_concept: Points) -> dict[str, list[dict]]:
    """{measure: [{steps, mean, low, high, n}, ...]}, 95 % bootstrap intervals over concepts."""
    steps = sorted({s for by_steps in by_concept.values() for s in by_steps})
    return {
        name: [
            {"steps": s, **interval([cells[s][name] for cells in by_concept.values()])}
            for s in steps
        ]
        for name in CURVES
    }


def least(
    points: Mapping[str, Points], members: Sequence[str], resamples: int = 2000, seed: int = 0
) -> dict:
    """The level that satisfies, and per method the least steps that reach it.

    The interval comes from resampling the concepts, with the level fixed; None in it, and as the
    number of steps, means that the level is not reached.
    """
    grids = {}
    for method, of_method in points.items():
        chosen = [of_method[c] for c in members if c in of_method]
        steps = sorted(set.intersection(*(set(cells) for cells in chosen)))
        grids[method] = steps, np.array([[c[s]["fidelity"] for s in steps] for c in chosen])
    level = SHARE * max(values.mean(0).max() for _, values in grids.values())
    found = {"level": level, "n": len(members), "methods": {}}
    level = level or math.inf  # where nothing has any fidelity, nothing satisfies
    for method, (steps, values) in grids.items():
        rng = np.random.default_rng(seed)
        picks = rng.integers(len(values), size=(resamples, len(values)))
        needed = [
            steps_needed(dict(zip(steps, mean, strict=True)), level)
            for mean in values[picks].mean(1)
        ]
        needed = sorted(math.inf if n is None else n for n in needed)
        low, high = needed[round(0.025 * resamples)], needed[round(0.975 * resamples) - 1]
        mean = dict(zip(steps, values.mean(0), strict=True))
        found["methods"][method] = {
            "steps": steps_needed(mean, level),
            "low": None if low == math.inf else low,
            "high": None if high == math.inf else high,
        }
    return found


def guide(by_concept: Points) -> dict:
    """{part of the steps: {loss: {quality: interval}}} of the rank correlation over the steps.

    One Spearman correlation per concept. A loss to go by would have -1: the lower, the better.
    """
    from scipy.stats import spearmanr  # extra: evaluate

    steps = sorted({s for cells in by_concept.values() for s in cells})
    parts = {
        "early": [s for s in steps if s <= FEW],
        "late": [s for s in steps if s >= FEW],
        "all": steps,
    }
    found = {}
    for part, chosen in parts.items():
        if len(chosen) < 3:
            continue
        found[part] = {"steps": chosen}
        for loss in LOSSES:
            found[part][loss] = {}
            for quality in QUALITIES:
                values = []
                for cells in by_concept.values():
                    x = [cells[s][loss] for s in chosen]
                    y = [cells[s][quality] for s in chosen]
                    if len(set(x)) > 1 and len(set(y)) > 1:  # else there is no correlation
                        values.append(spearmanr(x, y).statistic)
                if values:
                    found[part][loss][quality] = interval(values)
    return found


def main(
    out: Annotated[Path, typer.Option(help="The results' file.")] = Path("results/steps.json"),
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/steps"),
    concepts: Annotated[int, typer.Option(min=2, help="How many held-out concepts.")] = 20,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas between.")] = STEP_GRID,
    device: str = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="That share the concepts.")] = 1,
) -> None:
    """Measure the methods over the number of their steps."""
    from dte_lab import DTEPipeline
    from dte_lab.common.files import write_atomically
    from dte_lab.common.quiet import quiet_libraries
    from dte_lab.evaluation.methods import Methods
    from dte_lab.evaluation.records import read_csv, versions
    from dte_lab.evaluation.run import EvaluationConfig, measure_methods

    quiet_libraries()
    load = partial(DTEPipeline.from_pretrained, "small", device=device)
    pipe = load()
    specs = [s.replace(STEP_GRID, steps) for s in Methods(pipe).experiment("steps")]
    config = EvaluationConfig(split=split, concepts=concepts, with_losses=True)
    measure_methods(run, pipe, specs, config, processes=processes, load=load)
    settings = json.loads((run / "run.json").read_text())["settings"]
    document = {
        "settings": settings, "versions": versions(), "share": SHARE,
        **summarise_steps(read_csv(run / "measures.csv")),
    }  # fmt: skip
    write_atomically(out, json.dumps(document, indent=1).encode())
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
