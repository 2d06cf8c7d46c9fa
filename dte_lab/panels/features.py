"""Figures and the panel of 01_features."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.plots import HAIRLINE, INK, MUTED, draw_picture
from dte_lab.panels.shared import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    figure_panel,
    plain,
    write_values,
)

if TYPE_CHECKING:
    from ipywidgets import VBox

# Each with a marker of its own.
HUES = (BLUE, ORANGE, GREEN, PINK, "#000000", SKY, VERMILION)
MARKERS = ("o", "s", "^", "D", "P", "v", "X")


def principal_maps(maps: np.ndarray, of: np.ndarray | None = None) -> np.ndarray:
    """Feature maps (N, C, g, g) -> three principal components (N, g, g, 3).

    One PCA of the channels over all positions of all maps, so that a value means the same
    everywhere; of other maps (M, C, g, g) where they are given. Each component has standard
    deviation 1 there.
    """
    from sklearn.decomposition import PCA

    def positions(maps: np.ndarray) -> np.ndarray:  # (N*g*g, C)
        return np.moveaxis(maps, 1, -1).reshape(-1, maps.shape[1])

    pca = PCA(3, whiten=True, random_state=0).fit(positions(maps if of is None else of))
    n, _, height, width = maps.shape
    return pca.transform(positions(maps)).reshape(n, height, width, 3)


def as_colours(components: np.ndarray) -> np.ndarray:
    """Components with standard deviation 1 -> red, green and blue in [0, 1]; two deviations fit."""
    return np.clip(0.5 + components / 4, 0, 1)


def map_grid(
    rows: Sequence[Sequence[Image.Image | np.ndarray]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
) -> Figure:
    """Pictures, colour maps (g, g, 3) and single maps (g, g) in labelled rows.

    Single maps of a row share one scale, from dark (low) to bright (high).
    """
    figure = Figure(figsize=(1.05 * len(column_labels) + 0.3, 1.03 * len(rows) + 0.4))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(rows), len(column_labels), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        single = [m for m in row if isinstance(m, np.ndarray) and m.ndim == 2]
        low, high = (min(map(np.min, single)), max(map(np.max, single))) if single else (0, 1)
        for ax, shown in zip(axes, row, strict=True):
            _draw_map(ax, shown, low, high)
    for ax, label in zip(grid[0], column_labels, strict=True):
        ax.set_title(label, fontsize=8, color=INK)
    for ax, label in zip(grid[:, 0], row_labels, strict=True):
        ax.set_ylabel(label, fontsize=8, color=INK)
    return figure


def _draw_map(ax: Axes, shown: Image.Image | np.ndarray, low: float, high: float) -> None:
    if isinstance(shown, Image.Image):
        draw_picture(ax, shown)
        return
    ax.imshow(shown, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(HAIRLINE)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """How alike two feature spaces arrange the same n pictures: (n, d), (n, e) -> 0 to 1.

    Linear centred kernel alignment (Kornblith et al. 2019): the cosine of the two tables of
    similarities between pictures. 1 when one space is a rotation or a multiple of the other.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    k, l = x @ x.T, y @ y.T  # noqa: E741  (n, n) each, as in the formula
    return float((k * l).sum() / (np.linalg.norm(k) * np.linalg.norm(l)))


def similarity_figure(
    fractions: Sequence[float], between: np.ndarray, curves: Mapping[str, tuple]
) -> Figure:
    """CKA between the features at all pairs of t, and curves over t beside it.

    fractions: t as fractions of T. between: (n, n). curves: as in `curves_figure`.
    """
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    left.imshow(between, cmap="viridis", vmin=0, vmax=1)
    write_values(left, between, (0, 1), "{:.2f}".format)
    ticks = [f"{f:g}" for f in fractions]
    left.set_xticks(range(len(ticks)), ticks)
    left.set_yticks(range(len(ticks)), ticks)
    left.set_xlabel("t / T")
    left.set_ylabel("t / T")
    left.set_title("linear CKA of UNet maps at two noise levels", fontsize=10, color=INK)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    _curves(right, fractions, curves)
    right.set_ylabel("linear CKA")
    right.set_ylim(-0.03, 1.03)
    right.set_title("UNet maps and what does not depend on t", fontsize=10, color=INK)
    right.legend(frameon=False, fontsize=9)
    return figure


def _curves(ax: Axes, fractions: Sequence[float], curves: Mapping[str, tuple]) -> None:
    """Over t, {label: (values, error or None)}; one value alone is a level without t."""
    gap = (fractions[-1] - fractions[0]) / 100  # so that error bars stand side by side
    middle = (sum(np.ndim(values) > 0 for values, _ in curves.values()) - 1) / 2
    for i, (label, (values, error)) in enumerate(curves.items()):
        colour = HUES[i % len(HUES)]
        style = {"color": colour, "elinewidth": 1, "capsize": 2, "markersize": 5, "label": label}
        x = np.asarray(fractions) + gap * (i - middle)
        marker = MARKERS[i % len(MARKERS)]
        if np.ndim(values) == 0:  # its error bar stands at the right end
            ax.axhline(values, color=colour, linestyle="--", linewidth=1)
            style |= {"linestyle": "--", "linewidth": 1}
            x = x[-1] + 6 * gap + i * gap
        ax.errorbar(x, values, error, marker=marker, **style)
    ax.set_xticks(fractions, [f"{f:g}" for f in fractions])
    ax.set_xlabel("t / T")
    plain(ax)


