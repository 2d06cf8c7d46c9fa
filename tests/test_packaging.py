"""The files around the code agree with each other and with the code."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import dte_lab

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs a checkout, not an installed package"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return [Requirement(text) for text in texts]


def tracked_files(folder: str) -> list[str]:
    """Files of `folder` that git knows."""
    result = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def code_blocks(name: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def test_every_requirement_has_a_tested_version_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in requirements(*EXTRAS):
        name = canonicalize_name(requirement.name)
        if name == "dte-lab":  # extras that include other extras
            assert requirement.extras <= set(EXTRAS)
            continue
        assert name in pins, f"{requirement} is missing in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"
        assert not any(s.operator in ("==", "===") for s in requirement.specifier)
    assert not any("+" in version for version in pins.values()), "local builds fit one machine only"


EXTRAS_OF = {  # what imports from more than the dependencies
    "dte_lab/onnx_parts": ("page",),
    "dte_lab/hardware": ("notebooks",),
    "dte_lab/panels": ("notebooks",),
    "dte_lab/training": ("streams",),
    "dte_lab/world": ("world",),
    "dte_lab/evaluation": ("evaluate",),
    "tests": ("notebooks", "page", "site", "streams", "world", "test"),
    "tests/check_cases": ("test",),
    "tools": ("notebooks", "page", "site", "test"),
}
OPTIONAL = {  # for --optimizer-8bit and a notebook alone, which say what to install
    "dte_lab/common/images.py": {"pillow-heif"},
    "dte_lab/training/optimizer.py": {"bitsandbytes"},
    "dte_lab/evaluation/word_map.py": {"umap-learn"},
}


@cache
def distributions() -> dict[str, list[str]]:
    """{module: distributions that have it}."""
    return {"sklearn": ["scikit-learn"]} | packages_distributions()


@pytest.mark.parametrize(
    "folder",
    ["dte_lab", *(f"dte_lab/{f.parent.name}" for f in ROOT.glob("dte_lab/*/__init__.py")),
     "tests", "tests/check_cases", "tools"],
)  # fmt: skip
def test_every_import_is_a_declared_dependency(folder):
    extras = EXTRAS_OF.get(folder, ())
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    for path in (ROOT / folder).glob("*.py"):
        allowed = declared | OPTIONAL.get(path.relative_to(ROOT).as_posix(), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules} - {
                "benchmarks",
                "check_cases",
                "dte_lab",
                "conftest",
                "tools",
            }:
                if top in sys.stdlib_module_names or (path.parent / f"{top}.py").is_file():
                    continue
                names = {canonicalize_name(name) for name in distributions().get(top, [top])}
                assert names & allowed, f"{path.name} imports {top}, which pyproject.toml lacks"


def test_conda_environment_is_in_step():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    *packages, last = environment["dependencies"]
    python = next(package for package in packages if package.startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert "pip" in packages
    editable = re.fullmatch(r"-e \.\[([a-z,]+)\]", *last["pip"])
    assert editable and set(editable[1].split(",")) <= set(EXTRAS)


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == dte_lab.__version__ == citation["version"]
    assert citation["license"] == "MIT"  # of the code; the drawings have others
    assert PROJECT["license"] == "MIT AND Apache-2.0 AND CC-BY-4.0"
    paper = citation["preferred-citation"]
    assert paper["doi"] == "10.1145/3610548.3618173" and len(paper["authors"]) == 7


def test_wheel_has_the_weights_the_art_and_its_licences(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(n for n in names if n.endswith("METADATA")).removesuffix("METADATA")
        assert "dte = dte_lab.cli:main" in archive.read(f"{info}entry_points.txt").decode()
    missing = set(tracked_files("dte_lab")) - set(names)
    assert not missing, f"not in the wheel: {sorted(missing)}"
    for licence in ("LICENSE", "NOTICE", "LICENSES/Apache-2.0.txt", "LICENSES/CC-BY-4.0.txt"):
        assert f"{info}licenses/{licence}" in names
    assert not any(name.startswith(("tests/", "notebooks/")) for name in names)


def test_notice_names_every_source_of_art_and_data():
    notice = (ROOT / "NOTICE").read_text()
    for source, licence in [
        ("emoji-datasource-google 16.0.0", "Apache License 2.0"),
        ("emoji-datasource-twitter 16.0.0", "Attribution 4.0"),
        ("@lobehub/fluent-emoji-3d 1.1.0", "MIT"),
        ("emojibase-data 17.0.0", "MIT"),
    ]:
        assert source in notice and licence in notice


def test_readme_has_two_commands_and_ci_runs_the_second():
    main_job, tests = (block.strip() for block in code_blocks("README.md")[:2])
    assert main_job.startswith("pip install -c constraints.txt . && dte personalize ")
    assert tests == 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    picture = re.search(r"personalize (\S+)", main_job)[1]
    assert (ROOT / picture).is_file()


def test_readme_links_lead_somewhere():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    assert local
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing, f"README.md links to {missing}"


def test_importing_the_package_is_fast():
    """`dte --help` and Colab's first cell must not wait for torch."""
    code = "import sys, dte_lab, dte_lab.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ruff_finds_nothing():
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_example_picture_is_an_unseen_concept_and_regenerable():
    from dte_lab.common.images import read_image
    from dte_lab.world.scenes import render_image
    from dte_lab.world.sprites import split_names

    assert "bus" in split_names("val")
    rendered = render_image("bus", "fluent", "white", 0)
    assert read_image(ROOT / "examples" / "bus.png").tobytes() == rendered.tobytes()
