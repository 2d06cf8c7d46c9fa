"""Figures and the panel of 05_tuning."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.plots import HAIRLINE, INK, MUTED, draw_picture
from dte_lab.panels.shared import (
    AFTER,
    BEFORE,
    GREEN,
    PINK,
    SKY,
    VERMILION,
    figure_panel,
    label_points,
    one_picture,
    plain,
)

if TYPE_CHECKING:
    from ipywidgets import VBox

METHOD_LOOKS = {  # colour, marker, line of each method
    "dte": (AFTER, "o", "-"),
    "ti": (BEFORE, "s", "--"),
    "lora": (GREEN, "^", "-."),
    "lora-prior": (VERMILION, "v", (0, (3, 1, 1, 1, 1, 1))),
    "e4t": (PINK, "D", ":"),
}
VARIANT_LOOKS = SKY, "P", "-"  # of a method with options
PAPER_STEPS = 12


def timestep_figure(timesteps: Sequence[int], losses: Sequence[float], bins: int) -> Figure:
    """Loss over the timestep, with the bins of one step of tuning between hairlines."""
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    ax = figure.add_subplot()
    T = max(timesteps) + 1
    for i in range(bins + 1):
        ax.axvline(i * T / bins, color=HAIRLINE, linewidth=1)
    ax.plot(timesteps, losses, "o-", color=AFTER, markersize=4)
    ax.set(xlabel="timestep (0: no noise)", ylabel="diffusion loss", ylim=(0, None), xlim=(0, T))
    plain(ax)
    return figure


def losses_figure(
    seen: Sequence[float], steps: Sequence[int], own: Sequence[float], elsewhere: Sequence[float]
) -> Figure:
    """Losses over the steps of tuning on a symmetric-log axis.

    seen: what tuning saw, one per step from 0 on. own, elsewhere: on fixed noise at `steps`, of
    the input picture, and of the same thing in other scenes.
    """
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(
        range(len(seen)), seen, ".", color=MUTED, markersize=4, alpha=0.6,
        label="as tuning saw it: new noise at every step",
    )  # fmt: skip
    ax.plot(steps, own, "s-", color=AFTER, markersize=5, label="input picture, fixed noise")
    ax.plot(steps, elsewhere, "o--", color=BEFORE, markersize=5, label="other scenes, fixed noise")
    best = min(range(len(steps)), key=elsewhere.__getitem__)
    ax.annotate(
        f"lowest at {steps[best]}", (steps[best], elsewhere[best]), (0, 9),
        textcoords="offset points", ha="center", fontsize=9, color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )  # fmt: skip
    _step_axis(ax, steps)
    ax.set_ylabel("diffusion loss")
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3)
    plain(ax)
    return figure


def quality_figure(
    curves: Mapping[str, Mapping[str, Sequence[dict]]],
    names: Mapping[str, str],
    measures: Mapping[str, str],
    over: str = "steps",
) -> Figure:
    """Measures with 95 % intervals over the steps, or over the mean seconds, per method.

    curves: {method: {measure: [{steps, mean, low, high, n}, ...]}} of results/steps.json.
    measures: {measure: title}.
    """
    figure = Figure(figsize=(3.5 * len(measures), 3.7), layout="constrained")
    for ax, (measure, title) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True
    ):
        for method, of_method in curves.items():
            colour, marker, line = METHOD_LOOKS.get(method, VARIANT_LOOKS)
            points = of_method[measure]
            x = [p["steps"] for p in points]
            if over == "seconds":
                x = [p["mean"] for p in of_method["seconds"]]
            middle, low, high = ([p[k] for p in points] for k in ("mean", "low", "high"))
            style = {"marker": marker, "linestyle": line, "color": colour, "markersize": 5}
            ax.plot(x, middle, label=names[method], **style)
            ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.set_ylim(0, 1.02)
        ax.set_title(title, fontsize=10, color=INK)
        plain(ax)
        if over == "steps":
            _step_axis(ax, [p["steps"] for m in curves.values() for p in m[measure]])
        else:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_xlabel("seconds")
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(curves)),
        frameon=False,
    )  # fmt: skip
    return figure


def guide_figure(points: Sequence[dict], quality: str, losses: Mapping[str, str]) -> Figure:
    """Where the means over the concepts go with the steps: a loss (x) against a quality (y).

    points: of one method, {concept, steps, quality, loss ...} as in results/steps.json.
    losses: {loss: label}. The number of steps stands beside each point.
    """
    figure = Figure(figsize=(4.2 * len(losses), 3.7), layout="constrained")
    axes = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    steps, marks = sorted({p["steps"] for p in points}), {}
    for ax, (loss, label) in zip(axes, losses.items(), strict=True):
        x, y = (
            [mean([p[key] for p in points if p["steps"] == s]) for s in steps]
            for key in (loss, quality)
        )
        ax.plot(x, y, color=HAIRLINE, linewidth=1.5, zorder=1)
        shades = [i / max(1, len(steps) - 1) for i in range(len(steps))]
        ax.scatter(x, y, c=shades, cmap="viridis", s=45, zorder=2, vmin=0, vmax=1.15)
        marks[ax] = list(zip(x, y, map(str, steps), strict=True))
        ax.invert_xaxis()
        ax.margins(0.1, 0.16)
        ax.set_xlabel(f"{label} (lower to the right)")
        plain(ax)
    axes[0].set_ylabel("harmonic mean of\nidentity and prompt fidelity")
    for ax, labels in marks.items():
        label_points(ax, labels, fontsize=9)
    return figure


def least_figure(least: Mapping[str, dict], names: Mapping[str, str]) -> Figure:
    """The least steps that satisfy, per group (rows) and method (markers), with 95 % intervals.

    least: {group: {level, n, methods: {method: {steps, low, high}}}} of results/steps.json.
    What never satisfies stands in a column of its own on the right.
    """
    found = [method for group in least.values() for method in group["methods"].values()]
    figure = Figure(figsize=(7.5, 1.1 + 0.15 * len(found)), layout="constrained")
    ax = figure.add_subplot()
    numbers = [value for m in found for value in m.values() if value is not None]
    most = max([PAPER_STEPS, *numbers])
    never = 2.5 * most
    for row, group in enumerate(least.values()):
        count = len(group["methods"])
        for i, (method, found) in enumerate(group["methods"].items()):
            colour, marker, line = METHOD_LOOKS.get(method, VARIANT_LOOKS)
            y = row + (i - (count - 1) / 2) * 0.8 / count
            at, low, high = (
                never if found[k] is None else found[k] for k in ("steps", "low", "high")
            )
            ax.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.5, linestyle=line)
            fill = "white" if found["steps"] is None else colour
            ax.plot([at], [y], marker, color=colour, markersize=7, markerfacecolor=fill)
    ax.set_yticks(
        range(len(least)),
        [f"{name}\nlevel {g['level']:.2f}, n = {g['n']}" for name, g in least.items()],
    )
    ax.invert_yaxis()
    _step_axis(ax, numbers)
    ticks = [t for t in ax.get_xticks() if t <= most]
    ax.set_xticks([*ticks, never], [*(f"{t:g}" for t in ticks), "never"])
    ax.set_xlim(-0.3, 1.3 * never)
    ax.set_xlabel("least steps that satisfy")
    methods = list(dict.fromkeys(m for group in least.values() for m in group["methods"]))
    for method in methods:
        colour, marker, line = METHOD_LOOKS.get(method, VARIANT_LOOKS)
        ax.plot([], [], color=colour, marker=marker, linestyle=line, label=names[method])
    figure.legend(loc="outside lower center", ncols=min(2, len(methods)), frameon=False)
    plain(ax)
    return figure


def memory_figure(
    batches: Sequence[int], predicted: Sequence[float], measured: Sequence[float] | None
) -> Figure:
    """Megabytes that tuning needs beyond the weights, over the noise levels per step."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(batches, predicted, "s--", color=BEFORE, label="predicted from fake tensors")
    if measured is not None:
        ax.plot(batches, measured, "o-", color=AFTER, label="measured by the operating system")
    ax.set(xlabel="noise levels per step", ylabel="MB beyond the weights", ylim=(0, None))
    ax.set_xticks(batches)
    ax.legend(frameon=False)
    plain(ax)
    return figure


