"""The first cell of the notebooks on a runtime such as Colab: it installs what is missing."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest

from tools import first_cell, install

RUNTIME = {"torch": "2.11.0+cu128", "numpy": "2.0.2", "typer": "0.15.0", "tqdm": "4.67.1"}
NEEDS = ["torch>=2.6", "numpy>=1.26", "typer>=0.12", "nbformat>=5.10", "jupyterlab>=4.2"]


def test_only_what_is_missing_is_installed():
    wanted, kept = install.plan(NEEDS, RUNTIME)
    assert wanted == ["nbformat>=5.10"]  # jupyterlab is no use to a running notebook
    assert kept == [f"{name}=={version}" for name, version in sorted(RUNTIME.items())]


def test_what_is_too_old_is_replaced_but_never_torch():
    wanted, kept = install.plan(NEEDS, RUNTIME | {"numpy": "1.20"})
    assert wanted == ["numpy>=1.26", "nbformat>=5.10"]
    assert "torch==2.11.0+cu128" in kept and not any(k.startswith("numpy") for k in kept)
    for runtime in (RUNTIME | {"torch": "2.1.0"}, {}):
        with pytest.raises(RuntimeError, match="dte_lab needs torch>=2.6"):
            install.plan(NEEDS, runtime)


def test_pip_gets_the_constraints_and_the_package_without_dependencies(monkeypatch):
    calls = []

    def run(command, check):
        texts = [open(command[i + 1]).read() for i, c in enumerate(command) if c == "-c"]
        calls.append((command[5:], texts))

    distributions = [
        SimpleNamespace(metadata={"Name": name, "Version": version})
        for name, version in RUNTIME.items()
    ]
    monkeypatch.setattr(install.importlib.metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(install.subprocess, "run", run)
    install.main()
    (first, (constraints,)), (second, _) = calls
    assert "torch==2.11.0+cu128" in constraints.split("\n")
    asked = [text for text in first if text[0] not in "-/"]
    assert any(text.startswith("diffusers") for text in asked)
    assert not any(text.startswith(("torch", "numpy", "tqdm", "jupyterlab")) for text in asked)
    assert second == ["--no-deps", str(install.ROOT)]


def test_what_python_would_import_counts(monkeypatch):
    """Colab has Debian's copies behind its own, and leftovers of removed packages have no name."""
    distributions = [
        SimpleNamespace(metadata={"Name": "Six", "Version": "1.17.0"}),
        SimpleNamespace(metadata=None),
        SimpleNamespace(metadata={"Name": None, "Version": "1"}),
        SimpleNamespace(metadata={"Name": "six", "Version": "1.16.0"}),
    ]
    monkeypatch.setattr(install.importlib.metadata, "distributions", lambda: distributions)
    assert install.installed_versions() == {"six": "1.17.0"}


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A repository that is installed by saying so, with the tag v1.2 before its newest commit."""
    root = tmp_path / "published" / "thing"
    for folder in ("dte_lab", "tools", "notebooks"):
        (root / folder).mkdir(parents=True)
        (root / folder / "empty").write_text("")
    installer = root / "tools" / "install.py"
    installer.write_text("import os\nprint('at the tag,', os.getcwd(), __file__)\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "one")
    git(root, "tag", "v1.2")
    installer.write_text(installer.read_text().replace("at the tag", "newest"))
    git(root, "commit", "--quiet", "-am", "two")
    return root


@pytest.fixture
def content(tmp_path):
    """The folder in which Colab's kernel starts."""
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def run_cell(folder, address="", tag="v1.2"):
    """What the cell says in a Python without packages that starts in `folder`."""
    code = first_cell.setup_cell(str(address), tag)
    command = [sys.executable, "-S", "-c", code]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    return done.stdout.split(), done.stderr.strip().split("\n")[-1]


def test_alone_the_cell_fetches_the_repository_at_its_tag(repository, content):
    said, error = run_cell(content, repository)
    root = content / "thing"
    assert said == ["at", "the", "tag,", str(root / "notebooks"), str(root / "tools/install.py")]
    assert not error
    again, error = run_cell(content, "https://example.invalid/gone")  # the clone is left over
    assert again == said and not error


def test_without_the_tag_it_takes_the_newest(repository, content):
    said, error = run_cell(content, repository, "v3")
    assert said[0] == "newest," and not error


def test_a_copy_in_the_runtimes_folder_is_found(repository, content):
    """Its folder is called as the package, and is taken for a package without files by Python."""
    shutil.copytree(repository, content / "dte_lab")
    said, error = run_cell(content)
    assert said[1:] == [f"{content}/dte_lab/notebooks", f"{content}/dte_lab/tools/install.py"]
    assert not error


@pytest.mark.parametrize("top", ["thing-main/", ""])
def test_an_uploaded_zip_is_unpacked(repository, content, top):
    with zipfile.ZipFile(content / "an other.zip", "w") as packed:
        packed.writestr("data/readme.txt", "")
    with zipfile.ZipFile(content / "upload.zip", "w") as packed:
        for path in ("tools/install.py", "notebooks/empty"):
            packed.write(repository / path, top + path)
    said, error = run_cell(content)
    root = content / (top.rstrip("/") or "upload")
    assert said[1:] == [str(root / "notebooks"), str(root / "tools/install.py")] and not error


def test_in_a_checkout_the_cell_uses_it_and_stays(repository):
    for folder in (repository / "notebooks", repository):
        said, error = run_cell(folder, "https://example.invalid/gone")
        assert said[1:] == [str(folder), str(repository / "tools/install.py")] and not error


def test_otherwise_it_says_in_one_sentence_what_to_do(content, tmp_path):
    todo = f"upload the repository as a zip file, or its folder, to {content} and run this cell"
    _, error = run_cell(content)
    assert error.startswith("RuntimeError: dte_lab is not installed (no address is known")
    assert todo in error
    _, error = run_cell(content, tmp_path / "gone")
    assert "does not exist" in error and todo in error  # git's reason


def test_what_is_installed_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    exec(first_cell.setup_cell("https://example.invalid/gone", "v1"), {})


def test_the_installer_needs_nothing_that_a_bare_runtime_lacks():
    tree = ast.parse((install.ROOT / "tools" / "install.py").read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or n.names[0].name for n in nodes}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names | {"packaging"}
