"""Execute a notebook, and leave of its outputs what a page can show."""

import json
import os
import re
import time
from pathlib import Path

from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tools.notebook_faults import WIDGET, is_bar

# Plain bars, since the state of widgets is not stored; readers still get the widget.
PRELUDE = "import tqdm, tqdm.auto; tqdm.auto.tqdm = tqdm.tqdm"
EPILOGUE = """
import json
from dte_lab.pipeline import peak_memory_mb
print(json.dumps({"device": device, "peak_memory_gb": round(peak_memory_mb(device) / 1024, 1)}))
"""


def execute(notebook: NotebookNode, folder: Path) -> dict:
    """Run the notebook in place, in `folder`, offline. Returns {seconds, cores, ...} of the run.

    Raises nbclient.exceptions.CellExecutionError when a cell fails.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    notebook.cells = [new_code_cell(PRELUDE), *notebook.cells, new_code_cell(EPILOGUE)]
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, record_timing=False, resources=resources).execute()
    seconds = time.perf_counter() - start
    del notebook.cells[0]
    tidy(notebook)
    said = {output.name: output.text for output in notebook.cells.pop().outputs}
    measured = json.loads(said["stdout"])
    return {"seconds": round(seconds), "cores": os.cpu_count(), **measured}


def tidy(notebook: NotebookNode) -> None:
    """Leave of the outputs what a page can show: no widgets, bars in their last state.

    Bars become ordinary text: a page shows what went to stderr in red.
    """
    notebook.metadata.pop("widgets", None)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(codes, start=1):
        cell.execution_count = count
        kept = []
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                continue
            if output.output_type == "execute_result":
                output.execution_count = count
            if output.output_type == "stream" and is_bar(output.text):
                output.name = "stdout"
            if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text)
        cell.outputs = kept
