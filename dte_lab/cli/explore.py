"""`dte explore`: the panel of notebook 06 as an app in the browser."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dte_lab.cli.common import AnyBackbone, Device, Encoder, whole
from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.common.settings import check_whole

APP_CELL = """\
from dte_lab import DTEPipeline
from dte_lab.common.quiet import quiet_libraries
from dte_lab.panels.explorer import explorer_panel

quiet_libraries()
explorer_panel(DTEPipeline.from_pretrained({backbone!r}, encoder={encoder!r}, device={device!r}))
"""


def explore(
    backbone: AnyBackbone = "small",
    encoder: Encoder = None,
    device: Device = None,
    port: Annotated[int, typer.Option(parser=whole, help="Of the page on this machine.")] = 8866,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no window.")] = False,
) -> None:
    """Every switch of the method in the browser: A beside B. Ctrl-C ends it."""
    check_whole("port", port, 1, 65535)
    if find_spec("voila") is None or find_spec("ipywidgets") is None:
        raise DTEError('The explorer needs voila: pip install "dte_lab[explore]".')
    from dte_lab.common.device import checked_device
    from dte_lab.hardware.doctor import of_model

    device = str(checked_device(device))
    for finding in of_model(backbone, encoder, device):  # before a page opens that cannot work
        if not finding.good:
            raise DTEError(finding.text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explorer.ipynb"
        encoder = None if encoder is None else str(encoder)
        write_atomically(path, app_notebook(backbone, encoder, device).encode())
        command = [sys.executable, "-m", "voila", str(path), f"--port={port}"]
        command += ["--no-browser"] * no_browser
        typer.echo(f"the explorer: http://localhost:{port} (Ctrl-C ends it)")
        if code := subprocess.run(command).returncode:
            raise DTEError(f"voila ended with status {code}: its last lines above say why.")


def app_notebook(backbone: str, encoder: str | None, device: str) -> str:
    """A notebook of one cell that shows the panel, as JSON."""
    # Paths are taken as they are typed, and voila runs the cell in a folder of its own.
    folders = [text and (str(Path(text).resolve()) if Path(text).is_dir() else text)
               for text in (backbone, encoder)]  # fmt: skip
    source = APP_CELL.format(backbone=folders[0], encoder=folders[1], device=device)
    cell = {"cell_type": "code", "id": "panel", "execution_count": None, "metadata": {},
            "outputs": [], "source": source}  # fmt: skip
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({
        "cells": [cell], "metadata": {"kernelspec": kernel, "title": "dte_lab explorer"},
        "nbformat": 4, "nbformat_minor": 5,
    })  # fmt: skip
