"""A prompt of one's own, drawn when it is asked for, beside what a panel looks up."""

import html
from collections.abc import Callable
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.plots import INK, draw_picture
from dte_lab.panels.shared import alert, image_tag

if TYPE_CHECKING:
    from ipywidgets import VBox

SIDE_BY_SIDE = {"flex_flow": "row wrap", "align_items": "flex-start"}


def with_live(
    panel: "VBox",
    draw: Callable[..., Figure | Image.Image],
    prompt: str,
    given: Image.Image | Callable[..., Image.Image] | None = None,
) -> "VBox":
    """The panel of `figure_panel` with a free prompt and a button that runs it live.

    draw: (prompt, *values of the panel's knobs) -> what is shown. prompt: to begin with. given: the
    input, shown beside each drawing; or, where a knob chooses it, (*values of the knobs) -> input.
    The panel gets the attributes `prompt`, `run`, `status` and `live`, all widgets; what goes wrong
    is said in `status`, above the drawing, and the drawing before it stays.
    """
    import ipywidgets as widgets

    panel.prompt = widgets.Text(
        value=prompt, description="your prompt", layout={"width": "430px"},
        style={"description_width": "6em"},
    )  # fmt: skip
    panel.run = widgets.Button(description="Run it live", button_style="primary")
    panel.status = widgets.HTML("<p>The same settings, with a prompt of your own.</p>")
    panel.live = widgets.HTML()

    def input_of(values: tuple) -> Image.Image | None:
        return given(*values) if callable(given) else given

    def run(button: object) -> None:
        values = tuple(knob.value for knob in panel.knobs)
        panel.run.disabled, panel.status.value = True, "<p>Drawing …</p>"
        try:
            found = draw(panel.prompt.value, *values)
            said = f"{panel.describe(*values)}; prompt: {panel.prompt.value}"
            shown = image_tag(beside(input_of(values), found), f"Drawn live. {said}")
            panel.live.value = f"{shown}<p>{html.escape(said)}</p>"
            panel.status.value = "<p>Done.</p>"
        except DTEError as error:
            panel.status.value = alert(error)
        except Exception as error:  # of a button nobody sees the traceback
            panel.status.value = alert(f"This failed. {type(error).__name__}: {error}")
        finally:
            panel.run.disabled = False

    panel.run.on_click(run)
    if (first := input_of(tuple(knob.value for knob in panel.knobs))) is not None:
        panel.live.value = image_tag(beside(first), "The input")
    column = widgets.VBox([widgets.HBox([panel.prompt, panel.run]), panel.status, panel.live])
    looked_up = widgets.VBox(panel.children)
    panel.children = (widgets.HBox([looked_up, column], layout=SIDE_BY_SIDE),)
    return panel


def beside(
    given: Image.Image | None, found: Figure | Image.Image | None = None
) -> Figure | Image.Image:
    """The input and a drawing to the right of it, in large; a figure as it is."""
    if isinstance(found, Figure):
        return found
    named = {"the input": given, "drawn live": found}
    row = {title: picture for title, picture in named.items() if picture is not None}
    figure = Figure(figsize=(2.7 * len(row), 3), layout="constrained")
    for ax, (title, picture) in zip(
        figure.subplots(1, len(row), squeeze=False)[0], row.items(), strict=True
    ):
        draw_picture(ax, picture)
        ax.set_title(title, fontsize=10, color=INK)
    return figure
