"""What the notebooks show: figures as pure functions, and panels that redraw them.

A figure function takes pictures and numbers and returns a matplotlib Figure. A panel is a thin
ipywidgets wrapper around one, over results computed beforehand. `show` puts a figure into the
notebook together with its alt text, `saw` what there is to see in it, folded, and `take_along` what
was found; `measured_with` says whether stored numbers are of today's weights. One module per
notebook; here is what all of them use, some of it from `common`: cells import from modules that
teach. Needs the extra `notebooks`.
"""

from dte_lab.common.images import read_image, square, to_bytes, to_pil
from dte_lab.common.plots import picture_grid
from dte_lab.common.quiet import quiet_libraries
from dte_lab.common.random import stream
from dte_lab.common.stats import bracketed, interval, verdict
from dte_lab.panels.shared import (
    describe_machine,
    measured_with,
    saw,
    show,
    show_table,
    take_along,
)

__all__ = [
    "bracketed",
    "describe_machine",
    "interval",
    "measured_with",
    "picture_grid",
    "quiet_libraries",
    "read_image",
    "saw",
    "show",
    "show_table",
    "square",
    "stream",
    "take_along",
    "to_bytes",
    "to_pil",
    "verdict",
]
