"""The colours and manners of all figures, and how one comes into a notebook."""

import base64
import html
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageStat

from dte_lab.common.plots import INK, draw_picture
from dte_lab.lora import PROJECTIONS

if TYPE_CHECKING:
    from ipywidgets import VBox, Widget

# Okabe and Ito's colours, safe for colour-blind eyes.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION = "#56B4E9", "#D55E00"
BEFORE, AFTER = ORANGE, BLUE
DPI, SHOWN_DPI = 144, 100  # pixels of a figure, and of the page where it is shown, an inch
WEIGHTS_SINCE = "2026-11-28"  # when the shipped weights were trained


def show(figure: Figure | Image.Image, alt: str) -> None:
    """Display a figure or a picture in the notebook, with alt text for those who cannot see it.

    As HTML: of a picture that is displayed as such, JupyterLab and nbconvert drop the alt text.
    """
    from IPython.display import display

    png = encode(figure, "png")
    jpeg = encode(figure, "jpeg", quality=45, optimize=True, progressive=True)
    smallest = min(png, with_palette(png), jpeg, key=len)
    tag = tag_of(smallest, alt, shown_width(figure))
    display({"text/html": tag, "text/plain": alt}, raw=True)


def show_table(rows: Sequence[Sequence[object]], columns: Sequence[str], caption: str = "") -> None:
    """Display rows of numbers and texts under the names of their columns, and a caption above."""
    from IPython.display import display

    rows = [[str(cell) for cell in row] for row in rows]
    page = table_html(rows, columns, caption)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    plain_rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]
    text = "\n".join([caption] * bool(caption) + plain_rows)
    display({"text/html": page, "text/plain": text}, raw=True)


def table_html(
    rows: Sequence[Sequence[object]],
    columns: Sequence[str],
    caption: str = "",
    style: str = "",
    cell_style: str = "text-align: left",
) -> str:
    """Rows under the names of their columns as an HTML table; all texts are escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        said = (f'<{tag} style="{cell_style}">{html.escape(str(c))}</{tag}>' for c in cells)
        return f"<tr>{''.join(said)}</tr>"

    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    head, body = line(columns, "th"), "".join(line(row, "td") for row in rows)
    opened = f'<table style="{style}">' if style else "<table>"
    return f"{opened}{title}<thead>{head}</thead><tbody>{body}</tbody></table>"


def measured_with(versions: Mapping[str, str]) -> str:
    """When stored numbers were measured, and whether that was before today's weights were."""
    date = versions["date"]
    return f"measured {date}" + (", former model" if date < WEIGHTS_SINCE else "")


def saw(*sentences: str) -> None:
    """Display what is to be seen in the results above, folded: the reader looks first."""
    text = " ".join(sentences)
    folded = f"<details><summary>What we saw</summary><p>{html.escape(text)}</p></details>"
    _rich_or_plain(folded, f"What we saw: {text}")


def take_along(*sentences: str) -> None:
    """Display what a notebook has found, a sentence to a line, below its "To take along"."""
    lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    _rich_or_plain(f"<p>Found here:</p><ul>{lines}</ul>", "\n- ".join(["Found here:", *sentences]))


def _rich_or_plain(rich: str, plain: str) -> None:
    from IPython.display import display

    display({"text/html": rich, "text/plain": plain}, raw=True)


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


def one_picture(picture: Image.Image, title: str) -> Figure:
    """A picture in large with a title of one or more lines."""
    figure = Figure(figsize=(3, 3.1 + 0.2 * len(title.splitlines())), layout="constrained")
    ax = figure.add_subplot()
    draw_picture(ax, picture)
    ax.set_title(title, fontsize=10, color=INK)
    return figure


