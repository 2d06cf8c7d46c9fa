"""The first cell of the notebooks on a runtime such as Colab: it installs what is missing."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tools import install, notebooks

RUNTIME = {"torch": "2.9.0+cu126", "numpy": "2.0.2", "typer": "0.15.0", "tqdm": "4.67.1"}
NEEDS = ["torch>=2.6", "numpy>=1.26", "typer>=0.12", "nbformat>=5.10", "jupyterlab>=4.2"]


def test_only_what_is_missing_is_installed():
    wanted, kept = install.plan(NEEDS, RUNTIME)
    assert wanted == ["nbformat>=5.10"]  # jupyterlab is no use to a running notebook
    assert kept == [f"{name}=={version}" for name, version in sorted(RUNTIME.items())]


def test_what_is_too_old_is_replaced_but_never_torch():
    wanted, kept = install.plan(NEEDS, RUNTIME | {"numpy": "1.20"})
    assert wanted == ["numpy>=1.26", "nbformat>=5.10"]
    assert "torch==2.9.0+cu126" in kept and not any(k.startswith("numpy") for k in kept)
    for runtime in (RUNTIME | {"torch": "2.1.0"}, {}):
        with pytest.raises(RuntimeError, match="dte_lab needs torch>=2.6"):
            install.plan(NEEDS, runtime)


def test_pip_gets_the_constraints_and_the_package_without_dependencies(monkeypatch):
    calls = []

    def run(command, check):
        texts = [open(command[i + 1]).read() for i, c in enumerate(command) if c == "-c"]
        calls.append((command[5:], texts))

    distributions = [
        SimpleNamespace(metadata={"Name": name}, version=version)
        for name, version in RUNTIME.items()
    ]
    monkeypatch.setattr(install.importlib.metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(install.subprocess, "run", run)
    install.main()
    (first, (constraints,)), (second, _) = calls
    assert "torch==2.9.0+cu126" in constraints.split("\n")
    asked = [text for text in first if text[0] not in "-/"]
    assert any(text.startswith("diffusers") for text in asked)
    assert not any(text.startswith(("torch", "numpy", "tqdm", "jupyterlab")) for text in asked)
    assert second == ["--no-deps", str(install.ROOT)]


@pytest.fixture
def cell(monkeypatch, tmp_path):
    """run(address, folder) -> the commands of the first cell, where dte_lab is not installed."""

    def run(address, folder):
        commands = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

        def fake(command, check):
            commands.append(command)
            if command[0] == "git":
                (folder / command[-1] / "notebooks").mkdir(parents=True)

        monkeypatch.setattr(subprocess, "run", fake)
        monkeypatch.setattr(notebooks, "repository", lambda: (address, "v1.2"))
        source = notebooks.jupytext.reads(
            '# %% [markdown]\n# # T\n\n# %% tags=["setup"]\n# here\n', fmt="py:percent"
        )
        source.metadata["dte_lab"] = {"minutes": 1}
        notebook = notebooks.solved_edition(source, "t", {})
        assert notebook.metadata["dte_lab"]["repository"] == address
        exec(notebook.cells[2].source, {})
        return commands

    return run


def test_alone_the_cell_fetches_the_repository(cell, tmp_path):
    address = "https://example.org/someone/thing"
    clone, run = cell(address, tmp_path)
    root = tmp_path / "thing"
    assert clone[-4:] == ["--branch", "v1.2", address, str(root)]
    assert run == [sys.executable, str(root / "tools/install.py")]


def test_in_a_checkout_the_cell_uses_it(cell):
    (run,) = cell("https://example.org/someone/thing", install.ROOT / "notebooks")
    assert run == [sys.executable, str(install.ROOT / "tools/install.py")]


def test_without_a_repository_the_cell_says_so(cell, tmp_path):
    with pytest.raises(RuntimeError, match="open this notebook inside its repository"):
        cell("", tmp_path)


def test_the_installer_needs_nothing_that_a_bare_runtime_lacks():
    tree = ast.parse((install.ROOT / "tools" / "install.py").read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or n.names[0].name for n in nodes}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names | {"packaging"}
