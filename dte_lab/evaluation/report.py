"""From a run's rows to tables with bootstrap intervals over concepts, and figures."""

import json
import re
from collections import defaultdict
from textwrap import fill

import numpy as np

from dte_lab.common.stats import interval, mean_and_error
from dte_lab.evaluation.measures import LOSSES, PICTURE_MEASURES, TIMES, WORD_MEASURES
from dte_lab.evaluation.methods import ANCHORS

REFERENCE = "dte"
FOLLOWING = ("truth_similarity", "truth_rmse")  # measured on style edits
OF_CONCEPT = (*WORD_MEASURES, *LOSSES, *TIMES)
NAMES = {
    "dte": "tuning encoder", "ti": "Textual Inversion", "lora": "DreamBooth LoRA",
    "lora-prior": "DreamBooth LoRA, prior kept", "e4t": "E4T-style encoder",
    "oracle": "true rendering", "other": "another concept, true rendering",
}  # fmt: skip


def per_concept(rows) -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """{(method, steps): {concept: {measure: value}}}, means over edits.

    Identity, prompt fidelity and diversity over the scene edits, distance to the truth over the
    style edits. Adds, per concept, `identity_scaled`: the margin of identity over other concepts in
    units of the mean margin of true renderings (0: no more like this concept than like any other);
    `fidelity`, the harmonic mean of it and `scene`; `fidelity_small`, that of the CLIP measures.
    """
    cells = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        cell = cells[row["method"], int(row["steps"])][row["concept"]]
        cell["group"] = row["group"]
        for name in PICTURE_MEASURES:
            if bool(int(row["is_style"])) == (name in FOLLOWING):
                cell[name].append(float(row[name]))
        for name in OF_CONCEPT:
            if row.get(name):
                cell[name].append(float(row[name]))
    table = {
        key: {
            concept: {k: v if k == "group" else float(np.mean(v)) for k, v in cell.items() if v}
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


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def summarise(rows) -> list[dict]:
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
                if name != "group":
                    measures[name].append(value)
            reference = table.get((REFERENCE, ours), {}).get(concept)
            if reference and (method, steps) != (REFERENCE, ours):
                measures["ahead"].append(reference["fidelity"] - cell["fidelity"])
        values = {name: interval(np.array(v)) for name, v in measures.items()}
        summary.append({"method": method, "steps": steps, **values})
    return summary


def paired(rows, one: str, other: str) -> list[dict]:
    """Method `one` minus method `other`, both by label: per number of steps that both have, measure
    -> {mean, low, high, n} of the differences by concept.
    """
    table = per_concept(rows)
    lines = []
    for steps in [s for method, s in table if method == one and (other, s) in table]:
        first, second = table[one, steps], table[other, steps]
        both = [(first[concept], second[concept]) for concept in first if concept in second]
        shared = [k for k in both[0][0] if k != "group" and all(k in a and k in b for a, b in both)]
        values = {k: interval(np.array([a[k] - b[k] for a, b in both])) for k in shared}
        lines.append({"steps": steps, **values})
    return lines


def least_steps(rows, share=0.95) -> dict[str, dict[str, int]]:
    """{method: {group: the least number of steps with `share` of its best mean `fidelity`}}."""
    means = defaultdict(lambda: defaultdict(dict))
    for (method, steps), of_method in per_concept(rows).items():
        groups = defaultdict(list)
        for cell in of_method.values():
            groups[cell["group"]].append(cell["fidelity"])
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


COLUMNS = {
    "fidelity": "harmonic mean", "ahead": "DTE ahead by", "identity_scaled": "identity, 0 to 1",
    "scene": "scene is right", "truth_similarity": "style edit: similarity to truth",
    "identity": "similarity to input", "clip_i_small": "CLIP-I (small)",
    "clip_t_small": "CLIP-T (small)",
    "word_similarity": "words (MiniLM)", "word_similarity_small": "words (small CLIP)",
    "diversity": "diversity", "seconds": "seconds",
    "seconds_per_picture": "seconds per picture", "extra_memory_mb": "extra MB",
}  # fmt: skip


def markdown(summary) -> str:
    """The summary as a table, mean [95 % interval over n concepts]."""
    shown = {k: v for k, v in COLUMNS.items() if any(k in line for line in summary)}
    lines = [
        "| Method | Steps | n | " + " | ".join(shown.values()) + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for line in summary:
        steps = "" if line["method"] in ANCHORS else line["steps"]
        cells = [name_of(line["method"]), str(steps), str(line["identity"]["n"])]
        cells += [_cell(line.get(name)) for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_table(rows) -> str:
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
    return ", ".join([NAMES[name], *(o for o in options if not o.startswith("num_steps="))])


def _cell(value) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value["mean"]) >= 100 else 1 if abs(value["mean"]) >= 10 else 3
    mean, low, high = (f"{value[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def picture_sheet(run_dir, summary, count=2):
    """The first `count` edits of every concept whose pictures the run kept: one row each, and one
    column per method at its most steps.
    """
    from PIL import Image

    from dte_lab.common.plots import picture_grid

    steps = {}
    for line in summary:
        steps[line["method"]] = max(line["steps"], steps.get(line["method"], 0))
    edits, rows, labels = first_edits(run_dir)[:count], [], []
    for folder in sorted(path for path in (run_dir / "pictures").iterdir() if path.is_dir()):
        given = Image.open(folder / "input.png")
        for i, edit in enumerate(edits):
            row = [given]
            for label, n in steps.items():
                strip = Image.open(folder / f"{label}_{n}.png".replace("/", "-"))
                size = given.width
                row.append(strip.crop((i * size, 0, (i + 1) * size, size)))
            rows.append(row)
            labels.append(f"{folder.name.replace('-', ' ')}: {edit}")
    columns = [fill(name_of(k), 20) + f"\n{n} steps" * (n > 0) for k, n in steps.items()]
    return picture_grid(rows, ["input", *columns], labels)


def tradeoff(summary):
    """Figure: scaled identity against right scenes, with 95 % intervals over concepts.

    A method has one colour and marker; the number of steps stands beside each of its points.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(by_name(summary).items()):
        colour = f"C{i % 10}"
        x, xerr = mean_and_error(point["scene"] for point in points)
        y, yerr = mean_and_error(point["identity_scaled"] for point in points)
        axes.errorbar(
            x, y, yerr, xerr, fmt="osD^vP*X"[i % 8], color=colour, capsize=2, elinewidth=1,
            label=fill(name, 40),
        )  # fmt: skip
        for point, at in zip(points, zip(x, y, strict=True), strict=True):
            axes.annotate(
                str(point["steps"]), at, (5, 4), color=colour, textcoords="offset points",
                fontsize="small",
            )  # fmt: skip
    n = summary[0]["identity"]["n"]
    axes.set(
        xlabel="prompt fidelity: share of right scenes",
        ylabel="identity: 0 like any concept, 1 the true rendering",
        title=f"{n} held-out concepts, 95 % intervals; numbers: steps of tuning",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def by_name(summary) -> dict[str, list[dict]]:
    """{name of a method: its lines of the summary, fewest steps first}, without the anchors."""
    lines = defaultdict(list)
    for line in summary:
        if line["method"] not in ANCHORS:
            lines[name_of(line["method"])].append(line)
    return {name: sorted(found, key=lambda line: line["steps"]) for name, found in lines.items()}


def curves(summary):
    """Figure: measures over the number of steps, for methods with several; None without one."""
    from matplotlib.figure import Figure

    lines = {name: points for name, points in by_name(summary).items() if len(points) > 1}
    if not lines:
        return None
    panels = {k: COLUMNS[k] for k in ("fidelity", "identity_scaled", "scene")}
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, (label, points) in enumerate(lines.items()):
            steps = [point["steps"] for point in points]
            mean, low, high = ([p[name][k] for p in points] for k in ("mean", "low", "high"))
            axes.plot(steps, mean, marker="o", ms=3, color=f"C{i}", label=label)
            axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
        axes.set_xscale("symlog", linthresh=1)
        axes.set(title=title, xlabel="steps", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(lines),
        frameon=False,
    )
    return figure


def first_edits(run_dir) -> list[str]:
    """Names of the edits, in the order in which the pictures show them."""
    settings = json.loads((run_dir / "run.json").read_text())["settings"]
    return settings["scenes"]