def card_figure(
    labels: Sequence[str], predicted: Sequence[float], measured: Sequence[float | None], card: float
) -> Figure:
    """Predicted, and where known measured, peak GB of each choice beside what a card has."""
    figure = Figure(figsize=(7.5, 1.0 + 0.42 * len(labels)), layout="constrained")
    ax = figure.add_subplot()
    fits = [gb <= card - 1 for gb in predicted]
    ax.barh(
        range(len(labels)), predicted, 0.62, color=[AFTER if fit else "white" for fit in fits],
        edgecolor=AFTER, hatch=["" if fit else "///" for fit in fits],
    )  # fmt: skip
    most = max(card, *predicted)
    for i, (gb, fit) in enumerate(zip(predicted, fits, strict=True)):
        ax.text(1.04 * most, i, f"{gb:.1f}" + "\ntoo much" * (not fit), va="center", fontsize=9)
    known = [(gb, i) for i, gb in enumerate(measured) if gb is not None]
    if known:
        ax.plot(*zip(*known, strict=True), "D", color=BEFORE, markersize=6, label="measured")
    ax.axvline(card - 1, color=INK, linestyle="--", linewidth=1)
    ax.set_title(f"dashed: {card:g} GB, 1 of them kept free", fontsize=9, color=INK, loc="right")
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlabel("peak memory of tuning, GB (bars: predicted)")
    ax.set_xlim(0, 1.3 * most)
    if known:  # below the axes: inside, every row may end in a number
        figure.legend(frameon=False, loc="outside lower right")
    plain(ax)
    return figure


