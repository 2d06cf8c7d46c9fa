"""The numbers and commands of docs/ against the code."""

import ast
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dte_lab.cli.app import app
from dte_lab.memory_needs import WORKLOADS, Setting, needed
from dte_lab.recommended import SMALL_WORLD, STABLE_DIFFUSION

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs a checkout")


def test_parameter_table_is_what_the_command_prints():
    table = re.findall(r"^\| (\d+|whole matrices) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$",
                       (DOCS / "sd15.md").read_text(), re.M)  # fmt: skip
    output = CliRunner().invoke(app, ["parameters"], catch_exceptions=False).output
    printed = [line.split() for line in output.splitlines() if re.match(r"(\d+|full) ", line)]
    assert len(printed) == 6
    assert [list(row[1:]) for row in table] == [row[1:] for row in printed]


def test_memory_table_is_what_the_package_ships():
    rows = re.findall(
        r"^\| (\d+) \| (none|`.*`) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (DOCS / "sd15.md").read_text(), re.M,
    )  # fmt: skip
    assert len(rows) == 6
    for batch, options, *printed in rows:
        both = options != "none"
        setting = Setting(batch=int(batch), gradient_checkpointing=both, offload=both)
        assert printed == [f"{needed(setting, part) / 1e9:.2f}" for part in WORKLOADS]


def test_settings_table_is_that_of_the_models():
    text = (DOCS / "sd15.md").read_text()
    for name, large in {
        "guidance_scale": "guidance | {small} | {large} |",
        "batch_size": "noise levels per step | {small} | {large} |",
        "num_steps": "tuning steps | {small} | {large} with an encoder",
        "offset_learning_rate": "learning rate of the offsets | {small} | {large} |",
    }.items():
        small, sd15 = (getattr(model, name) for model in (SMALL_WORLD, STABLE_DIFFUSION))
        assert large.format(small=small, large=sd15) in text


def test_commands_have_the_options_that_the_page_uses():
    commands = typer.main.get_command(app).commands
    text = (DOCS / "sd15.md").read_text().replace("\\\n", " ")
    used = re.findall(r"^(?:dte (\w+)|accelerate launch .*-m dte_lab (pretrain)) (.*)$", text, re.M)
    assert len(used) >= 6
    for ours, launched, arguments in used:
        options = {o for p in commands[ours or launched].params for o in p.opts}
        wanted = set(re.findall(r"(?<=\s)--[a-z-]+", " " + arguments))
        assert wanted <= options, (ours or launched, wanted - options)


ARCHITECTURE = DOCS / "architecture.md"
NAMED = r"`(dte_lab/[\w/]+\.py)`|\[((?:`\w+`(?:, )?)+)\]"  # a file, or names in it


def test_every_file_and_function_of_the_architecture_exists():
    """`dte_lab/FILE.py` [`name`, ...], and [`name`] alone of the file before it."""
    named, code = set(), ""
    for file, names in re.findall(NAMED, " ".join(ARCHITECTURE.read_text().split())):
        if file:
            code, current = (ROOT / file).read_text(), file
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *(def|class) {name}\b", code, re.M), f"{name} in {current}"
            named.add((current, name))
    assert len(named) > 50


def imports(path):
    """(folder, module) of what a file imports from dte_lab; the folder of the root is "method"."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top != "dte_lab" or not rest:
                continue
            folder = rest[0] if (ROOT / "dte_lab" / rest[0]).is_dir() else "method"
            yield folder, rest[0]


def test_imports_go_the_way_that_the_architecture_says():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", ARCHITECTURE.read_text(), re.M)
    rule = {folder: set(re.findall(r"`(\w+)`", allowed)) for folder, allowed in rows}
    folders = {path.parent.name for path in (ROOT / "dte_lab").glob("*/__init__.py")}
    assert set(rule) == folders | {"method"}
    for path in (ROOT / "dte_lab").rglob("*.py"):
        own = path.parent.name if path.parent.name in folders else "method"
        for folder, module in imports(path):
            if path.name in ("__main__.py", "__init__.py") or folder == own:
                continue
            allowed = folder in rule[own] or (folder == "method" and module in rule[own])
            constant = module in ("placeholder_token", "__version__")
            assert allowed or constant, f"{path.relative_to(ROOT)} imports {folder}, {module}"


def test_no_files_import_each_other_in_a_circle():
    files = {}
    for path in (ROOT / "dte_lab").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    wanted = {}
    for name, path in files.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        pairs = [(n.module, f"{n.module}.{alias.name}") for n in nodes for alias in n.names]
        found = {inner if inner in files else module for module, inner in pairs}
        wanted[name] = found & set(files) - {name, "dte_lab"}
    while leaves := [name for name, needs in wanted.items() if not needs]:
        for leaf in leaves:
            del wanted[leaf]
        wanted = {name: needs - set(leaves) for name, needs in wanted.items()}
    assert not wanted, f"in a circle, or above one: {sorted(wanted)}"


def test_every_argument_and_result_is_annotated():
    """But for the checks of exercises, which take whatever a reader may have written."""
    for path in (ROOT / "dte_lab").rglob("*.py"):
        if path.parent.name == "checks":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None]
                where = f"{path.relative_to(ROOT)}, {node.name}"
                assert not set(bare) - {"self", "cls"} and node.returns, f"{where}: {bare}"


def test_docstrings_name_the_error_that_is_raised():
    """Ours is DTEError; a ValueError comes from Python, where lengths differ in a strict zip."""
    found = set()
    for path in (ROOT / "dte_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if "ValueError" in (ast.get_docstring(node) or ""):
                    found.add(node.name)
    assert found == {"picture_grid"}


TWO_MEANINGS = {  # why a name may stand at the top of several files
    "__all__": "what a folder shows",
    "main": "each experiment and each part of the small world has one",
    # A command is named after what it does, and so is the function that does it.
    "evaluate": "dte evaluate, dte world evaluate",
    "export": "dte export, and the function",
    "generate": "dte generate, and the base model's, which the README's figures name",
    "pretrain": "dte pretrain, and the function",
    "train": "dte world train, and the loop",
    # The check of an exercise is named after what the reader writes, as the package has it.
    "contrastive_loss": "dte_lab.checks, and the function",
    "steps_needed": "dte_lab.checks, and the function",
    "training_pair": "dte_lab.checks, and the function",
}


def defined_names(path):
    """Names of the functions, classes and values that a file defines at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name))


def test_a_name_at_the_top_of_a_file_means_one_thing():
    files = {}
    for path in (ROOT / "dte_lab").rglob("*.py"):
        for name in set(defined_names(path)):
            files.setdefault(name, []).append(str(path.relative_to(ROOT)))
    several = {name: sorted(found) for name, found in files.items() if len(found) > 1}
    assert len(files) > 500 and several.keys() == set(TWO_MEANINGS), several
