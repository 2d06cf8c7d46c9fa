"""Figures and the panel of 04_dual_path."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.plots import INK, MUTED, draw_picture
from dte_lab.common.stats import interval, mean_and_error
from dte_lab.panels.shared import (
    AFTER,
    BEFORE,
    BLUE,
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

# {(offsets_on, granularity, alpha_blend): {measure: one value per concept}}
Table = Mapping[tuple[str, str, float], Mapping[str, np.ndarray]]
# {(offsets_on, granularity, alpha, seed): picture}
Drawn = Mapping[tuple[str, str, float, int], Image.Image]
WAY_LOOKS = {  # (offsets_on, granularity) -> colour, marker
    ("soft", "attention"): (BLUE, "o"),
    ("soft", "block"): (SKY, "s"),
    ("hard", "attention"): (VERMILION, "^"),
    ("hard", "block"): (PINK, "D"),
}
MEASURE_TITLES = {
    "identity_scaled": "identity\n(0 any thing, 1 the truth)",
    "clip_i_small": "likeness to the input, CLIP-I",
    "scene": "share of right scenes",
    "clip_t_small": "likeness to the prompt, CLIP-T",
}


def tokens_figure(
    tokens: Sequence[str], changed: Sequence[float], attention: Mapping[str, Sequence[float]]
) -> Figure:
    """Per token of a prompt: how much it differs between the two prompts, and who looks at it.

    changed: relative change of its hidden state. attention: {path: share of the attention}, two.
    """
    x = np.arange(len(tokens))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.bar(x, changed, 0.8, color=MUTED)
    top.set_ylabel("change, share\nof the norm")
    top.set_title("how far the soft prompt's token is from the hard prompt's", fontsize=10)
    styles = zip(attention.items(), ((AFTER, ""), (BEFORE, "///")), strict=True)
    for i, ((name, shares), (colour, hatch)) in enumerate(styles):
        bottom.bar(
            x + 0.4 * (i - 0.5), 100 * np.asarray(shares), 0.4, color=colour, hatch=hatch,
            edgecolor="white", linewidth=0, label=name,
        )  # fmt: skip
    bottom.set_ylabel("attention, %")
    bottom.set_title("share of the cross-attention that falls on it", fontsize=10)
    bottom.legend(frameon=False, fontsize=9)
    bottom.set_xticks(x, tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
    for ax in (top, bottom):
        plain(ax)
    return figure


def maps_figure(
    pictures: Sequence[Image.Image],
    maps: Mapping[str, Sequence[np.ndarray]],
    column_labels: Sequence[str],
) -> Figure:
    """Attention maps below the pictures they belong to.

    maps: {row label: one array (h, w) of shares per picture}; a row has one scale of its own.
    """
    n = len(pictures)
    figure = Figure(figsize=(1.0 * n + 1.2, 1.0 * (1 + len(maps)) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    ratios = [1] * n + [0.08]  # the last column has the colour bars
    grid = figure.subplots(1 + len(maps), n + 1, squeeze=False, width_ratios=ratios)
    for ax, picture, label in zip(grid[0], pictures, column_labels, strict=False):
        draw_picture(ax, picture)
        ax.set_title(label, fontsize=10, color=INK)
    grid[0, -1].set_visible(False)
    for axes, (label, row) in zip(grid[1:], maps.items(), strict=True):
        top = 100 * max(array.max() for array in row)
        for ax, array in zip(axes, row, strict=False):
            image = ax.imshow(100 * array, cmap="viridis", vmin=0, vmax=top)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel(label, fontsize=9, color=INK)
        bar = figure.colorbar(image, cax=axes[-1])
        bar.ax.tick_params(labelsize=8)
        bar.set_label("attention, %", fontsize=8)
        bar.outline.set_visible(False)
    return figure


def cost_figure(costs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Time of ways to call the UNet, over the time of the single path.

    costs: {way: {source: (median, lower quartile, upper quartile)}}.
    """
    sources = list(dict.fromkeys(source for row in costs.values() for source in row))
    styles = dict(zip(sources, ((MUTED, "///"), (AFTER, ""), (BEFORE, "..")), strict=False))
    height = 0.8 / len(sources)
    figure = Figure(figsize=(7.5, 0.8 + 0.42 * len(costs)), layout="constrained")
    ax = figure.add_subplot()
    for j, source in enumerate(sources):
        for i, row in enumerate(costs.values()):
            if source not in row:
                continue
            median, low, high = row[source]
            ax.barh(
                i + (j - (len(sources) - 1) / 2) * height, median, 0.9 * height,
                color=styles[source][0], hatch=styles[source][1], edgecolor="white", linewidth=0,
                xerr=[[median - low], [high - median]], ecolor=INK, capsize=2,
                label=source if i == 0 else None,
            )  # fmt: skip
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(costs)), list(costs))
    ax.invert_yaxis()
    ax.set_xlabel("times the single path")
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    plain(ax)
    return figure


