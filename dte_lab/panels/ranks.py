"""Pairs of weight changes, and the rank sweep with its panel, of 03_lora_hypernetwork."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.plots import HAIRLINE, INK, MUTED, draw_picture
from dte_lab.common.stats import mean_and_error
from dte_lab.panels.shared import AFTER, BEFORE, GREEN, figure_panel, plain

if TYPE_CHECKING:
    from ipywidgets import VBox


def pairs_figure(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    intervals: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Figure:
    """Kinds of pairs below each other: one point per concept, the mean with its interval below.

    groups: {title of a column: {kind: one number per concept}}. intervals: the same keys,
    {mean, low, high}. Each column has a scale of its own.
    """
    kinds = list(next(iter(groups.values())))
    figure = Figure(figsize=(1.8 + 3.4 * len(groups), 0.9 + 0.6 * len(kinds)), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for ax, (title, by_kind) in zip(axes, groups.items(), strict=True):
        for i, (kind, colour) in enumerate(zip(kinds, (AFTER, BEFORE, GREEN), strict=False)):
            values, (mean, error) = by_kind[kind], mean_and_error([intervals[title][kind]])
            jitter = 0.12 * np.sin(np.arange(len(values)) * 2.4)  # fixed, so that points come apart
            ax.plot(values, i + jitter, "o", color=colour, alpha=0.6, markersize=4)
            ax.errorbar(mean, i + 0.32, xerr=error, fmt="D", color=INK, markersize=5, capsize=3)
        ax.set_title(title, fontsize=10, color=INK)
        ax.grid(axis="x", color=HAIRLINE)
        plain(ax)
    axes[0].set_yticks(range(len(kinds)), kinds)
    axes[0].set_ylim(len(kinds) - 0.4, -0.5)
    figure.supxlabel(
        "cosine of the weight changes (points: concepts; diamonds: mean, 95 % interval)",
        fontsize=10,
    )
    return figure


def distances_figure(distances: Mapping[str, Mapping[int, float]], floor: float) -> Figure:
    """Distance to the input by rank: one thin line per concept, their mean with its spread.

    distances: {concept: {rank: distance}}, the same ranks for all, the first 0. floor: distance of
    the input to itself after the autoencoder, mean over concepts.
    """
    figure = Figure(figsize=(6, 3.1), layout="constrained")
    ax = figure.add_subplot()
    ranks = list(next(iter(distances.values())))
    array = np.array([[by_rank[r] for r in ranks] for by_rank in distances.values()])  # (n, ranks)
    x = np.arange(array.shape[1])
    for values in array:
        ax.plot(x, values, color=MUTED, linewidth=0.8, alpha=0.7)
    ax.errorbar(
        x, array.mean(axis=0), array.std(axis=0, ddof=1), color=AFTER, marker="o", capsize=3,
        label=f"mean and standard deviation (n = {len(array)})",
    )  # fmt: skip
    ax.axhline(floor, color=BEFORE, linestyle="--", label="the autoencoder alone")
    ax.set_ylim(0, 1.35 * max(array.max(), floor))
    ax.set_xticks(x, ["0: v* alone", *(str(r) for r in ranks[1:])])
    ax.set_xlabel("rank that is kept")
    ax.set_ylabel("distance to the input (RMSE)")
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    plain(ax)
    return figure


def encoders_figure(groups: Mapping[str, Mapping[int, Mapping]], base: str) -> Figure:
    """Encoders that differ in one number: how far their error is from that of the encoder `base`.

    groups: {what differs: {its value: {by_seed, minus_base, once}}}. by_seed: differences, one per
    seed; minus_base: their mean with its interval over concepts, {mean, low, high}; both may be
    missing. once: the difference in a single longer run.
    """
    figure = Figure(figsize=(4.4 * len(groups), 3.5), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for ax, (title, by_value) in zip(axes, groups.items(), strict=True):
        ax.axhline(0, color=HAIRLINE, linewidth=1)
        ax.plot(
            list(by_value), [cell["once"] for cell in by_value.values()], "s:", color=BEFORE,
            markersize=5, label="a longer run, once",
        )  # fmt: skip
        repeated = {value: cell for value, cell in by_value.items() if "by_seed" in cell}
        for value, cell in repeated.items():
            seeds = cell["by_seed"]
            ax.plot([1.12 * value] * len(seeds), seeds, ".", color=AFTER, alpha=0.6)
        mean, error = mean_and_error(cell["minus_base"] for cell in repeated.values())
        ax.errorbar(
            list(repeated), mean, error, fmt="o-", color=AFTER, capsize=3, markersize=5,
            label="mean over seeds (dots), 95 % interval over concepts",
        )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(by_value), [str(value) for value in by_value])
        ax.minorticks_off()
        ax.set_xlabel(title)
        plain(ax)
    axes[0].set_ylabel(f"loss on unseen things minus\nthat of {base}", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def rank_figure(
    picture: Image.Image, drawn: Image.Image, spectrum: Sequence[float], rank: int, distance: float
) -> Figure:
    """The input, what is drawn with `rank` kept, and which of the singular values those are."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    draw_picture(axes[0], picture)
    axes[0].set_title("the input", fontsize=10, color=INK)
    draw_picture(axes[1], drawn)
    axes[1].set_title(f"rank {rank}, distance {distance:.3f}", fontsize=10, color=INK)
    numbers = np.arange(1, len(spectrum) + 1)
    for chosen, colour, hatch, label in (
        (numbers <= rank, AFTER, "", "kept"),
        (numbers > rank, HAIRLINE, "///", "cut off"),
    ):
        axes[2].bar(
            numbers[chosen], np.asarray(spectrum)[chosen], color=colour, hatch=hatch,
            edgecolor="white", linewidth=0, label=label,
        )  # fmt: skip
    axes[2].set_xticks(numbers if len(numbers) <= 8 else [1, *numbers[3::4]])
    axes[2].set_ylim(0, 1.3 * max(spectrum))
    axes[2].set_xlabel("singular value (mean over layers)")
    axes[2].legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    plain(axes[2])
    return figure


def rank_panel(
    pictures: Mapping[str, Image.Image],
    drawn: Mapping[tuple[str, int], Image.Image],
    spectra: Mapping[str, Sequence[float]],
    distances: Mapping[str, Mapping[int, float]],
) -> "VBox":
    """A list of concepts and a slider for the rank over `rank_figure`.

    pictures, spectra, distances: by concept, distances then by rank; drawn: by (concept, rank).
    Returns a VBox; its attributes `concept`, `rank` and `view` are the widgets.
    """
    import ipywidgets as widgets

    concept = widgets.ToggleButtons(options=list(pictures), description="concept")
    ranks = sorted({rank for _, rank in drawn})
    rank = widgets.SelectionSlider(options=ranks, value=ranks[-1], description="rank")

    def figure_of(name: str, rank: int) -> Figure:
        distance = distances[name][rank]
        return rank_figure(pictures[name], drawn[name, rank], spectra[name], rank, distance)

    def describe(name: str, rank: int) -> str:
        return f"The {name}, and its drawing with rank {rank}: distance {distances[name][rank]:.3f}"

    panel = figure_panel((concept, rank), figure_of, describe)
    panel.concept, panel.rank = concept, rank
    return panel
