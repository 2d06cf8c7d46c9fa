"""Figures and the panel of 00_quickstart."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.plots import MUTED, draw_picture
from dte_lab.lora import PROJECTIONS, Offsets, attention_layers, projection_layer
from dte_lab.panels.shared import (
    AFTER,
    BEFORE,
    figure_panel,
    one_picture,
    plain,
    projection_maps,
)

if TYPE_CHECKING:
    from ipywidgets import VBox


def words_figure(
    cosines: Mapping[str, Sequence[float]],
    words: Sequence[str],
    picture: Image.Image | None = None,
) -> Figure:
    """Cosine similarity of one or two embeddings with real words, as horizontal bars.

    cosines: {name of the embedding: one number per word}. picture: what the embedding stands for.
    """
    inches = 0.5 + 0.36 * len(words) + 0.3 * (len(cosines) > 1)  # a legend of two stands above
    figure = Figure(figsize=(7.5, inches), layout="constrained")
    ax = figure
    if picture is None:
        ax = figure.add_subplot()
    else:
        grid = figure.add_gridspec(1, 2, width_ratios=(1, 2))
        draw_picture(figure.add_subplot(grid[0]), picture)
        ax = figure.add_subplot(grid[1])
    height = 0.8 / len(cosines)
    styles = zip((BEFORE, AFTER) if len(cosines) > 1 else (AFTER,), ("///", ""), strict=False)
    for i, ((name, values), (colour, hatch)) in enumerate(
        zip(cosines.items(), styles, strict=True)
    ):
        y = np.arange(len(words)) + (i - (len(cosines) - 1) / 2) * height
        hatch = hatch if len(cosines) > 1 else ""
        bars = ax.barh(
            y, values, height, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=name
        )
        ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color=MUTED)
    ax.set_yticks(range(len(words)), words)
    ax.invert_yaxis()
    smallest = min(min(values) for values in cosines.values())
    largest = max(max(values) for values in cosines.values())
    room = 0.15 * largest  # for the numbers beside the bars
    ax.set_xlim(smallest - room if smallest < 0 else 0, largest + room)
    ax.set_xlabel("cosine similarity")
    if len(cosines) > 1:
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    plain(ax)
    return figure


def steps_figure(
    pictures: Sequence[Image.Image], losses: Sequence[float], fixed_losses: Sequence[float]
) -> Figure:
    """One picture per tuning step above the loss, each over its step.

    losses: as tuning saw them, one per step and so one fewer than pictures. fixed_losses: of each
    state on one fixed set of noises.
    """
    n = len(pictures)
    figure = Figure(figsize=(0.85 * n, 3.6))
    left, right = 0.07, 0.99
    width = (right - left) / n
    for i, picture in enumerate(pictures):
        ax = figure.add_axes((left + (i + 0.04) * width, 0.70, 0.92 * width, 0.25))
        draw_picture(ax, picture)
    ax = figure.add_axes((left, 0.14, right - left, 0.54))
    ax.plot(
        range(len(losses)), losses, "o:", color=BEFORE, markersize=5,
        label="as tuning saw it: new noise at every step",
    )  # fmt: skip
    ax.plot(range(n), fixed_losses, "s-", color=AFTER, markersize=4, label="on fixed noise")
    ax.set_xlim(-0.5, n - 0.5)
    ax.set_xticks(range(n))
    ax.set_xlabel("tuning steps taken")
    ax.set_ylabel("diffusion loss")
    ax.legend(frameon=False, fontsize=9)
    plain(ax)
    return figure


def offset_sizes(unet: UNet2DConditionModel, offsets: Offsets) -> tuple[list[str], np.ndarray]:
    """||A B|| / ||W|| (Frobenius) of every attention projection.

    offsets: {"layer.projection": (A (1, Din, r), B (1, r, Dout))}. Returns the n layers' names and
    an array (n, 4), columns in the order of PROJECTIONS.
    """
    layers = attention_layers(unet)
    sizes = np.zeros((len(layers), len(PROJECTIONS)))
    for i, (name, attn) in enumerate(layers.items()):
        for j, projection in enumerate(PROJECTIONS):
            a, b = (m[0].float().cpu() for m in offsets[f"{name}.{projection}"])
            linear = projection_layer(attn, projection)
            sizes[i, j] = (a @ b).norm() / linear.weight.float().cpu().norm()
    return list(layers), sizes


def offsets_figure(layers: Sequence[str], sizes: Mapping[str, np.ndarray]) -> Figure:
    """Heat maps of `offset_sizes`, one per named set of offsets, in percent on one scale."""
    percent = {name: 100 * array for name, array in sizes.items()}
    top = max(array.max() for array in percent.values()) or 1
    label = "size of the change, % of the weight"
    return projection_maps(layers, percent, (0, top), "{:.2g}".format, label)


def blend_figure(
    pictures: Mapping[tuple[float, int], Image.Image], alpha: float, seed: int
) -> Figure:
    """One picture of {(alpha, seed): picture} in large, with its settings above."""
    return one_picture(pictures[alpha, seed], f"alpha_blend = {alpha:g}, seed {seed}")


def blend_panel(pictures: Mapping[tuple[float, int], Image.Image]) -> "VBox":
    """A slider for alpha_blend and buttons for the seed over pictures {(alpha, seed): picture}.

    Returns a VBox; its attributes `alpha`, `seed` and `view` are the widgets.
    """
    import ipywidgets as widgets

    alphas, seeds = (sorted(set(values)) for values in zip(*pictures, strict=True))
    alpha = widgets.SelectionSlider(
        options=alphas, value=alphas[len(alphas) // 2], description="alpha_blend"
    )
    seed = widgets.ToggleButtons(options=seeds, description="seed")
    panel = figure_panel(
        (alpha, seed),
        partial(blend_figure, pictures),
        lambda alpha, seed: f"The concept with alpha_blend {alpha:g} and seed {seed}",
    )
    panel.alpha, panel.seed = alpha, seed
    return panel
