"""Figures as pure functions: pictures and numbers in, one PIL image or matplotlib figure out."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, MUTED, HAIRLINE = "#1a1a1a", "#6b6b6b", "#d9d9d9"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    tile: int = 192,
) -> Image.Image:
    """Pictures in a labelled grid on white.

    `rows` holds one sequence of pictures per row label, with one picture, or None for a gap, per
    column label. Every picture is scaled to fit a square of `tile` pixels; 64-pixel pictures
    are thus shown three times enlarged. Long row labels are wrapped, and cut with an ellipsis
    after what fits beside the tile.

    Raises ValueError when a label is missing or left over.
    """
    if not rows or len(rows) != len(row_labels):
        raise ValueError(
            f"{len(rows)} rows of pictures need as many labels; got {len(row_labels)}."
        )
    for row in rows:
        if len(row) != len(column_labels):
            raise ValueError(f"{len(row)} pictures in a row, but {len(column_labels)} columns.")

    gap, margin = tile // 16, tile // 8
    font, small = _font(tile // 12), _font(tile // 14)
    label_width = tile
    heading = max(len(label.splitlines()) for label in column_labels) * _line(small) + gap
    left, top = margin + label_width + gap, margin + heading
    sheet = Image.new(
        "RGB",
        (
            left + len(column_labels) * (tile + gap) - gap + margin,
            top + len(rows) * (tile + gap) - gap + margin,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)

    for column, label in enumerate(column_labels):
        centre = left + column * (tile + gap) + tile // 2
        draw.multiline_text((centre, top - gap), label, MUTED, small, anchor="md", align="center")
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (tile + gap)
        text = _wrap(label, font, label_width, max_lines=tile // _line(font))
        draw.multiline_text(
            (left - gap, y + tile // 2), text, INK, font, anchor="rm", align="right"
        )
        for column, picture in enumerate(row):
            if picture is None:
                continue
            x = left + column * (tile + gap)
            fitted = _fit(picture, tile)
            corner = (x + (tile - fitted.width) // 2, y + (tile - fitted.height) // 2)
            sheet.paste(fitted, corner)
            # A hairline keeps pictures with a white background apart from the sheet.
            draw.rectangle(
                (*corner, corner[0] + fitted.width - 1, corner[1] + fitted.height - 1),
                outline=HAIRLINE,
            )
    return sheet


def _fit(picture: Image.Image, tile: int) -> Image.Image:
    scale = tile / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as shipped with matplotlib, so that labels look the same on every system."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def _line(font: ImageFont.FreeTypeFont) -> int:
    """Height of a line in pixels, as multiline_text sets it (4 px between lines)."""
    return sum(font.getmetrics()) + 4


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> str:
    """Break `text` into at most `max_lines` lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # one word may be longer than a line
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return "\n".join(lines)
