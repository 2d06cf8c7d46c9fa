"""Figures of the experiment in 02_contrastive_regularization: with the term and without."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dte_lab.common.plots import INK, MUTED
from dte_lab.common.stats import mean_and_error
from dte_lab.panels.contrastive import WITH, WITHOUT
from dte_lab.panels.shared import BLUE, SKY, plain, write_values

REGULARISER_LOOKS = {"contrastive": ("with the term", WITH, "o"), "none": ("without", WITHOUT, "s")}
SWEPT = ("num_positives", "temperature", "contrastive_weight")


def comparison_figure(
    means: Sequence[Mapping], differences: Sequence[Mapping], titles: Mapping[str, str]
) -> Figure:
    """Mean with interval before and after tuning, with the term and without; below, the difference.

    means, differences: of evaluation/regularisation.py, of one start. titles: {measure: title}.
    """
    figure = Figure(figsize=(2.5 * len(titles), 4.4), layout="constrained")
    axes = figure.subplots(2, len(titles), height_ratios=(2, 1), squeeze=False)
    for i, (measure, title) in enumerate(titles.items()):
        ax = axes[0, i]
        for k, (kind, (label, colour, marker)) in enumerate(REGULARISER_LOOKS.items()):
            lines = [line for line in means if line["regulariser"] == kind]
            _errorbars(
                ax, [line["after"] + 0.12 * (k - 0.5) for line in lines],
                [line[measure] for line in lines], colour, marker, label, ("-", "--")[k],
            )  # fmt: skip
        ax.set_xticks([0, 1], ["predicted", "tuned"])
        ax.set_xlim(-0.4, 1.4)
        ax.set_title(title, fontsize=10, color=INK)
        plain(ax)
        ax = axes[1, i]
        _errorbars(ax, [line["after"] for line in differences],
                   [line[measure] for line in differences], INK, "D", "", "none")  # fmt: skip
        ax.axhline(0, color=MUTED, lw=0.8)
        ax.set_xticks([0, 1], ["predicted", "tuned"])
        ax.set_xlim(-0.4, 1.4)
        plain(ax)
    axes[1, 0].set_ylabel("with minus without")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _errorbars(
    ax: Axes,
    x: Sequence[float],
    values: Sequence[Mapping[str, float]],
    colour: str,
    marker: str,
    label: str,
    dash: str,
) -> None:
    mean, error = mean_and_error(values)
    ax.errorbar(x, mean, error, color=colour, marker=marker, ls=dash, capsize=3, label=label, ms=5)


def sweep_means(rows: Sequence[Mapping], measures: Sequence[str]) -> dict[tuple, dict]:
    """{(N, temperature, weight): {measure: mean over concepts}} of a sweep's rows.

    At weight 0 the sweep has one row for all N and temperatures; here it stands at each of them.
    """
    options = [sorted({row[key] for row in rows}) for key in SWEPT]
    table = {}
    for n in options[0]:
        for tau in options[1]:
            for weight in options[2]:
                wanted = (n, tau, weight) if weight else (options[0][0], options[1][0], 0)
                cell = [row for row in rows if tuple(row[key] for key in SWEPT) == wanted]
                table[n, tau, weight] = {m: float(np.mean([r[m] for r in cell])) for m in measures}
    return table


def sweep_figure(
    table: Mapping[tuple, Mapping], setting: tuple, titles: Mapping[str, str]
) -> Figure:
    """Every setting of `sweep_means` as a dot, two measures against each other; one in large."""
    (x_key, x_title), (y_key, y_title) = titles.items()
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    ax = figure.add_subplot()
    weights = sorted({key[2] for key in table})
    shades = ["#8c8c8c", SKY, BLUE, INK]
    for i, weight in enumerate(weights):
        points = [cell for key, cell in table.items() if key[2] == weight]
        ax.plot(
            [p[x_key] for p in points], [p[y_key] for p in points], "Xs^D"[i % 4],
            ms=6 if weight else 10, color=shades[i % 4], mec="white",
            label=f"weight {weight:g}",
        )  # fmt: skip
    ax.plot(table[setting][x_key], table[setting][y_key], "o", ms=16, mfc="none",
            mec=WITHOUT, mew=2.5, label="this setting")  # fmt: skip
    n, tau, weight = setting
    ax.set_title(f"N = {n}, τ = {tau:g}, weight {weight:g}", fontsize=10, color=INK)
    ax.set_xlabel(x_title)
    ax.set_ylabel(y_title)
    ax.legend(frameon=False, fontsize=8)
    plain(ax)
    return figure


def sweep_grid(table: Mapping[tuple, Mapping], titles: Mapping[str, str]) -> Figure:
    """`sweep_means` as heat maps of N and temperature: a row per measure, a column per weight."""
    counts, taus, weights = (sorted({key[i] for key in table}) for i in range(3))
    figure = Figure(figsize=(1.0 + 1.75 * len(weights), 1.9 * len(titles)), layout="constrained")
    axes = figure.subplots(len(titles), len(weights), squeeze=False)
    for r, (measure, title) in enumerate(titles.items()):
        row, found = axes[r], [cell[measure] for cell in table.values()]
        low, high = min(found), max(found)
        digits = 2 if low == high else max(2, 1 - math.floor(math.log10(high - low)))
        for ax, weight in zip(row, weights, strict=True):
            values = np.array([[table[n, tau, weight][measure] for tau in taus] for n in counts])
            image = ax.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
            write_values(ax, values, (low, high), f"{{:.{digits}f}}".format, fontsize=7)
            ax.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
            ax.set_yticks(
                range(len(counts)), counts if weight == weights[0] else [""] * len(counts)
            )
            ax.tick_params(length=0, labelsize=8)
            ax.spines[:].set_visible(False)
            if r == 0:
                ax.set_title(f"weight {weight:g}", fontsize=10, color=INK)
            if r == len(titles) - 1:
                ax.set_xlabel("temperature", fontsize=9)
        row[0].set_ylabel("N", fontsize=9)
        bar = figure.colorbar(image, ax=row, pad=0.02)
        bar.set_label(title, fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    return figure
