"""Figures and panels of 02_contrastive_regularization: words, and the loss as arrows.

Those of its experiment are in regularisation.py, the map of words in word_map.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dte_lab.common.plots import INK, MUTED, draw_picture
from dte_lab.contrastive import contrastive_loss, norm_loss
from dte_lab.panels.shared import BLUE, GREEN, SKY, VERMILION, figure_panel, plain

if TYPE_CHECKING:
    from ipywidgets import VBox

WITH, WITHOUT = BLUE, VERMILION  # never the only difference


def nearness_figure(
    nearest: np.ndarray, random: np.ndarray, points: Mapping[str, Sequence[float]]
) -> Figure:
    """Histograms of the cosine of words to their nearest and to random words, and points below.

    points: {name: cosines of embeddings to their nearest word}.
    """
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    ax = figure.add_subplot()
    bins = np.linspace(min(-0.2, random.min()), 1, 61)
    for values, label, colour, hatch in (
        (random, "two random words", MUTED, "...."),
        (nearest, "a word and its nearest", WITH, None),
    ):
        share = np.full(len(values), 1 / len(values))
        ax.hist(
            values, bins, weights=share, histtype="stepfilled", alpha=0.55, color=colour,
            hatch=hatch, edgecolor=colour, label=label,
        )  # fmt: skip
    top = ax.get_ylim()[1]
    for i, (name, cosines) in enumerate(points.items()):
        height = np.full(len(cosines), -(0.08 + 0.1 * i) * top)
        ax.plot(cosines, height, "D^"[i % 2], color=WITHOUT, ms=6, mec="white", label=name)
    ax.set_ylim(-(0.06 + 0.1 * len(points)) * top, top)
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    ax.axhline(0, color=MUTED, lw=0.8)
    ax.set_xlabel("cosine similarity")
    ax.set_ylabel("share of words")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    plain(ax)
    return figure


def neighbours_figure(
    pictures: Sequence[Image.Image], names: Sequence[str], nearest: Sequence[Sequence[tuple]]
) -> Figure:
    """Each picture with its name above and its nearest words, [(word, cosine), ...], below."""
    n, lines = len(pictures), max(map(len, nearest))
    figure = Figure(figsize=(1.75 * n, 2.1 + 0.19 * lines), layout="constrained")
    grid = figure.add_gridspec(2, n, height_ratios=(1.6, 0.19 * lines))
    for i, (picture, name, words) in enumerate(zip(pictures, names, nearest, strict=True)):
        ax = figure.add_subplot(grid[0, i])
        draw_picture(ax, picture)
        ax.set_title(name, fontsize=10, color=INK)
        ax = figure.add_subplot(grid[1, i])
        ax.axis("off")
        text = "\n".join(f"{cosine:.2f}  {word}" for word, cosine in words)
        ax.text(0, 1, text, va="top", fontsize=9, color=INK, linespacing=1.35)
    return figure


def field_figure(
    words: Mapping[str, Sequence[float]], negatives: Sequence[Sequence[float]],
    num_positives: int, temperature: float, norm_weight: float, ax: Axes | None = None,
) -> Figure | None:  # fmt: skip
    """The regulariser in a plane: its value as colour, and the direction downhill as arrows.

    words: {word: (x, y)}. negatives: embeddings of other concepts, (m, 2). The N nearest words are
    chosen anew at every point, as the loss does. Draws into `ax` where one is given.
    """
    figure = None
    if ax is None:
        figure = Figure(figsize=(5.4, 5.2), layout="constrained")
        ax = figure.add_subplot()
    table = torch.tensor(list(words.values()), dtype=torch.float32)
    others = torch.tensor(negatives, dtype=torch.float32)
    value, _, side = _field(table, others, num_positives, temperature, norm_weight, 80)
    levels = ax.contourf(side, side, value, 12, cmap="cividis")
    if figure is not None:
        bar = figure.colorbar(levels, ax=ax, shrink=0.8)
        bar.set_label("loss")
        bar.outline.set_visible(False)
    _, slope, side = _field(table, others, num_positives, temperature, norm_weight, 14)
    length = np.linalg.norm(slope, axis=-1, keepdims=True)
    arrows = -slope / (length + 0.15 * np.percentile(length, 90))  # long ones are cut
    ax.quiver(side, side, *np.moveaxis(arrows, -1, 0), color="white", scale=19, width=0.006)
    ax.plot(0, 0, "+", color="white", ms=9, mew=1.5)
    ax.plot(*others.T, "X", color=VERMILION, mec="white", ms=9)
    ax.plot(*table.T, "o", color=SKY, mec="white", ms=7)
    for word, (x, y) in words.items():
        ax.annotate(
            word, (x, y), (5, 5), textcoords="offset points", fontsize=8 + (figure is not None),
            color="black", bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(f"N = {num_positives}, τ = {temperature:g}, norm weight {norm_weight:g}",
                 fontsize=9, color=INK)  # fmt: skip
    return figure


def field_row(
    words: Mapping[str, Sequence[float]],
    negatives: Sequence[Sequence[float]],
    settings: Sequence[tuple[int, float, float]],
) -> Figure:
    """`field_figure` for several (num_positives, temperature, norm_weight), side by side."""
    figure = Figure(figsize=(2.75 * len(settings), 2.95), layout="constrained")
    axes = figure.subplots(1, len(settings), squeeze=False)[0]
    for ax, setting in zip(axes, settings, strict=True):
        field_figure(words, negatives, *setting, ax=ax)
    return figure


def _field(
    table: Tensor,
    others: Tensor,
    num_positives: int,
    temperature: float,
    norm_weight: float,
    n: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss (n, n) and gradient (n, n, 2) on a square grid, and its side (n,), as arrays.

    n is even, so that no point is the origin, which has no direction.
    """
    reach = 1.25 * table.abs().max().item()
    side = torch.linspace(-reach, reach, n)
    v = torch.cartesian_prod(side, side).flip(-1)  # rows from the bottom up, x fastest
    v.requires_grad_()
    unit = torch.nn.functional.normalize
    rows = (unit(v.detach(), dim=-1) @ unit(table, dim=-1).T).topk(num_positives).indices
    mean_norm = table.norm(dim=-1).mean()

    def loss(v: Tensor, near: Tensor) -> Tensor:  # of one point
        term = contrastive_loss(v[None], near[None], others, temperature=temperature)
        return term + norm_weight * norm_loss(v[None], mean_norm)

    losses = torch.vmap(loss)(v, table[rows])
    (slope,) = torch.autograd.grad(losses.sum(), v)
    return losses.detach().view(n, n).numpy(), slope.view(n, n, 2).numpy(), side.numpy()


