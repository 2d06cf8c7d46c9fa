"""Notebooks are in step with their sources, and the tool that makes them does what it says.

pytest runs the solved editions themselves (nbmake). An exercise edition differs from them in the
exercise cells alone, and no other cell uses what those define, but for `checks.yours`, which has
something in place of an answer that is not right yet: all of this is checked here.
"""

import ast
import importlib
import json
import re
import shutil
import textwrap
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
from nbformat.v4 import new_output

from dte_lab import checks
from tools import notebook_editions, notebook_faults, notebook_runs, notebooks

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks" / "src").glob("*.py"))


SMALL = '''
# ---
# jupyter:
#   dte_lab:
#     promise: ""
#     minutes: 3
# ---

# %% [markdown]
# # A title

# %%
from tqdm.auto import tqdm

device = "cpu"
for _ in tqdm(range(3), desc="counting"):
    pass

# %%
import ipywidgets
from IPython.display import display

display(ipywidgets.IntSlider())

# %%
from PIL import Image

from dte_lab.panels import show

show(Image.new("RGB", (4, 4)), "black")
print("one")
print("two")

# %% [markdown]
# Write it.

# %% tags=["exercise"]
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    two = 2
    return two * x
    ### END SOLUTION


assert double(2) == 4
'''


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with one small notebook, executed, whose last cell need not load the package."""
    root = tmp_path_factory.mktemp("notebooks")
    (root / "notebooks" / "src").mkdir(parents=True)
    (root / "notebooks" / "src" / "small.py").write_text(SMALL.lstrip())
    load = "from dte_lab.pipeline import peak_memory_mb"
    assert load in notebook_runs.EPILOGUE
    with pytest.MonkeyPatch.context() as quick:
        epilogue = notebook_runs.EPILOGUE.replace(load, "peak_memory_mb = lambda device: 2048")
        quick.setattr(notebook_runs, "EPILOGUE", epilogue)
        notebooks.build(root, run=True)
    return root


def test_the_last_cell_tells_device_and_memory(capsys):
    exec(notebook_runs.EPILOGUE, {"device": "cpu"})
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "cpu" and 0.1 < told["peak_memory_gb"] < 100


@pytest.fixture
def project(built, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(built, tmp_path / "project")


def solved(root):
    return nbformat.read(root / "notebooks" / "small.ipynb", as_version=4)


def exercises(root):
    return nbformat.read(root / "notebooks" / "exercises" / "small.ipynb", as_version=4)


def spoil(root, change):
    """Apply `change` to the stored solved notebook and return what `check` then finds."""
    notebook = solved(root)
    change(notebook)
    nbformat.write(notebook, root / "notebooks" / "small.ipynb")
    return notebooks.check(root)


def test_repository_notebooks_are_in_step():
    assert SOURCES
    assert notebooks.check(ROOT) == []


def test_readme_lists_each_notebook_with_what_its_run_took(project):
    readme = project / "README.md"
    readme.write_text(f"before\n{notebooks.MARK}\n{notebooks.MARK}\nafter\n")
    assert any("table of notebooks" in problem for problem in notebooks.check(project))
    notebooks.build(project)
    text, measured = readme.read_text(), solved(project).metadata["dte_lab"]["measured"]
    assert f"(notebooks/small.ipynb) |  | {measured['seconds']} s |" in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert notebooks.check(project) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_exercises_are_complete_and_independent(path):
    cells = notebooks.read_source(path).cells
    is_exercise = ["exercise" in cell.metadata.get("tags", []) for cell in cells]
    assert sum(is_exercise) >= 2
    defined = set()
    for i, cell in enumerate(cells):
        if not is_exercise[i]:
            continue
        statement = cells[i - 1].source
        assert re.search(r"Difficulty [1-5] of 5 · \d+ minutes", statement)
        assert "<summary>Hint</summary>" in statement
        (function,) = [n for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef)]
        assert f"checks.{function.name}({function.name})" in cell.source
        assert hasattr(checks, function.name)
        defined.add(function.name)
    for cell, exercise in zip(cells, is_exercise, strict=True):
        if cell.cell_type == "code" and not exercise:
            names = {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)}
            assert not names & defined, "an exercise edition would stop here"


def test_answers_are_used_again_and_there_are_four_kinds_of_tasks():
    using, statements = set(), ""
    for path in SOURCES:
        cells, written = notebooks.read_source(path).cells, set()
        for cell in cells:
            if "exercise" in cell.metadata.get("tags", []):
                (name,) = re.findall(r"^checks\.(\w+)\(", cell.source, re.M)
                written.add(name)
                continue
            for name in re.findall(r"checks\.yours\(\s*\"(\w+)\"", cell.source):
                assert name in written, f"{path.stem} uses {name} before it is asked for"
                using.add(path.stem)
        statements += "".join(f"{c.source}\n" for c in cells if c.cell_type == "markdown")
    assert len(using) == len(SOURCES)
    for kind in ("find the mistake", "predict, then run", "explain"):
        assert re.search(rf"^#### Exercise \d: {kind}$", statements, re.M), kind


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_exercise_cells_pass_when_solved_and_raise_when_not(path):
    source = notebooks.read_source(path)
    for edition, raises in ((notebooks.solved_edition, False), (notebooks.exercise_edition, True)):
        cells = [
            cell
            for cell in edition(source, path.stem, {}).cells
            if "exercise" in cell.metadata.get("tags", [])
        ]
        assert cells
        for cell in cells:
            assert "SOLUTION" not in cell.source
            assert ("raises-exception" in cell.metadata.tags) == raises
            scope = {"checks": checks, "torch": torch, "F": torch.nn.functional}
            if raises:
                with pytest.raises(NotImplementedError):
                    exec(cell.source, scope)
            else:
                exec(cell.source, scope)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_a_notebook_names_is_where_it_says(path):
    """Imports from dte_lab, files, and "`name` in `file`" of the text; nothing that is private."""
    source = notebooks.read_source(path)
    code = "\n".join(cell.source for cell in source.cells if cell.cell_type == "code")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            parts = node.module.split(".")
            assert not any(part.startswith("_") for part in parts), node.module
            assert parts[:2] not in (["dte_lab", "cli"], ["dte_lab", "common"]), node.module
            if parts[0] == "dte_lab":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
    text = " ".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    text = " ".join(text.split())
    files = re.findall(r"`((?:dte_lab|benchmarks|docs|tools|results)/[\w/]+\.\w+)`", text)
    assert files and all((ROOT / file).is_file() for file in files)
    for name, file in re.findall(r"`(\w+)`,? (?:is )?in `(dte_lab/[\w/]+\.py)`", text):
        defined = rf"^ *(def {name}\(|class {name}\b|{name}\b.* = )"
        assert re.search(defined, (ROOT / file).read_text(), re.M), f"{name} in {file}"


def test_built_notebooks_pass_their_own_check(built):
    assert notebooks.check(built) == []


def test_solved_edition_has_outputs_a_page_can_show(built):
    notebook = solved(built)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar, widget, picture, exercise = codes
    assert [cell.execution_count for cell in codes] == [1, 2, 3, 4]
    (stream,) = bar.outputs
    assert stream.name == "stdout", "a page shows what went to stderr in red"
    assert "3/3" in stream.text and "0/3" not in stream.text and "\r" not in stream.text
    assert widget.outputs == []
    png, printed = picture.outputs
    assert '<img alt="black"' in png.data["text/html"] and printed.text == "one\ntwo\n"
    assert "two = 2" in exercise.source and exercise.metadata == {"tags": ["exercise"]}
    assert "widgets" not in notebook.metadata
    measured = notebook.metadata["dte_lab"]["measured"]
    assert measured["seconds"] > 0 and measured["peak_memory_gb"] == 2
    assert f"{measured['seconds']} s on" in notebook.cells[1].source
    assert not any("execution" in cell.metadata for cell in notebook.cells)


def test_exercise_edition_has_a_skeleton_and_the_folded_solution(built):
    notebook = exercises(built)
    *_, skeleton, solution = notebook.cells
    assert "two = 2" not in skeleton.source
    assert '"""Twice x."""\n    raise NotImplementedError(' in skeleton.source
    assert skeleton.metadata.tags == ["exercise", "raises-exception"]
    assert solution.cell_type == "markdown" and "<details>" in solution.source
    code = re.search(r"```python\n(.*?)```", solution.source, re.S)[1]
    scope = {}
    exec("def double(x):\n" + textwrap.indent(code, "    "), scope)
    assert scope["double"](3) == 6
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_building_again_changes_nothing(project):
    files = [project / "notebooks" / n for n in ("small.ipynb", "exercises/small.ipynb")]
    before = [file.read_bytes() for file in files]
    assert notebooks.build(project) == []
    assert [file.read_bytes() for file in files] == before


def test_new_text_keeps_outputs_and_new_code_drops_them(project):
    source = project / "notebooks" / "src" / "small.py"
    source.write_text(source.read_text().replace("# Write it.", "# Write it yourself."))
    assert any("differs" in problem for problem in notebooks.check(project))
    assert notebooks.build(project) == []
    assert notebooks.check(project) == []
    assert any(cell.get("outputs") for cell in solved(project).cells)

    source.write_text(source.read_text().replace("range(3)", "range(4)"))
    assert "--execute" in notebooks.build(project)[0]
    assert not any(cell.get("outputs") for cell in solved(project).cells)
    assert any("not executed" in problem for problem in notebooks.check(project))


def edit_code(notebook):
    notebook.cells[2].source += "\n# by hand"


def edit_text(notebook):
    notebook.cells[0].source += " by hand"


def store_error(notebook):
    notebook.cells[2].outputs.append(new_output("error", ename="KeyError", evalue="", traceback=[]))


def store_widget(notebook):
    data = {notebook_faults.WIDGET: {"model_id": "1"}}
    notebook.cells[2].outputs.append(new_output("display_data", data=data))


def store_widget_state(notebook):
    notebook.metadata["widgets"] = {}


def drop_alt_text(notebook):
    data = notebook.cells[4].outputs[0].data
    data["text/html"] = data["text/html"].replace(' alt="black"', "")


def display_past_show(notebook):
    notebook.cells[4].outputs[0].data["image/png"] = "iVBORw0KGgo="


def lengthen(notebook):
    notebook.cells[2].source += "\npass" * 20


def warn(notebook):
    notebook.cells[2].outputs.append(new_output("stream", name="stderr", text="Warning: old"))


def print_a_wall(notebook):
    text = "\n".join(f"line {n}" for n in range(13))
    notebook.cells[2].outputs.append(new_output("stream", text=text))


def say_a_key(notebook):
    notebook.cells[2].outputs.append(new_output("stream", text="identity_scaled 0.3"))


def say_a_key_in_alt_text(notebook):
    data = notebook.cells[4].outputs[0].data
    data["text/html"] = data["text/html"].replace('"black"', '"a chart of clip_t_small"')


def grow(notebook):
    notebook.cells[4].outputs[1].text += "x" * notebooks.MAX_BYTES


def test_bars_are_told_from_warnings(project):
    notebook = solved(project)
    cell = notebook.cells[2]
    bar = "counting:   0%|          | 0/3 [00:00<?, ?it/s]\rcounting: 100%|##| 3/3 [00:00<00:00]\n"
    for text in (bar, "careful\n"):
        cell.outputs = [new_output("stream", name="stderr", text=text)]
        notebooks.tidy(notebook)
        assert cell.outputs[0].name == ("stdout" if text == bar else "stderr")
    assert "0/3" not in bar.split("\r")[1] and not notebook_faults.is_bar(f"{bar}careful")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (edit_code, "differs from"),
        (edit_text, "differs from"),
        (store_error, "stores an error (KeyError) in cell 2"),
        (store_widget, "widget in cell 2"),
        (store_widget_state, "state of widgets"),
        (drop_alt_text, "without alt text in cell 4"),
        (display_past_show, "past `show`"),
        (lengthen, "in cell 2, more than 20"),
        (warn, "stores a warning in cell 2"),
        (print_a_wall, "prints 13 lines, more than 12: make a table, in cell 2"),
        (say_a_key, "says identity_scaled where"),
        (say_a_key_in_alt_text, "says clip_t_small where"),
        (grow, "more than 1 MB"),
    ],
)
def test_check_finds(project, change, complaint):
    problems = spoil(project, change)
    assert any(complaint in problem for problem in problems), problems


def test_check_finds_missing_and_orphaned_notebooks(project):
    (project / "notebooks" / "small.ipynb").rename(project / "notebooks" / "other.ipynb")
    problems = notebooks.check(project)
    assert any("small.ipynb is missing" in problem for problem in problems)
    assert any("other.ipynb has no source" in problem for problem in problems)


def test_a_failing_cell_stores_nothing(project):
    source = project / "notebooks" / "src" / "small.py"
    source.write_text(source.read_text().replace("range(3)", "range(1 / 0)"))
    before = (project / "notebooks" / "small.ipynb").read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.build(project, run=True)
    assert (project / "notebooks" / "small.ipynb").read_bytes() == before


SETUP = '# %% tags=["setup"]\n# here\n\n# %%\nfrom tqdm'


def test_a_new_first_cell_keeps_outputs(project, monkeypatch):
    source = project / "notebooks" / "src" / "small.py"
    source.write_text(source.read_text().replace("# %%\nfrom tqdm", SETUP, 1))
    monkeypatch.setattr(notebooks, "execute", lambda *_: {"seconds": 1, "peak_memory_gb": 2})
    notebooks.build(project, run=True)
    stored = solved(project)
    stored.cells[3].outputs = [new_output("stream", text="kept")]
    nbformat.write(stored, project / "notebooks" / "small.ipynb")
    monkeypatch.setattr(notebook_editions, "setup_cell", lambda *_: "print('another')")
    assert notebooks.build(project) == []
    assert solved(project).cells[2].source == "print('another')"
    for edition in (solved, exercises):
        metadata = edition(project).cells[2].metadata
        assert metadata["jupyter"] == {"source_hidden": True} and metadata["cellView"] == "form"
    assert solved(project).cells[3].outputs[0].text == "kept"


@pytest.fixture
def publishable(project, monkeypatch):
    """The project with a first cell, a version, and no address yet."""
    text = '[project]\nversion = "1.2"\n\n[tool.dte_lab]\nrepository = ""\n'
    (project / "pyproject.toml").write_text(text)
    monkeypatch.setattr(notebook_editions, "ROOT", project)
    notebooks.build(project)
    return project


def test_publish_is_one_command(publishable):
    before = [cell.get("outputs") for cell in solved(publishable).cells]
    said = notebooks.publish(publishable, "https://github.com/someone/thing.git/")
    assert (
        'repository = "https://github.com/someone/thing"\n'
        in (publishable / "pyproject.toml").read_text()
    )
    commands = [line.strip() for line in said.splitlines() if line.startswith("  git ")]
    assert commands[2:] == [
        "git tag v1.2", "git push https://github.com/someone/thing HEAD:main v1.2",
    ]  # fmt: skip
    assert (
        "github/someone/thing/blob/v1.2/notebooks/small.ipynb"
        in solved(publishable).cells[1].source
    )
    assert [cell.get("outputs") for cell in solved(publishable).cells] == before
    assert notebooks.check(publishable) == []


@pytest.mark.parametrize("address", ["", "github.com/a/b", "https://github.com/a", "git@x:a/b"])
def test_an_address_that_is_none_changes_nothing(publishable, address):
    before = (publishable / "pyproject.toml").read_bytes()
    with pytest.raises(SystemExit, match="the address is https://github.com/NAME/REPOSITORY"):
        notebooks.publish(publishable, address)
    assert (publishable / "pyproject.toml").read_bytes() == before


def test_what_is_stale_is_not_published(publishable):
    source = publishable / "notebooks" / "src" / "small.py"
    source.write_text(source.read_text().replace("range(3)", "range(4)"))
    with pytest.raises(SystemExit, match="not ready to be published"):
        notebooks.publish(publishable, "https://github.com/someone/thing")


def test_badge_appears_once_there_is_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(notebook_editions, "ROOT", tmp_path)
    project = '[project]\nversion = "1.2"\n'
    (tmp_path / "pyproject.toml").write_text(project)
    source = jupytext.reads(SMALL.lstrip(), fmt="py:percent")
    assert "colab" not in notebooks.solved_edition(source, "small", {}).cells[1].source
    tool = '[tool.dte_lab]\nrepository = "https://github.com/someone/thing"\n'
    (tmp_path / "pyproject.toml").write_text(project + tool)
    opening = notebooks.exercise_edition(source, "small", {}).cells[1].source
    assert "github/someone/thing/blob/v1.2/notebooks/exercises/small.ipynb" in opening