def alpha_figure(table: Table, measures: Sequence[str] = tuple(MEASURE_TITLES)) -> Figure:
    """Measures over alpha_blend with 95 % intervals over concepts, one panel per measure.

    table: {(offsets_on, granularity, alpha_blend): {measure: one value per concept}}.
    """
    figure = Figure(figsize=(2.6 * len(measures), 3), layout="constrained")
    for ax, measure in zip(figure.subplots(1, len(measures)), measures, strict=True):
        for i, (way, (colour, marker)) in enumerate(WAY_LOOKS.items()):
            points = {key[2]: interval(row[measure]) for key, row in ways_of(table, way).items()}
            mean, error = mean_and_error(points.values())
            shift = 0.012 * (i - 1.5) if i else 0  # so that bars at one alpha stand side by side
            ax.errorbar(
                np.array(list(points)) + shift, mean, error, color=colour,
                marker=marker, markersize=5, linewidth=1.6 if i == 0 else 0.8, capsize=2,
                linestyle="-" if i == 0 else ":", label=", ".join(way),
            )  # fmt: skip
        ax.set_title(MEASURE_TITLES[measure], fontsize=10, color=INK)
        ax.set_xlabel("alpha_blend")
        plain(ax)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def ways_of(table: Table, way: tuple[str, str]) -> Table:
    """The rows of a table with this (offsets_on, granularity), by alpha."""
    return {key: table[key] for key in sorted(k for k in table if k[:2] == way)}


def confidence_ellipse(
    x: Sequence[float], y: Sequence[float], level: float = 0.95
) -> tuple[tuple[float, float], float, float, float]:
    """Hotelling's region for the mean of n pairs: (centre, width, height, angle in degrees).

    Raises DTEError for fewer than 3 values, from which no region follows.
    """
    from scipy.stats import f

    n = len(x)
    if n < 3:
        raise DTEError(f"A confidence ellipse needs 3 concepts or more, not {n}.")
    variances, axes = np.linalg.eigh(np.cov(x, y) / n)
    radius = np.sqrt(2 * (n - 1) / (n - 2) * f.ppf(level, 2, n - 2))
    width, height = 2 * radius * np.sqrt(variances.clip(min=0))
    angle = np.degrees(np.arctan2(axes[1, 0], axes[0, 0]))
    return (float(np.mean(x)), float(np.mean(y))), width, height, angle


def plane_figure(table: Table, x: str = "scene", y: str = "identity_scaled") -> Figure:
    """Identity over editability, each mean with its 95 % confidence ellipse.

    Left: alpha_blend along (soft, attention). Right: offsets on either path, both granularities, at
    the values of alpha_blend that all of them have. table: see `alpha_figure`.
    """
    shared = set.intersection(*({k[2] for k in ways_of(table, way)} for way in WAY_LOOKS))
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    marks = {left: [], right: []}
    for (way, (colour, marker)), ax in zip(WAY_LOOKS.items(), (left, *3 * (right,)), strict=True):
        rows = ways_of(table, way)
        if ax is left:
            marks[left] = _points(left, rows, x, y, colour, marker, way)
        rows = {key: row for key, row in rows.items() if key[2] in shared}
        marks[right] += _points(right, rows, x, y, colour, marker, way)
    left.set_title("alpha_blend from 0 to 1: soft, attention", fontsize=10, color=INK)
    right.set_title("offsets on either path, both granularities", fontsize=10, color=INK)
    left.set_ylabel(MEASURE_TITLES[y])
    for ax in (left, right):
        ax.set_xlabel(MEASURE_TITLES[x])
        plain(ax)
    right.legend(frameon=False, fontsize=9)
    for ax, labels in marks.items():
        label_points(ax, labels)
    return figure


def _points(
    ax: Axes, rows: Table, x: str, y: str, colour: str, marker: str, way: tuple[str, str]
) -> list[tuple[float, float, str]]:
    """Draw the means of a way; returns where the labels of alpha belong."""
    centres = []
    for row in rows.values():
        centre, width, height, angle = confidence_ellipse(row[x], row[y])
        ax.add_patch(
            Ellipse(
                centre, width, height, angle=angle, facecolor=colour, alpha=0.10, edgecolor="none"
            )
        )
        centres.append(centre)
    ax.plot(*zip(*centres, strict=True), color=colour, marker=marker, label=", ".join(way))
    ax.autoscale_view()
    return [(*centre, f"{key[2]:g}") for key, centre in zip(rows, centres, strict=True)]


def setting_figure(
    pictures: Drawn, offsets_on: str, granularity: str, alpha: float, seed: int
) -> Figure:
    """One of {(offsets_on, granularity, alpha, seed): picture} in large, its settings above."""
    text = (
        f"offsets_on {offsets_on}, granularity {granularity}\nalpha_blend = {alpha:g}, seed {seed}"
    )
    return one_picture(pictures[offsets_on, granularity, alpha, seed], text)


def dual_path_panel(pictures: Drawn) -> "VBox":
    """Widgets over pictures {(offsets_on, granularity, alpha, seed): picture}.

    Returns a VBox; its attributes `offsets_on`, `granularity`, `alpha`, `seed` and `view` are the
    widgets.
    """
    import ipywidgets as widgets

    paths, granularities, alphas, seeds = (
        list(dict.fromkeys(values)) for values in zip(*sorted(pictures), strict=True)
    )
    alphas = sorted(alphas)
    knobs = {
        "offsets_on": widgets.ToggleButtons(options=paths, description="offsets_on"),
        "granularity": widgets.ToggleButtons(options=granularities, description="granularity"),
        "alpha": widgets.SelectionSlider(
            options=alphas, value=alphas[len(alphas) // 2], description="alpha_blend"
        ),
        "seed": widgets.ToggleButtons(options=sorted(seeds), description="seed"),
    }

    def describe(offsets_on: str, granularity: str, alpha: float, seed: int) -> str:
        where = f"Offsets on {offsets_on}, granularity {granularity}"
        return f"{where}, alpha_blend {alpha:g}, seed {seed}"

    panel = figure_panel(list(knobs.values()), partial(setting_figure, pictures), describe)
    for name, knob in knobs.items():
        setattr(panel, name, knob)
    return panel
