"""The panel of 06_ablation_explorer, which is also the app of `dte explore`: what if?

A picture, a prompt, and every switch of the method, A beside B. What it computes is in
explorer_runs.py; here are the widgets. A run goes on in a thread of its own, so that it can be
stopped; what goes wrong is said in one sentence in the panel.
"""

import base64
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from dte_lab.common.errors import DTEError, is_out_of_memory
from dte_lab.panels import explorer_history as history
from dte_lab.panels.explorer_expeditions import ON_WHITE, Stop, expeditions
from dte_lab.panels.explorer_history import Run
from dte_lab.panels.explorer_knobs import Knobs
from dte_lab.panels.explorer_lanes import Stopped
from dte_lab.panels.explorer_measures import warm_up
from dte_lab.panels.explorer_runs import Explorer, Outcome, Question, Subject, subjects
from dte_lab.panels.explorer_settings import ExplorerSetting, change_in_words
from dte_lab.panels.explorer_view import (
    described,
    history_html,
    run_figure,
    run_html,
)
from dte_lab.panels.shared import alert, image_tag
from dte_lab.pipeline import DTEPipeline

if TYPE_CHECKING:
    from ipywidgets import VBox

SNUG = {"layout": {"width": "auto"}}


def explorer_panel(pipe: DTEPipeline) -> "VBox":
    """The whole panel as a VBox; its attribute `control` is the `ExplorerPanel` behind it."""
    control = ExplorerPanel(Explorer(pipe))
    control.box.control = control
    if pipe.backbone.draws_small_world:
        threading.Thread(target=warm_up).start()  # while one reads and turns knobs
    return control.box


