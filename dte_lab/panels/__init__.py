"""What the notebooks show: figures as pure functions, and panels that redraw them.

A figure function takes pictures and numbers and returns a matplotlib Figure. A panel is a thin
ipywidgets wrapper around one, over results computed beforehand. `show` puts a figure into the
notebook together with its alt text, `saw` what there is to see in it, folded; `measured_with` says
whether stored numbers are of today's weights. One module per notebook; here is what all of them
use. Needs the extra `notebooks`.
"""

from dte_lab.common.plots import picture_grid
from dte_lab.panels.shared import describe_machine, measured_with, saw, show

__all__ = ["describe_machine", "measured_with", "picture_grid", "saw", "show"]
