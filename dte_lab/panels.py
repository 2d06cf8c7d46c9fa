"""What the notebooks show: figures as pure functions, and panels that redraw them.

A figure function takes pictures and numbers and returns a matplotlib Figure. A panel is a thin
ipywidgets wrapper around one, over results computed beforehand. `show` puts a figure into the
notebook together with its alt text. Needs the extra `notebooks`.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.dual_path import PROJECTIONS, attention_layers, projection_layer
from dte_lab.plots import HAIRLINE, INK, MUTED

BEFORE, AFTER = "#E69F00", "#0072B2"  # Okabe and Ito's orange and blue, safe for colour-blind eyes


def show(figure: Figure | Image.Image, alt: str) -> None:
    """Display a figure or a picture in the notebook, with alt text for those who cannot see it."""
    from IPython.display import Image as Shown
    from IPython.display import display

    png = _encode(figure, "png")
    jpeg = _encode(figure, "jpeg", quality=92)  # for drawings a fraction, for charts not
    display(Shown(min(png, jpeg, key=len), alt=alt))


def describe_machine(device: str) -> str:
    """One line on what computes, such as 'device: cpu (2 cores), 24 GB memory'."""
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        return f"device: {device} ({gpu.name}), {gpu.total_memory / 2**30:.0f} GB memory"
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"device: {device} ({os.cpu_count()} cores), {memory:.0f} GB memory"


def picture_grid(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Pictures in rows and columns, labelled above the columns and left of the rows."""
    figure = Figure(figsize=(1.45 * len(column_labels), 1.42 * len(rows) + 0.35))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(rows), len(column_labels), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for ax, picture in zip(axes, row, strict=True):
            _draw(ax, picture)
    for ax, label in zip(grid[0], column_labels, strict=True):
        ax.set_title(label, fontsize=10, color=INK)
    if row_labels is not None:
        for ax, label in zip(grid[:, 0], row_labels, strict=True):
            ax.set_ylabel(label, fontsize=10, color=INK)
    return figure


def words_figure(
    cosines: Mapping[str, Sequence[float]],
    words: Sequence[str],
    picture: Image.Image | None = None,
) -> Figure:
    """Cosine similarity of one or two embeddings with real words, as horizontal bars.

    cosines: {name of the embedding: one number per word}. picture: what the embedding stands for.
    """
    figure = Figure(figsize=(7.5, 0.5 + 0.36 * len(words)), layout="constrained")
    ax = figure
    if picture is None:
        ax = figure.add_subplot()
    else:
        grid = figure.add_gridspec(1, 2, width_ratios=(1, 2))
        _draw(figure.add_subplot(grid[0]), picture)
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
    largest = max(max(values) for values in cosines.values())
    ax.set_xlim(min(0, *(min(values) for values in cosines.values())), 1.15 * largest)
    ax.set_xlabel("cosine similarity")
    if len(cosines) > 1:
        ax.legend(frameon=False, loc="lower right")
    _plain(ax)
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
        _draw(ax, picture)
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
    _plain(ax)
    return figure


def offset_sizes(unet, offsets) -> tuple[list[str], np.ndarray]:
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
    top = max(100 * array.max() for array in sizes.values()) or 1
    figure = Figure(
        figsize=(2.2 + 3.1 * len(sizes), 0.8 + 0.32 * len(layers)), layout="constrained"
    )
    axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for ax, (name, array) in zip(axes, sizes.items(), strict=True):
        image = ax.imshow(100 * array, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        for (i, j), value in np.ndenumerate(100 * array):
            colour = "white" if value < 0.6 * top else "black"
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)
        ax.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
        ax.set_title(name, fontsize=10, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(layers)), [_layer_label(layer) for layer in layers])
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("size of the change, % of the weight")
    bar.outline.set_visible(False)
    return figure


def blend_figure(pictures: Mapping[tuple[float, int], Image.Image], alpha: float, seed: int):
    """One picture of {(alpha, seed): picture} in large, with its settings above: a Figure."""
    figure = Figure(figsize=(3, 3.3), layout="constrained")
    ax = figure.add_subplot()
    _draw(ax, pictures[alpha, seed])
    ax.set_title(f"alpha_blend = {alpha:g}, seed {seed}", fontsize=10, color=INK)
    return figure


def blend_panel(pictures: Mapping[tuple[float, int], Image.Image]):
    """A slider for alpha_blend and buttons for the seed over pictures {(alpha, seed): picture}.

    Returns a VBox; its attributes `alpha`, `seed` and `view` are the widgets.
    """
    import ipywidgets as widgets

    alphas, seeds = (sorted(set(values)) for values in zip(*pictures, strict=True))
    panel = widgets.VBox()
    panel.alpha = widgets.SelectionSlider(
        options=alphas, value=alphas[len(alphas) // 2], description="alpha_blend"
    )
    panel.seed = widgets.ToggleButtons(options=seeds, description="seed")
    panel.view = widgets.HTML()

    def redraw(change=None):
        alpha, seed = panel.alpha.value, panel.seed.value
        data = base64.b64encode(_encode(blend_figure(pictures, alpha, seed), "png")).decode()
        alt = f"The concept with alpha_blend {alpha:g} and seed {seed}"
        panel.view.value = f'<img alt="{alt}" src="data:image/png;base64,{data}">'

    panel.alpha.observe(redraw, "value")
    panel.seed.observe(redraw, "value")
    redraw()
    panel.children = (panel.alpha, panel.seed, panel.view)
    return panel


def _encode(figure: Figure | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    if isinstance(figure, Figure):
        figure.savefig(buffer, format=kind, dpi=100, pil_kwargs=options)
    else:
        figure.convert("RGB").save(buffer, format=kind, **options)
    return buffer.getvalue()


def _draw(ax, picture: Image.Image) -> None:
    """Fill the axes with a picture, framed by a hairline."""
    ax.imshow(picture, interpolation="lanczos")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(HAIRLINE)


def _plain(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK)


def _layer_label(name: str) -> str:
    """'down_blocks.0.attentions.1.transformer_blocks.0.attn2' -> 'down 0.1 cross'."""
    parts = name.split(".")
    numbers = [part for part in parts[1:4] if part.isdigit()]
    where = parts[0].removesuffix("_blocks").removesuffix("_block")
    kind = "self" if parts[-1] == "attn1" else "cross"
    return f"{where} {'.'.join(numbers)} {kind}"