def neighbours_alike(
    features: np.ndarray, labels: Sequence, things: Sequence, k: int = 10
) -> float:
    """Share of the k nearest pictures by cosine that carry a picture's own label: 0 to 1.

    features: (n, d), centred here. Pictures of the same thing do not count as neighbours.
    """
    x = features - features.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, labels, things = x @ x.T, np.asarray(labels), np.asarray(things)
    cosine[things[:, None] == things] = -np.inf
    nearest = np.argsort(-cosine, axis=1)[:, :k]  # (n, k)
    return float((labels[nearest] == labels[:, None]).mean())


def umap_figure(
    points: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    notes: Mapping[tuple[str, str], str],
) -> Figure:
    """Maps of feature spaces (one per column) coloured and marked by label (one set per row).

    points: {space: (n, 2)}. labels: {what: n names}. notes: {(what, space): text below the map}.
    """
    figure = Figure(figsize=(2.4 * len(points) + 1.1, 2.7 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(points), squeeze=False)
    for axes, (what, names) in zip(grid, labels.items(), strict=True):
        names = np.asarray(names)
        for ax, (space, xy) in zip(axes, points.items(), strict=True):
            for name, colour, marker in zip(dict.fromkeys(names), HUES, MARKERS, strict=False):
                ax.scatter(
                    *xy[names == name].T, s=12, color=colour, marker=marker, alpha=0.75,
                    linewidth=0, label=name,
                )  # fmt: skip
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_color(HAIRLINE)
            ax.set_xlabel(notes[what, space], fontsize=8, color=MUTED)
        axes[-1].legend(
            title=what, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.4
        )
    for ax, space in zip(grid[0], points, strict=True):
        ax.set_title(space, fontsize=10, color=INK)
    return figure


def curves_figure(
    fractions: Sequence[float],
    panels: Mapping[str, Mapping[str, tuple]],
    ylabel: str,
    chance: Mapping[str, float] | None = None,
    marks: Sequence[float] = (),
    log: bool = False,
) -> Figure:
    """Curves over t in one panel per title, with one legend: {title: {label: (values, error)}}.

    values: one per t, or one number for what does not depend on t. error: as for matplotlib's
    `errorbar`; both are shares of 1. chance: {title: level of guessing}. marks: places on the t
    axis to mark. log: a logarithmic scale.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8, 2.7 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        _curves(ax, fractions, curves)
        ax.set_title(title, fontsize=10, color=INK)
        if log:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, None)
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        if chance is not None:
            ax.axhline(chance[title], color=MUTED, linestyle=":", label="guessing")
        for mark in marks:
            ax.axvline(mark, color=HAIRLINE, linewidth=6, zorder=0)
    for ax in figure.axes[::columns]:
        ax.set_ylabel(ylabel)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def layer_figure(noisy: Image.Image, components: np.ndarray, title: str) -> Figure:
    """A noisy picture, a layer's components (g, g, 3) as colours, and the first one alone."""
    figure = Figure(figsize=(6.9, 2.8), layout="constrained")
    shown = {
        "what the UNet is given": noisy,
        "three components": as_colours(components),
        "the first alone": components[..., 0],
    }
    for ax, (label, what) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        _draw_map(ax, what, -2, 2)
        ax.set_title(label, fontsize=9, color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    return figure


def layer_panel(
    noisy: Mapping[tuple[str, float], Image.Image],
    components: Mapping[str, Mapping[tuple[str, float], np.ndarray]],
) -> "VBox":
    """Choose picture, t and layer, and see the layer's maps.

    noisy: {(picture's name, t / T): picture}. components: {layer: {the same keys: (g, g, 3)}}.
    Returns a VBox; its attributes `picture`, `t`, `layer` and `view` are the widgets.
    """
    import ipywidgets as widgets

    names, fractions = (list(dict.fromkeys(column)) for column in zip(*noisy, strict=True))
    picture = widgets.ToggleButtons(options=names, description="picture")
    t = widgets.SelectionSlider(options=fractions, value=fractions[0], description="t / T")
    layer = widgets.ToggleButtons(options=list(components), description="layer")

    def title(name: str, fraction: float, layer: str) -> str:
        return f"{name}, t = {fraction:g} T, {layer}"

    def figure_of(name: str, fraction: float, layer: str) -> Figure:
        shown = noisy[name, fraction], components[layer][name, fraction]
        return layer_figure(*shown, title(name, fraction, layer))

    panel = figure_panel(
        (picture, t, layer), figure_of, lambda *values: f"Maps of {title(*values)}"
    )
    panel.picture, panel.t, panel.layer = picture, t, layer
    return panel
