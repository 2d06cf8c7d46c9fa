"""`dte doctor --notebooks`, with kernels that are sound, broken, hanging and somebody else's."""

import ast
import json
import socket
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from dte_lab.cli import main
from dte_lab.hardware import kernel, kernel_probes

ROOT = Path(__file__).parents[1]
LAUNCH = "from ipykernel import kernelapp; kernelapp.launch_new_instance()"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A function that makes `code` the notebooks' kernel, which runs no slow probes."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    quick = {"memory": "free_memory", "folder": "working_folder", "network": "network"}
    monkeypatch.setattr(kernel, "PROBES", quick)

    def make(code=LAUNCH):
        folder = tmp_path / "kernels" / kernel.KERNEL
        folder.mkdir(parents=True)
        argv = [sys.executable, "-c", code, "-f", "{connection_file}"]
        spec = {"argv": argv, "display_name": "fake", "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))

    yield make
    started = psutil.Process().children(recursive=True)
    left = [process for process in started if str(tmp_path) in str(process.environ())]
    assert not left, "a kernel is left behind"


def examined(folder, **seconds):
    return list(kernel.examine_kernel(folder, **seconds))


def test_a_sound_kernel_answers_each_probe(kernels, tmp_path):
    kernels()
    found = examined(tmp_path)
    topics = ["kernel", "kernel: memory", "kernel: folder", "kernel: network"]
    assert [finding.topic for finding in found] == topics
    assert all(finding.good for finding in found), found
    assert str(tmp_path) in found[2].text


@pytest.mark.parametrize(("code", "topic", "said"), [
    ("import no_such_library", "kernel", "No module named 'no_such_library'"),
    ("import time; time.sleep(60)", "kernel", "respond in 2 seconds"),
    ("import sys, time; print('half way', file=sys.stderr, flush=True); time.sleep(60)",
     "kernel", "respond in 2 seconds"),
    (f"import sys; sys.prefix = '/elsewhere'; {LAUNCH}", "kernel", "another environment"),
    (f"import psutil, os; psutil.virtual_memory = lambda: os._exit(3); {LAUNCH}",
     "kernel: memory", "died"),
    (f"import psutil, time; psutil.virtual_memory = lambda: time.sleep(60); {LAUNCH}",
     "kernel: memory", "no answer for 3 s"),
])  # fmt: skip
def test_a_kernel_that_is_no_use_gives_one_sentence(kernels, tmp_path, code, topic, said):
    kernels(code)
    slow = "respond" not in said
    *before, last = examined(tmp_path, start_seconds=60 if slow else 2, probe_seconds=3)
    assert all(finding.good for finding in before)
    assert not last.good and last.topic == topic and said in last.text
    assert "\n" not in last.text and ": " in last.text, "what to do"


def test_no_kernel_of_the_name(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "KERNEL", "no-such-kernel")
    (found,) = examined(tmp_path)
    assert not found.good and "python -m ipykernel install" in found.text


def test_a_missing_nbclient_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    (found,) = examined(".")
    assert not found.good and found.text.endswith(kernel_probes.INSTALL_ALL)


def test_a_probe_that_fails_does_not_end_the_others(kernels, tmp_path):
    kernels(f"import psutil; del psutil.virtual_memory; {LAUNCH}")
    found = examined(tmp_path)
    assert [finding.good for finding in found] == [True, False, True, True]
    assert "virtual_memory" in found[1].text


def test_in_the_kernel_there_is_no_network(kernels, tmp_path):
    asks = "socket.create_connection(('192.0.2.1', 9), timeout=1)"
    kernels(f"import psutil, socket; psutil.virtual_memory = lambda: {asks}; {LAUNCH}")
    _, memory, folder, network = examined(tmp_path)
    assert folder.good and not memory.good and not network.good
    assert "192.0.2.1 was asked for" in memory.text and "192.0.2.1" in network.text


def test_the_command_prints_the_probes_and_its_status(kernels, tmp_path, tiny_path, capsys):
    kernels(f"import psutil; del psutil.virtual_memory; {LAUNCH}")
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--notebooks", "--backbone", str(tiny_path), "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1
    assert sum(line.startswith("FAIL") for line in lines) == 1
    assert any(line.startswith("FAIL kernel: memory") for line in lines)
    assert lines[-1].startswith("ok   kernel: network")


def test_the_kernel_is_the_one_that_the_notebooks_name():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert notebook.metadata.kernelspec.name == kernel.KERNEL
        assert notebook.metadata.dte_lab.measured.peak_memory_gb < kernel_probes.MEMORY


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_all_that_the_notebooks_import_is_tried():
    paths = [*ROOT.glob("notebooks/src/*.py"), *ROOT.glob("dte_lab/panels/*.py")]
    tops = {name.split(".")[0] for path in paths for name in imported(path)}
    assert tops - set(sys.stdlib_module_names) - {"jaxtyping"} <= set(kernel_probes.MODULES)


def test_what_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setattr(kernel_probes, "MODULES", ("json", "no_such_module"))
    text, good = kernel_probes.imports()
    assert not good and "no_such_module (ModuleNotFoundError" in text and "json" not in text


@pytest.mark.parametrize(("package", "version", "said"), [
    ("jupyterlab_widgets", "1.1", "jupyterlab_widgets is 1.1, not ~="),
    ("jupyterlab_widgets", None, "jupyterlab_widgets is missing"),
])  # fmt: skip
def test_widgets_of_two_generations(monkeypatch, package, version, said):
    true_version = kernel_probes.importlib.metadata.version

    def changed(name):
        if name.replace("-", "_") != package:
            return true_version(name)
        if version is None:
            raise kernel_probes.importlib.metadata.PackageNotFoundError(name)
        return version

    assert kernel_probes.widgets()[1]
    monkeypatch.setattr(kernel_probes.importlib.metadata, "version", changed)
    text, good = kernel_probes.widgets()
    assert not good and said in text


def test_widgets_of_another_environment(monkeypatch, tmp_path):
    manager = tmp_path / "@jupyter-widgets" / "jupyterlab-manager"
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_: [str(tmp_path)])
    assert "is missing" in kernel_probes.widgets()[0]
    manager.mkdir(parents=True)
    (manager / "package.json").write_text("{}")
    text, good = kernel_probes.widgets()
    assert not good and f"remove {manager}" in text


