"""Pictures in a grid as a matplotlib figure, without pyplot; and writing a figure to a file."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.files import write_atomically

INK, MUTED, HAIRLINE = "#1a1a1a", "#6b6b6b", "#d9d9d9"
LETTERS = 24  # in a line beside a row
LINE = 0.167  # inches of a line of 10 points


def picture_grid(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Pictures in rows and columns, labelled above the columns and left of the rows.

    Long labels of rows are wrapped, and cut after what fits beside the picture. Raises ValueError
    when a picture or a label is missing or left over.
    """
    above = max(label.count("\n") for label in column_labels)
    width, height = 1.45 * len(column_labels), 1.42 * len(rows) + 0.35 + LINE * above
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(rows), len(column_labels), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for ax, picture in zip(axes, row, strict=True):
            draw_picture(ax, picture)
    style = {"fontsize": 10, "color": INK, "parse_math": False}
    for ax, label in zip(grid[0], column_labels, strict=True):
        ax.set_title(label, **style)
    if row_labels is not None:
        style |= {"rotation": 0, "ha": "right", "va": "center"}
        for ax, label in zip(grid[:, 0], row_labels, strict=True):
            ax.set_ylabel(wrapped(label), **style)
        with _any_script():
            beside = max(ax.yaxis.label.get_window_extent().width for ax in grid[:, 0])
            figure.set_figwidth(width + beside / figure.dpi + 0.1)  # and its distance
            figure.get_layout_engine().execute(figure)  # a single pass would cut long labels
    return figure


def wrapped(label: str, lines: int = 6) -> str:
    """A label in at most so many lines of at most `LETTERS`, with an ellipsis where it was cut."""
    return fill(" ".join(label.split()), LETTERS, max_lines=lines, placeholder=" …")


@contextmanager
def _any_script() -> Iterator[None]:
    """No warning for letters that the font lacks, as a prompt may have: they become boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")
        yield


def draw_picture(ax: Axes, picture: Image.Image) -> None:
    """Fill the axes with a picture, framed by a hairline."""
    ax.imshow(picture, interpolation="lanczos")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(HAIRLINE)


def save_figure(figure: Figure, path: str | Path, dpi: int = 150, **options: object) -> None:
    """Write a figure as a PNG that is either whole or not there. options: of `savefig`.

    Raises OSError when the folder cannot be written.
    """
    buffer = io.BytesIO()
    with _any_script():
        figure.savefig(buffer, format="png", dpi=dpi, **options)
    write_atomically(path, buffer.getvalue())
