"""Pictures, grids of them, and the colours and manners of all figures."""

import io
import os
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageStat

from dte_lab.plots import HAIRLINE, INK

BEFORE, AFTER = "#E69F00", "#0072B2"  # Okabe and Ito's orange and blue, safe for colour-blind eyes


def show(figure: Figure | Image.Image, alt: str) -> None:
    """Display a figure or a picture in the notebook, with alt text for those who cannot see it."""
    from IPython.display import Image as Shown
    from IPython.display import display

    png = encode(figure, "png")
    jpeg = encode(figure, "jpeg", quality=92)  # for drawings a fraction, for charts not
    display(Shown(min(png, with_palette(png), jpeg, key=len), alt=alt))


def with_palette(png: bytes) -> bytes:
    """The same PNG with at most 128 colours, a third of the size; itself where that would show."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    few = picture.quantize(128, dither=Image.Dither.NONE)
    change = ImageChops.difference(picture, few.convert("RGB"))
    if max(ImageStat.Stat(change).rms) > 2:  # of 255: photographs, smooth colours
        return png
    buffer = io.BytesIO()
    few.save(buffer, "png", optimize=True)
    return buffer.getvalue()


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
            draw(ax, picture)
    for ax, label in zip(grid[0], column_labels, strict=True):
        ax.set_title(label, fontsize=10, color=INK)
    if row_labels is not None:
        for ax, label in zip(grid[:, 0], row_labels, strict=True):
            ax.set_ylabel(label, fontsize=10, color=INK)
    return figure


def encode(figure: Figure | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    if isinstance(figure, Figure):
        figure.savefig(buffer, format=kind, dpi=100, pil_kwargs=options)
    else:
        figure.convert("RGB").save(buffer, format=kind, **options)
    return buffer.getvalue()


def draw(ax, picture: Image.Image) -> None:
    """Fill the axes with a picture, framed by a hairline."""
    ax.imshow(picture, interpolation="lanczos")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(HAIRLINE)


def plain(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK)


def layer_label(name: str) -> str:
    """'down_blocks.0.attentions.1.transformer_blocks.0.attn2' -> 'down 0.1 cross'."""
    parts = name.split(".")
    numbers = [part for part in parts[1:4] if part.isdigit()]
    where = parts[0].removesuffix("_blocks").removesuffix("_block")
    kind = "self" if parts[-1] == "attn1" else "cross"
    return f"{where} {'.'.join(numbers)} {kind}"