def test_versions_that_do_not_fit_are_named(monkeypatch):
    requires = ["numpy>=999", "torch>=2", "no-such-thing", "umap-learn>=1; extra == 'other'"]
    monkeypatch.setattr(kernel_probes.importlib.metadata, "requires", lambda name: requires)
    text, good = kernel_probes.packages()
    assert not good and ", not >=999, no-such-thing is missing: pip install" in text
    assert "torch" not in text and "umap" not in text


def test_little_memory_and_a_folder_of_others(monkeypatch, tmp_path):
    class Memory:
        available = 1.5e9

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert kernel_probes.free_memory() == (
        "1.5 GB free, and a notebook may take 2.0 GB: close other programs", False
    )  # fmt: skip

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kernel_probes.tempfile, "TemporaryFile", refused)
    text, good = kernel_probes.working_folder()
    assert not good and "Permission denied" in text


def test_the_small_model_draws():
    text, good = kernel_probes.picture()
    assert good and "learned and drawn in" in text


def test_who_is_asked_over_the_network_is_named(monkeypatch):
    monkeypatch.setattr(kernel_probes, "asked", [])
    for address in ("localhost", "127.0.0.1", None):
        kernel_probes.refuse_network("socket.getaddrinfo", (address, 80))
    kernel_probes.refuse_network("socket.connect", (socket.socket(), ("127.0.0.1", 80)))
    kernel_probes.refuse_network("socket.connect", (None, "/tmp/a.socket"))
    kernel_probes.refuse_network("open", ("example.org",))
    assert kernel_probes.network()[1]
    with pytest.raises(OSError, match="example.org"):
        kernel_probes.refuse_network("socket.getaddrinfo", ("example.org", 443))
    with pytest.raises(OSError, match="10.0.0.1"):
        kernel_probes.refuse_network("socket.connect", (None, ("10.0.0.1", 443)))
    text, good = kernel_probes.network()
    assert not good and text.startswith("10.0.0.1, example.org")
