"""Figures of a finished run of `dte evaluate`, from its summary and its pictures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from dte_lab.common.images import read_image
from dte_lab.common.plots import picture_grid
from dte_lab.common.stats import mean_and_error
from dte_lab.evaluation.records import read_run
from dte_lab.evaluation.report import HEADINGS, name_of
from dte_lab.evaluation.specifications import ANCHORS

IDENTITY = "identity: 0 like any concept, 1 the true rendering"


def picture_sheet(run_dir: Path, summary: Sequence[Mapping], count: int = 2) -> Figure:
    """The first `count` edits of every concept whose pictures the run kept: one row each, and one
    column per method at its most steps.
    """
    steps = {}
    for line in summary:
        steps[line["method"]] = max(line["steps"], steps.get(line["method"], 0))
    edits, rows, labels = read_run(run_dir)[0]["settings"]["scenes"][:count], [], []
    for folder in sorted(path for path in (run_dir / "pictures").iterdir() if path.is_dir()):
        given = read_image(folder / "input.png")
        for i, edit in enumerate(edits):
            row = [given]
            for label, n in steps.items():
                strip = read_image(folder / f"{label}_{n}.png".replace("/", "-"))
                size = given.width
                row.append(strip.crop((i * size, 0, (i + 1) * size, size)))
            rows.append(row)
            labels.append(f"{folder.name.replace('-', ' ')}: {edit}")
    columns = [fill(name_of(k), 20) + f"\n{n} steps" * (n > 0) for k, n in steps.items()]
    return picture_grid(rows, ["input", *columns], labels)


def tradeoff(summary: Sequence[Mapping]) -> Figure:
    """Figure: scaled identity against right scenes, with 95 % intervals over concepts.

    A method has one colour and marker; the number of steps stands beside each of its points. Where
    every scene is right, identity alone is left to tell.
    """
    named = by_name(summary)
    if all(round(point["scene"]["mean"], 2) == 1 for points in named.values() for point in points):
        return identities(named)
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(named.items()):
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
        ylabel=IDENTITY,
        title=f"{n} held-out concepts, 95 % intervals; numbers: steps of tuning",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def identities(named: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Figure: scaled identity of methods as `by_name` has them, with 95 % intervals over concepts.

    A row per method and number of steps, fewest steps first, with a colour per number of steps.
    """
    rows = [(point["steps"], name, point) for name, points in named.items() for point in points]
    rows.sort(key=lambda row: row[0])
    steps = list(dict.fromkeys(row[0] for row in rows))
    labels = [fill(f"{name}, {count} steps", 46) for count, name, _ in rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(7.6, 1.2 + 0.12 * len(rows) + 0.17 * lines), layout="constrained")
    axes = figure.subplots()
    for y, (count, _, point) in enumerate(rows):
        x, xerr = mean_and_error([point["identity_scaled"]])
        style = "osD^vP*X"[steps.index(count) % 8]
        axes.errorbar(x, y, None, xerr, fmt=style, color=f"C{steps.index(count) % 10}", capsize=2)
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(IDENTITY)
    n = rows[0][2]["identity"]["n"]
    title = f"{n} held-out concepts, 95 % intervals; every scene is the one asked for"
    figure.suptitle(title, fontsize="medium")  # above the names as well
    axes.grid(alpha=0.3, axis="x")
    return figure


def by_name(summary: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """{name of a method: its lines of the summary, fewest steps first}, without the anchors."""
    lines = defaultdict(list)
    for line in summary:
        if line["method"] not in ANCHORS:
            lines[name_of(line["method"])].append(line)
    return {name: sorted(found, key=lambda line: line["steps"]) for name, found in lines.items()}


def step_curves_figure(summary: Sequence[Mapping]) -> Figure | None:
    """Figure: measures over the number of steps, for methods with several; None without one."""
    lines = {name: points for name, points in by_name(summary).items() if len(points) > 1}
    if not lines:
        return None
    panels = {k: HEADINGS[k] for k in ("fidelity", "identity_scaled", "scene")}
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