def captioned_grid(
    rows: Sequence[Sequence[tuple[Image.Image, str]]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
) -> Figure:
    """Pictures in rows and columns as `picture_grid` has them, each with a line below it."""
    figure = Figure(figsize=(1.55 * len(column_labels), 1.72 * len(rows) + 0.35))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(rows), len(column_labels), squeeze=False)
    for axes, row, label in zip(grid, rows, row_labels, strict=True):
        for ax, (picture, text) in zip(axes, row, strict=True):
            draw_picture(ax, picture)
            ax.set_xlabel(text, fontsize=8, color=MUTED, labelpad=2)
        axes[0].set_ylabel(label, fontsize=10, color=INK)
    for ax, label in zip(grid[0], column_labels, strict=True):
        ax.set_title(label, fontsize=10, color=INK)
    return figure


def steps_panel(pictures: Mapping[tuple[int, str], Image.Image]) -> "VBox":
    """A slider for the steps and buttons for the scene over pictures {(steps, scene): picture}.

    Returns a VBox; its attributes `steps`, `scene` and `view` are the widgets.
    """
    import ipywidgets as widgets

    steps, scenes = (list(dict.fromkeys(values)) for values in zip(*pictures, strict=True))
    slider = widgets.SelectionSlider(
        options=steps, value=steps[len(steps) // 2], description="steps"
    )
    buttons = widgets.ToggleButtons(options=scenes, description="scene")
    panel = figure_panel(
        (slider, buttons),
        partial(step_figure, pictures),
        lambda steps, scene: f"The concept after {steps} steps: {scene}",
    )
    panel.steps, panel.scene = slider, buttons
    return panel


def step_figure(pictures: Mapping[tuple[int, str], Image.Image], steps: int, scene: str) -> Figure:
    """One picture of {(steps, scene): picture} in large, with its settings above."""
    return one_picture(pictures[steps, scene], f"{steps} steps, {scene}")


def _step_axis(ax: Axes, steps: Sequence[float]) -> None:
    """Numbers of steps, 0 among them, on a symmetric-log axis with a line at the paper's 12."""
    ax.set_xscale("symlog", linthresh=2, linscale=0.5)
    most = max([PAPER_STEPS, *steps])
    ticks = [t for t in (0, 2, 4, 12, 50, 150, 500) if t <= most]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(-0.3, 1.25 * most)
    ax.axvline(PAPER_STEPS, color=HAIRLINE, linewidth=1, zorder=0)
    ax.set_xlabel("tuning steps")
