"""What may not be in a stored notebook: `faults`, for `python -m tools.notebooks --check`."""

import re

from nbformat import NotebookNode

from dte_lab.evaluation.records import COLUMNS

MAX_LINES = 20  # of a cell of code; more is no lesson, and belongs into the package
MAX_PRINTED = 12  # lines of text under a cell; more is a table's work
WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"^.*\d+%\|.*\|.*\[.*\].*$")  # of tqdm, as text
# Keys of measures and settings, for which a reader's page has human names.
KEYS = {name for name in COLUMNS if "_" in name} - {"nearest_words"}
KEYS |= {"identity_scaled", "nearest_cosine", "offset_learning_rate", "token_learning_rate"}


def is_bar(text: str) -> bool:
    """Whether a text is progress bars, in any state, or nothing."""
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    return all(BAR.match(line) for line in lines)


def faults(notebook: NotebookNode, solved: bool) -> list[str]:
    """What is wrong with stored cells and outputs, as ends of sentences."""
    found = []
    if "widgets" in notebook.metadata:
        found.append("stores the state of widgets, with which GitHub does not show it.")
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES and "setup" not in cell.metadata.get("tags", []):
            found.append(f"has {lines} lines in cell {number}, more than {MAX_LINES}.")
        if solved and cell.execution_count is None:
            found.append(f"was not executed in cell {number}.")
        if not solved and cell.outputs:
            found.append(f"is the exercise edition, but has outputs in cell {number}.")
        found += [f"{fault} in cell {number}." for o in cell.outputs for fault in output_faults(o)]
    return found


def output_faults(output: NotebookNode) -> list[str]:
    """What is wrong with one output, as the middle of sentences."""
    data, found = output.get("data", {}), []
    if output.output_type == "error":
        found.append(f"stores an error ({output.ename})")
    said = output.get("text", "") + data.get("text/plain", "")
    if output.output_type == "stream":
        if output.name == "stderr":
            found.append("stores a warning")
        printed = [line for line in said.splitlines() if not is_bar(line)]
        if len(printed) > MAX_PRINTED:
            found.append(f"prints {len(printed)} lines, more than {MAX_PRINTED}: make a table,")
    if WIDGET in data:
        found.append("stores a widget")
    for kind in sorted({"image/png", "image/jpeg", "image/svg+xml"} & set(data)):
        alt = output.metadata.get(kind, {}).get("alt")
        if not alt:
            found.append("has a picture without alt text")
        said += alt or ""
    if keys := KEYS & set(re.findall(r"\w+", said)):
        found.append(f"says {', '.join(sorted(keys))} where a reader wants a name")
    return found
