"""`dte doctor --notebooks`: whether the notebooks will run in the kernel that they would get."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tqdm.auto import tqdm

from dte_lab.common.errors import reason_of
from dte_lab.hardware import kernel_probes
from dte_lab.hardware.doctor import Finding

if TYPE_CHECKING:
    from nbclient import NotebookClient

KERNEL = "python3"  # which the notebooks name
PROBES = {  # topic: function of kernel_probes.py
    "packages": "packages", "imports": "imports", "widgets": "widgets", "memory": "free_memory",
    "folder": "working_folder", "picture": "picture", "network": "network",
}  # fmt: skip
PYTHON = "import json, sys; print(json.dumps([sys.prefix, sys.executable]))"
NO_NETWORK = "import sys; sys.addaudithook(refuse_network)"
OWN_KERNEL = "python -m ipykernel install --sys-prefix"
ANEW = "close other programs and try again, or make a new environment, as the README says"


def examine_kernel(
    folder: Path | str = ".", start_seconds: float = 60, probe_seconds: float = 300
) -> Iterator[Finding]:
    """Start the notebooks' kernel in a folder, yield a Finding for each probe, and end the kernel.

    After a kernel that does not start, dies, hangs or is another environment's come no more.
    start_seconds and probe_seconds: after which it hangs.
    """
    try:
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient import NotebookClient
        from nbformat.v4 import new_notebook
    except ImportError as error:
        text = f"cannot be started ({reason_of(error)}): {kernel_probes.INSTALL_ALL}"
        yield Finding("kernel", text, False)
        return
    client = NotebookClient(
        new_notebook(), kernel_name=KERNEL, timeout=probe_seconds, startup_timeout=start_seconds,
        shutdown_kernel="immediate", resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.log.disabled = True  # it is said below, in a sentence
    bar = tqdm(PROBES, desc="starting the kernel", unit="probe", leave=False)
    with tempfile.TemporaryFile("w+") as said, bar:
        try:
            yield from _findings(client, bar, said)
        except NoSuchKernel:
            yield Finding("kernel", f"there is none of the name {KERNEL}: {OWN_KERNEL}", False)
        except TimeoutError:
            text = f"no answer for {probe_seconds:g} s, so something hangs: {ANEW}"
            yield Finding(_topic(client), text, False)
        except (OSError, RuntimeError) as error:
            ended = "died" in str(error)  # by itself; one that hangs is interrupted, and may say so
            reason = _last_words(said) if ended and not client.nb.cells else None
            text = f"does not run ({reason or reason_of(error)}): {ANEW}"
            yield Finding(_topic(client), text, False)


def _findings(client: "NotebookClient", bar: tqdm, said: IO[str]) -> Iterator[Finding]:
    """A Finding for the kernel and each probe; what the kernel's process says goes to `said`."""
    with client.setup_kernel(stdout=said, stderr=said):
        prefix, executable = _answer(client, PYTHON)
        if Path(prefix).resolve() != Path(sys.prefix).resolve():
            text = f"{KERNEL} is {executable}, of another environment than {sys.prefix}"
            yield Finding("kernel", f"{text}: {OWN_KERNEL}", False)
            return
        yield Finding("kernel", f"{KERNEL} is {executable}, of this environment")
        code = f"{Path(kernel_probes.__file__).read_text()}\n{NO_NETWORK}"
        for topic in bar:
            bar.set_description(topic)
            yield Finding(f"kernel: {topic}", *_answer(client, f"{code}\nsay('{PROBES[topic]}')"))
            code = ""  # it stays there


def _answer(client: "NotebookClient", code: str) -> list:
    """What a cell prints as its last line, which is JSON."""
    from nbformat.v4 import new_code_cell

    client.nb.cells.append(new_code_cell(code))
    cell = client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)
    printed = [output.text for output in cell.outputs if output.get("name") == "stdout"]
    return json.loads("".join(printed).splitlines()[-1])


def _topic(client: "NotebookClient") -> str:
    """The kernel, or the probe that it was asked last."""
    count = len(client.nb.cells)
    return f"kernel: {list(PROBES)[count - 2]}" if count > 1 else "kernel"


def _last_words(said: IO[str]) -> str:
    """Of a process that ended at once, why; "" where it said nothing."""
    said.seek(0)
    return said.read().strip().rpartition("\n")[2].strip(". ")