def pulls_figure(pulls: Mapping[str, Tensor]) -> Figure:
    """Vectors {name: (d,)} as arrows, in the plane of the first and of what is new in the second.

    The others are projected; beside each name stand its length and the share that the plane shows.
    """
    first, second = (x.double() for x in list(pulls.values())[:2])
    x = first / first.norm()
    y = second - (second @ x) * x
    y = y / y.norm()
    figure = Figure(figsize=(6.6, 4.4))
    figure.set_layout_engine("constrained", h_pad=0.12)
    ax = figure.add_subplot()
    ends = []
    styles = zip((VERMILION, BLUE, GREEN, INK), ("-", "--", ":", "-."), strict=True)
    for (name, vector), (colour, dash) in zip(pulls.items(), styles, strict=False):
        vector = vector.double()
        end = torch.stack([vector @ x, vector @ y]).numpy()
        shown = np.linalg.norm(end) / vector.norm().item()
        label = f"{name}: length {vector.norm():.2g}, {shown:.0%} of it in this plane"
        ax.annotate(
            "", end, (0, 0),
            arrowprops={"arrowstyle": "-|>", "color": colour, "linestyle": dash, "lw": 2.2,
                        "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14},
        )  # fmt: skip
        ax.plot([], [], color=colour, ls=dash, lw=2.2, label=label)
        ends.append(end)
    ends = np.array([*ends, (0, 0)])
    low, high = ends.min(0), ends.max(0)
    pad = 0.12 * (high - low).max()
    width, height = high - low + 2 * pad
    figure.set_figheight(1.9 + 5.6 * min(height / width, 0.8))
    ax.set_xlim(low[0] - pad, high[0] + pad)
    ax.set_ylim(low[1] - pad, high[1] + pad)
    ax.set_aspect("equal")
    ax.plot(0, 0, "o", color=INK)
    ax.annotate("v*", (0, 0), (-14, -12), textcoords="offset points", color=INK)
    ax.set_xlabel(f"along: {list(pulls)[0]}")
    ax.set_ylabel("across")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    plain(ax)
    return figure


def sliders_panel(
    options: Mapping[str, Sequence],
    start: tuple,
    figure_of: Callable[..., Figure],
    describe: Callable[..., str],
) -> "VBox":
    """A slider per name, and the figure `figure_of(*values)` with alt text `describe(*values)`.

    Returns a VBox; its attributes `sliders` (a dict) and `view` are the widgets.
    """
    import ipywidgets as widgets

    sliders = {
        name: widgets.SelectionSlider(
            options=list(values), value=value, description=name, style={"description_width": "9em"},
            layout={"width": "26em"}, continuous_update=False,
        )
        for (name, values), value in zip(options.items(), start, strict=True)
    }  # fmt: skip
    panel = figure_panel(list(sliders.values()), figure_of, describe)
    panel.sliders = sliders
    return panel
