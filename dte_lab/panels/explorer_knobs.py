"""The explorer's knobs: a row for each switch, A beside B; what changes nothing is put to rest."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dte_lab.panels.explorer_settings import SWITCH_OF, SWITCHES, ExplorerSetting, Switch, in_words

if TYPE_CHECKING:
    from ipywidgets import Widget

KNOB_LOOKS = {"layout": {"width": "150px"}}


class Knobs:
    """Widgets of two settings. `box` shows them; on_change: called after each change."""

    def __init__(
        self, a: ExplorerSetting, b: ExplorerSetting, on_change: Callable[[], object]
    ) -> None:
        import ipywidgets as widgets

        self.on_change, self.quiet = on_change, False
        self.sides = [
            {
                name: self._widget(switch, getattr(setting, name))
                for name, switch in SWITCH_OF.items()
            }
            for setting in (a, b)
        ]
        self.labels, pages = {}, []
        for group in SWITCHES.values():
            cells = [widgets.HTML(f"<b>{head}</b>") for head in ("", "A", "B", "")]
            for switch in group:
                label, note = widgets.HTML(switch.label), widgets.HTML()
                self.labels[switch.field] = label, note
                cells += [label, *(side[switch.field] for side in self.sides), note]
            layout = widgets.Layout(grid_template_columns="180px 170px 170px 1fr")
            pages.append(widgets.GridBox(cells, layout=layout))
        self.box = widgets.Accordion(pages, titles=tuple(SWITCHES))
        self.box.selected_index = list(SWITCHES).index("Tuning")
        for side in self.sides:
            for widget in side.values():
                widget.observe(self._changed, "value")

    def read(self) -> tuple[ExplorerSetting, ExplorerSetting]:
        """A and B as they stand. Raises DTEError for what means nothing together."""
        a, b = (
            ExplorerSetting(**{name: w.value for name, w in side.items()}) for side in self.sides
        )
        return a, b

    def write(self, a: ExplorerSetting, b: ExplorerSetting) -> None:
        """Put the knobs somewhere, with one call of `on_change` at the end."""
        self.quiet = True
        try:
            for side, setting in zip(self.sides, (a, b), strict=True):
                for name, widget in side.items():
                    value = getattr(setting, name)
                    if SWITCH_OF[name].choices and value not in dict(widget.options).values():
                        widget.options = (*widget.options, (in_words(name, value), value))
                    widget.value = value
        finally:
            self.quiet = False
        self.on_change()

    def rest(self, idle: tuple[Mapping[str, str], Mapping[str, str]]) -> None:
        """Disable the knobs that change nothing, say why beside them, and mark what differs."""
        for name, (label, note) in self.labels.items():
            widgets = [side[name] for side in self.sides]
            for widget, found in zip(widgets, idle, strict=True):
                widget.disabled = name in found
            whys = [found.get(name) for found in idle]
            if whys[0] == whys[1]:
                whys = {"A and B": whys[0]}
            else:
                whys = dict(zip("AB", whys, strict=True))
            whys = [f"{side}: {why}" for side, why in whys.items() if why]
            said = f"changes nothing. {'; '.join(whys)}" if whys else ""
            note.value = f'<span style="color:#6b6b6b;font-size:12px">{said}</span>'
            differs = widgets[0].value != widgets[1].value
            text = SWITCH_OF[name].label
            label.value = f"<b>{text} ≠</b>" if differs else text

    def _changed(self, change: object) -> None:
        if not self.quiet:
            self.on_change()

    def _widget(self, switch: Switch, value: object) -> "Widget":
        import ipywidgets as widgets

        if switch.choices:
            choices = switch.choices if value in switch.choices else (*switch.choices, value)
            options = [(in_words(switch.field, choice), choice) for choice in choices]
            return widgets.Dropdown(options=options, value=value, **KNOB_LOOKS)
        kind = widgets.BoundedIntText if isinstance(switch.low, int) else widgets.BoundedFloatText
        step = {} if isinstance(switch.low, int) else {"step": None}
        return kind(value=value, min=switch.low, max=switch.high, **step, **KNOB_LOOKS)
