"""How a run of the explorer looks: A beside B beside the input, its measures and words, and the
history. Pure functions of results; all text that users or files bring is escaped."""

import html
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.plots import picture_grid
from dte_lab.panels.explorer_history import Run, Side
from dte_lab.panels.explorer_measures import NAMES, truth_of
from dte_lab.panels.explorer_runs import Outcome, Question
from dte_lab.panels.explorer_settings import (
    SWITCH_OF,
    change_in_words,
    differences,
    in_words,
)
from dte_lab.panels.shared import alert, table_html
from dte_lab.world.scenes import render_image

WORDS_SHOWN = 5
SECONDS = "Seconds are those of a setting's first run, on two cores beside the other setting's."
TABLE_STYLE = "border-collapse:collapse;line-height:1.35;font-size:13px"
CELL_STYLE = "padding:1px 10px 1px 0;text-align:left;vertical-align:top"


def run_figure(question: Question, outcomes: Sequence[Outcome | DTEError]) -> Figure:
    """A row for each prompt and seed: the input, A, B, and the truth where it is known.

    Of a setting that failed there is no column; one at least must have an outcome.
    """
    sides = [(name, o) for name, o in zip("AB", outcomes, strict=True) if isinstance(o, Outcome)]
    if not sides:
        raise ValueError("There is nothing to show.")
    subject = question.subject
    given, seeds = subject.picture.image, question.seeds
    side = sides[0][1].pictures[0][0].size
    rows, labels, truths = [], [], []
    for i, prompt in enumerate(question.prompts):
        for j, seed in enumerate(seeds):
            rows.append([given.resize(side), *(outcome.pictures[i][j] for _, outcome in sides)])
            labels.append(prompt + (f" (seed {seed})" if len(seeds) > 1 else ""))
            truths.append(truth_of(subject.name, subject.style, prompt))
    columns = ["the input", *(name for name, _ in sides)]
    if any(truths) and side == (64, 64):
        columns.append("the truth")
        for row, shows in zip(rows, truths, strict=True):
            blank = Image.new("RGB", side, "white")
            row.append(render_image(subject.name, *shows) if shows else blank)
    return picture_grid(rows, columns, labels)


def described(question: Question, outcomes: Sequence[Outcome | DTEError]) -> str:
    """The alt text of `run_figure`."""
    shown = [name for name, o in zip("AB", outcomes, strict=True) if isinstance(o, Outcome)]
    prompts = "; ".join(question.prompts)
    return f"{question.subject.label}, then drawn under {' and '.join(shown)}: {prompts}."


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    """An HTML table, denser than a page's."""
    return table_html(rows, columns, style=TABLE_STYLE, cell_style=CELL_STYLE)


def measure_rows(run: Run) -> list[list[str]]:
    """A row per measure that A or B has, then the nearest words: name, A, B."""
    rows = []
    for name, (label, digits) in NAMES.items():
        values = [side.measures.get(name) for side in run.sides]
        if any(value is not None for value in values):
            rows.append([label, *("" if v is None else f"{v:.{digits}f}" for v in values)])
    for name, label in (("words_before", "as predicted"), ("words_after", "after tuning")):
        said = [words_said(getattr(side, name)) for side in run.sides]
        if any(said):
            rows.append([f"words nearest, {label}", *said])
    return rows


def words_said(words: Sequence) -> str:
    return ", ".join(f"{word} {cosine:.2f}" for word, cosine in list(words)[:WORDS_SHOWN])


def run_html(run: Run, idle: Sequence[str] = ()) -> str:
    """What is said of a run: what changed, what came of it, the measures, and errors of a side."""
    errors = [alert(f"{name}: {side.error}") for name, side in run.named if side.error]
    parts = [
        f"<p>{html.escape(change_in_words(*(side.setting for side in run.sides), idle))}</p>",
        *errors,
    ]
    if rows := measure_rows(run):
        parts.append(table(rows, ["", "A", "B"]) + f"<p>{SECONDS}</p>")
    if not errors:
        parts.append(f"<p>{html.escape(run.told)}</p>")
    return "".join(parts)


def history_html(runs: Sequence[Run]) -> str:
    """A row per run, the newest last."""
    if not runs:
        return "<p>No run yet.</p>"
    heads = ["run", "picture", "prompts", "A", "B differs in", "A: input, prompt", "B", "seconds"]
    rows = [history_row(i, run) for i, run in enumerate(runs, 1)]
    return table(rows, heads)


def history_row(number: int, run: Run) -> list[str]:
    a, b = run.sides
    question = run.question
    both = ["clip_input", "clip_prompt"]
    values = [" ".join(f"{s.measures[m]:.2f}" for m in both if m in s.measures) for s in run.sides]
    seconds = sum(s.measures.get(m, 0) for s in run.sides for m in ("seconds", "drawing_seconds"))
    return [
        f"{number}" + f" {run.where}" * bool(run.where), question.subject.label,
        "; ".join(question.prompts), f"{a.setting.steps} steps", short(a, b),
        *(value or "failed" for value in values), f"{seconds:.1f}",
    ]  # fmt: skip


def short(a: Side, b: Side) -> str:
    """'steps 0; regulariser none', of what B has otherwise than A."""
    found = differences(a.setting, b.setting)
    said = (f"{SWITCH_OF[name].label} {in_words(name, value)}" for name, _, value in found)
    return "; ".join(said) or "nothing"