class ExplorerPanel:
    """The widgets and what they do. `runs` is the history; `thread` the latest run's."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.runs = explorer, []
        self.thread: threading.Thread | None = None
        self.stopping = threading.Event()
        self.own: Subject | None = None
        self.where, self.asked_at = "", None  # the stop, and what its knobs said
        usual = self.usual = ExplorerSetting.of(explorer.pipe)
        self._make_question()
        self._make_results()
        self._make_trips()
        self.knobs = Knobs(usual, ExplorerSetting.of(explorer.pipe, steps=0), self.refresh)
        self._lay_out()
        self.refresh()

    def question(self) -> Question:
        """What is asked. Raises DTEError for what means nothing."""
        subject = self.own if self.picture.value is None else self.picture.value
        if subject is None:
            raise DTEError("Upload a picture, or choose one of the thirty.")
        prompts = tuple(line.strip() for line in self.prompts.value.splitlines() if line.strip())
        try:
            seeds = tuple(int(text) for text in self.seeds.value.replace(",", " ").split())
        except ValueError as error:
            raise DTEError(
                f"Seeds are whole numbers such as 0 1 2, not {self.seeds.value!r}."
            ) from error
        question = Question(subject, prompts, seeds)
        question.check()
        return question

    def start(self, _: object = None) -> None:
        """Answer the question as it stands, in a thread."""
        if self.thread is not None and self.thread.is_alive():
            return
        try:
            question, settings = self.question(), self.knobs.read()
        except DTEError as error:
            self.status.value = alert(error)
            return
        self.stopping.clear()
        self.run.disabled, self.stop.disabled = True, False
        self.bar.value, self.status.value = 0, "<p>Learning and drawing …</p>"
        where = self.where if (question, settings) == self.asked_at else ""
        self.thread = threading.Thread(target=self._work, args=(question, settings, where))
        self.thread.start()

    def halt(self, _: object = None) -> None:
        """Stop the run at its next step."""
        self.stopping.set()
        self.status.value = "<p>Stopping …</p>"

    def refresh(self) -> None:
        """Say what differs between A and B, and put to rest what changes nothing."""
        try:
            settings = self.knobs.read()
            idle = tuple(self.explorer.idle(setting) for setting in settings)
        except DTEError as error:
            self.told.value = alert(error)
            return
        self.knobs.rest(idle)
        self.told.value = f"<p>{change_in_words(*settings, set(idle[0]) & set(idle[1]))}</p>"

    def go_to(self, stop: Stop) -> None:
        """Put picture, prompts and knobs where a stop of an expedition wants them."""
        self.take_up(stop.question, *stop.settings(self.usual), stop.title)

    def take_up(
        self, question: Question, a: ExplorerSetting, b: ExplorerSetting, where: str = ""
    ) -> None:
        """Put everything where a question and two settings want it."""
        known = dict(self.picture.options).values()
        if question.subject in known:
            self.picture.value = question.subject
        else:  # an upload: this session's, or one that is not in the file
            own = self.own is not None and self.own.digest == question.subject.digest
            self.own, self.picture.value = self.own if own else question.subject, None
        self.prompts.value = "\n".join(question.prompts)
        self.seeds.value = " ".join(map(str, question.seeds))
        self.knobs.write(a, b)
        self.where, self.asked_at = where, (question, (a, b))

    def _tick(self, done: float) -> None:
        self.bar.value = done
        if self.stopping.is_set():
            raise Stopped

    def _work(
        self, question: Question, settings: tuple[ExplorerSetting, ExplorerSetting], where: str
    ) -> None:
        try:
            answers = self.explorer.compare(question, settings, self._tick)
            run = Run.of(question, settings, answers, where)
            self._show(run, answers)
            self.runs.append(run)
            self._show_history()
            self.status.value = "<p>Done.</p>"
        except Stopped:
            self.status.value = "<p>Stopped. What was there before is still shown.</p>"
        except DTEError as error:
            self.status.value = alert(error)
        except Exception as error:  # a thread's traceback is seen by nobody
            told = "the memory is used up, ask for fewer pictures" if is_out_of_memory(error) else (
                f"{type(error).__name__}: {error}"
            )  # fmt: skip
            self.status.value = alert(f"This could not be computed: {told}.")
        finally:
            self.run.disabled, self.stop.disabled = False, True

    def _show(self, run: Run, answers: list[Outcome | DTEError]) -> None:
        idle = [set(answer.idle) for answer in answers if isinstance(answer, Outcome)]
        said = run_html(run, set.intersection(*idle) if idle else ())
        if idle:
            figure = run_figure(run.question, answers)
            said = image_tag(figure, described(run.question, answers)) + said
        self.view.value = said

    def _show_history(self) -> None:
        self.table.value = history_html(self.runs)
        data = base64.b64encode(history.dumped(self.runs).encode()).decode()
        self.link.value = (
            f'<a download="explorer.json" href="data:application/json;base64,{data}">'
            "Save the history as a file</a>"
        )
        self.again.options = [(f"run {i}", i - 1) for i in range(1, len(self.runs) + 1)]

    def _uploaded(self, change: dict) -> None:
        try:
            self.own = Subject.of_upload(self.upload.value)
        except DTEError as error:
            self.status.value = alert(error)
            return
        self.picture.value, self.status.value = None, "<p>Your picture is there: run it.</p>"

    def _loaded(self, change: dict) -> None:
        try:
            self.runs += history.load_history(self.load.value)
        except DTEError as error:
            self.status.value = alert(error)
            return
        self._show_history()
        self.status.value = "<p>The history is loaded.</p>"

    def _take_up_again(self, _: object) -> None:
        if self.again.value is not None:
            run = self.runs[self.again.value]
            self.take_up(run.question, *(side.setting for side in run.sides), run.where)

    def _make_question(self) -> None:
        import ipywidgets as widgets

        chosen = subjects() if self.explorer.pipe.backbone.draws_small_world else []
        options = [*((subject.label, subject) for subject in chosen), ("your own picture", None)]
        self.picture = widgets.Dropdown(options=options, description="picture", **SNUG)
        self.upload = widgets.FileUpload(accept="image/*", description="your own", **SNUG)
        self.prompts = widgets.Textarea(
            value=f"{ON_WHITE}\na picture of S* on the beach", description="prompts", rows=3,
            layout={"width": "430px"},
        )  # fmt: skip
        self.seeds = widgets.Text(value="0", description="seeds", layout={"width": "200px"})
        self.upload.observe(self._uploaded, "value")

    def _make_results(self) -> None:
        import ipywidgets as widgets

        self.run = self._button("Run A and B", self.start, button_style="primary")
        self.stop = self._button("Stop", self.halt, disabled=True)
        self.bar = widgets.FloatProgress(max=1.0, layout={"width": "260px"})
        self.status, self.told, self.view = (widgets.HTML() for _ in range(3))
        self.table, self.link = widgets.HTML(history_html([])), widgets.HTML()
        self.load = widgets.FileUpload(accept=".json", description="load a history", **SNUG)
        self.load.observe(self._loaded, "value")
        self.again = widgets.Dropdown(options=[], layout={"width": "110px"})
        self.take = self._button("Take this run up again", self._take_up_again)

    def _make_trips(self) -> None:
        import ipywidgets as widgets

        self.trips, pages = [], []
        known = expeditions() if self.explorer.pipe.backbone.draws_small_world else ()
        for expedition in known:
            rows = [widgets.HTML(f"<p>{expedition.question}</p>")]
            for stop in expedition.stops:
                button = self._button(stop.title, lambda _, stop=stop: self.go_to(stop))
                rows.append(widgets.HBox([button, widgets.HTML(stop.look)]))
                self.trips.append(button)
            pages.append(widgets.VBox(rows))
        titles = tuple(f"Expedition: {expedition.title}" for expedition in known)
        self.trip_box = widgets.Accordion(pages, titles=titles)

    def _lay_out(self) -> None:
        import ipywidgets as widgets

        self.box = widgets.VBox([
            self.trip_box,
            widgets.HBox([self.picture, self.upload, self.seeds]),
            self.prompts,
            self.knobs.box,
            self.told,
            widgets.HBox([self.run, self.stop, self.bar]),
            self.status,
            self.view,
            widgets.HTML("<b>History</b>"),
            self.table,
            widgets.HBox([self.link, self.load, self.again, self.take]),
        ])  # fmt: skip

    @staticmethod
    def _button(label: str, act: Callable[[object], object], **options: object) -> object:
        import ipywidgets as widgets

        button = widgets.Button(description=label, **SNUG, **options)
        button.on_click(act)
        return button