def projection_maps(
    layers: Sequence[str],
    maps: Mapping[str, np.ndarray],
    scale: tuple[float, float],
    number: Callable[[float], str],
    label: str,
) -> Figure:
    """Heat maps with the numbers written in: attention layers by projections, one per named array.

    maps: {title: (layers, PROJECTIONS)}. scale: lowest and highest value. label: of the colours.
    """
    figure = Figure(figsize=(2.2 + 3.1 * len(maps), 0.8 + 0.32 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for ax, (title, array) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(array, cmap="viridis", vmin=scale[0], vmax=scale[1], aspect="auto")
        write_values(ax, array, scale, number)
        ax.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
        ax.set_title(title, fontsize=10, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(layers)), [layer_label(layer) for layer in layers])
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure


def write_values(
    ax: Axes,
    array: np.ndarray,
    scale: tuple[float, float],
    number: Callable[[float], str],
    fontsize: float = 8,
) -> None:
    """Write each value of a viridis heat map into its cell, white on what is dark."""
    low, high = scale
    for (i, j), value in np.ndenumerate(array):
        colour = "white" if value < low + 0.6 * (high - low) else "black"
        ax.text(j, i, number(value), ha="center", va="center", fontsize=fontsize, color=colour)


def figure_panel(
    knobs: Sequence["Widget"], figure_of: Callable[..., Figure], describe: Callable[..., str]
) -> "VBox":
    """Widgets above the figure `figure_of(*values)` with alt text `describe(*values)`.

    What goes wrong while one moves them is said in the figure's place, or nobody would see it.
    Returns a VBox; its attribute `view` is the widget that shows the figure; it keeps `knobs` and
    `describe`, for `live.with_live`.
    """
    import ipywidgets as widgets

    panel = widgets.VBox()
    panel.view, panel.knobs, panel.describe = widgets.HTML(), tuple(knobs), describe

    def redraw(change: object = None) -> None:
        values = [knob.value for knob in knobs]
        try:
            figure = figure_of(*values)
            panel.view.value = image_tag(figure, describe(*values))
        except Exception as error:
            if change is None:
                raise
            panel.view.value = alert(f"This could not be drawn. {type(error).__name__}: {error}")

    for knob in knobs:
        knob.observe(redraw, "value")
    redraw()
    panel.children = (*knobs, panel.view)
    return panel


def alert(text: object) -> str:
    """What went wrong, where one looks."""
    said = html.escape(str(text))
    return f'<p role="alert" style="color:#a40000;font-weight:600">{said}</p>'


def encode(figure: Figure | Image.Image, kind: str, **options: object) -> bytes:
    """A figure or a picture as PNG or JPEG. options: of Pillow's writer."""
    buffer = io.BytesIO()
    if isinstance(figure, Figure):
        figure.savefig(buffer, format=kind, dpi=DPI, pil_kwargs=options)
    else:
        figure.convert("RGB").save(buffer, format=kind, **options)
    return buffer.getvalue()


def image_tag(figure: Figure | Image.Image, alt: str) -> str:
    """A figure as HTML, as wide as a page shows it."""
    return tag_of(encode(figure, "png"), alt, shown_width(figure))


def tag_of(data: bytes, alt: str, width: int | None) -> str:
    """A PNG or JPEG as HTML, `width` pixels of the page wide."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    wide = f' width="{width}"' if width else ""
    code = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}"{wide} src="data:image/{kind};base64,{code}">'


def shown_width(figure: Figure | Image.Image) -> int | None:
    """Pixels of a page that a figure takes, fewer than it has; None for a picture, as it is."""
    if isinstance(figure, Figure):
        return round(SHOWN_DPI * figure.get_figwidth())
    dpi = figure.info.get("dpi")  # of a figure that was stored
    return round(figure.width * SHOWN_DPI / dpi[0]) if dpi else None


def plain(ax: Axes) -> None:
    """No frame above and on the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK)


def label_points(ax: Axes, labels: Sequence[tuple[float, float, str]], fontsize: float = 8) -> None:
    """Write texts beside points (x, y), each where no other is yet; one without room is left out.

    Call it when the axes have all else. No label lies on another, nor on another's point; where
    there is a choice, it is clearly nearer to its own.
    """
    ax.figure.draw_without_rendering()  # so that points have places
    scale, taken = 72 / ax.figure.dpi, []
    places = [tuple(scale * ax.transData.transform((x, y))) for x, y, _ in labels]
    points = [(u - 3, v - 3, u + 3, v + 3) for u, v in places]
    for (x, y, text), (left, bottom) in zip(labels, places, strict=True):
        width, height = 0.62 * fontsize * len(text), 1.1 * fontsize
        others, free = [place for place in places if place != (left, bottom)], []
        for right_by, up_by in (
            (5, 3), (5, -height - 3), (-width - 5, 3), (-width - 5, -height - 3),
            (-width / 2, 7), (-width / 2, -height - 7), (9, -height / 2), (-width - 9, -height / 2),
        ):  # fmt: skip
            a, b = left + right_by, bottom + up_by
            box, middle = (a, b, a + width, b + height), (a + width / 2, b + height / 2)
            if any(_overlap(box, other) for other in taken + points):
                continue
            other = min((math.dist(middle, place) for place in others), default=math.inf)
            free.append((other / math.dist(middle, (left, bottom)), box, (right_by, up_by)))
        if not free:
            continue
        _, box, by = next((place for place in free if place[0] > 1.25), max(free))
        taken.append(box)
        ax.annotate(
            text, (x, y), by, textcoords="offset points", fontsize=fontsize, color=INK, va="bottom"
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, bottom, right, top) share more than a border."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def layer_label(name: str) -> str:
    """'down_blocks.0.attentions.1.transformer_blocks.0.attn2' -> 'down 0.1 cross'."""
    parts = name.split(".")
    numbers = [part for part in parts[1:4] if part.isdigit()]
    where = parts[0].removesuffix("_blocks").removesuffix("_block")
    kind = "self" if parts[-1] == "attn1" else "cross"
    return f"{where} {'.'.join(numbers)} {kind}"
