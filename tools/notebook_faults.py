"""What may not be in a notebook, for `python -m tools.notebooks --check`.

`faults` is about stored cells and outputs, `prose_faults` about what the text says of results. A
comparison of what is measured is computed in a cell, or it is one of the claims of
`dte_lab/evaluation/conclusions.py`, which are asked of the stored results. Sentences that compare
by definition or by arithmetic stand in `notebooks/src/reasoned.txt`.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nbformat import NotebookNode

MAX_LINES = 20  # of a cell of code; more is no lesson, and belongs into the package
MAX_PRINTED = 12  # lines of text under a cell; more is a table's work
WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"^.*\d+%\|.*\|.*\[.*\].*$")  # of tqdm, as text
MORE_KEYS = {"identity_scaled", "nearest_cosine", "offset_learning_rate", "token_learning_rate"}
# What compares, what is measured, and what leaves open how it comes out.
COMPARES = re.compile(
    r"\b(than|ahead of|behind (?:the|that|them)|hardly|barely|twice as|half (?:as|of)|times as|"
    r"a (?:third|quarter|half) \w+er|as (?:much|many|well|good|near) as|level with|better|worse|"
    r"(?:the|by far the) (?:most|least|fewest|best|worst)|(?:gains?|loses?|rises?|falls?|grows?)|"
    r"beats?|wins?|outperforms?|exceeds?|(?:changes?|adds?|costs?) nothing|"
    r"(?:high|larg|small|great|fast|slow)e(?:r|st)|lower|lowest)\b",
    re.I,
)
MEASURED = re.compile(
    r"\b(tuning.encoder|textual inversion|lora|e4t|steps?|predictions?|tuned|tuning|term|"
    r"regularisers?|matrices|ranks?|alone|paths?|dual|blends?|granularity|concepts?|settings?|"
    r"encoders?|loss|identity|scenes?|fidelity|seconds?|costs?|pictures)\b",
    re.I,
)
OPEN = re.compile(
    r"\b(if|would|could|can|cannot|may|might|should|must|expect|when|where|whether|how|until)\b|\?$",
    re.I,
)


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
    if {"image/png", "image/jpeg", "image/svg+xml"} & set(data):
        found.append("displays a picture past `show`, so that readers drop its alt text,")
    for tag in re.findall(r"<img\b[^>]*>", data.get("text/html", "")):
        alt = re.search(r'\balt="([^"]+)"', tag)
        if not alt:
            found.append("has a picture without alt text")
        said += f" {alt[1]}" if alt else ""
    if keys := measure_keys() & set(re.findall(r"\w+", said)):
        found.append(f"says {', '.join(sorted(keys))} where a reader wants a name")
    return found


def sentences(markdown: str) -> list[str]:
    """Sentences, and parts of them up to a colon or semicolon, of a cell's own text.

    Without formulas, code, tables and what is folded.
    """
    text = re.sub(
        r"<details>.*?</details>|```.*?```|\$\$.*?\$\$|^\|.*?$", " ", markdown, flags=re.S | re.M
    )
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d\. |#)", text)
    parts = (re.split(r"(?<=[.:?!;])[*)]*\s+", " ".join(p.split())) for p in paragraphs)
    return [re.sub(r"^(?:[-*#(]+|\d\.)\s*|\*+$", "", s) for some in parts for s in some if s]


@cache
def measure_keys() -> set[str]:
    """Keys of measures and settings, for which a reader's page has human names."""
    from dte_lab.evaluation.records import COLUMNS  # slow to import: it needs torch

    return MORE_KEYS | {name for name in COLUMNS if "_" in name} - {"nearest_words"}


def prose_faults(
    source: NotebookNode, name: str, results: Path, reasoned: Sequence[str] = ()
) -> list[str]:
    """What the text of a source says of results that nothing shows, as ends of sentences.

    reasoned: sentences that compare by definition or by arithmetic, and need no results.
    """
    from dte_lab.evaluation.conclusions import CLAIMS  # slow to import: it needs torch

    told = [
        sentence
        for cell in source.cells
        if cell.cell_type == "markdown" and "#### Exercise" not in cell.source
        for sentence in sentences(cell.source)
    ]
    claims = {claim.text: claim for claim in CLAIMS if claim.notebook == name}
    found = [
        f"no longer says {text!r}: take it out of CLAIMS." for text in claims if text not in told
    ]
    for text in dict.fromkeys(told):
        if text in claims:
            if not claims[text].holds(results):
                found.append(f"says {text!r}, and the stored results do not.")
        elif is_measured(text) and text not in reasoned:
            found.append(
                f"compares in prose: {text!r}. Compute it in a cell, or make it one of CLAIMS; if "
                "it needs no results, add it to reasoned.txt."
            )
    return found


def is_measured(sentence: str) -> bool:
    """Whether a sentence says how a comparison of something measured came out."""
    return bool(
        COMPARES.search(sentence) and MEASURED.search(sentence) and not OPEN.search(sentence)
    )
