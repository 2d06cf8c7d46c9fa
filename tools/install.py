"""Install dte_lab into a runtime that has most of what it needs, such as Colab.

    python tools/install.py [EXTRA ...]

Only what is missing is installed, and what is too old; everything else stays at its version, torch
always. The standard library and `packaging` are enough to run this.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOT_NEEDED = {"jupyterlab"}  # a notebook that runs this has something to run in


def plan(requirements: list[str], installed: dict[str, str]) -> tuple[list[str], list[str]]:
    """What to install, and what to keep, from texts and {canonical name: version}.

    Returns (requirements to install, constraints "name==version" on all the rest).
    Raises RuntimeError when torch is missing or too old, which only its user can put right.
    """
    install, replaced = [], set()
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        version = installed.get(name)
        if name in NOT_NEEDED or (
            version and requirement.specifier.contains(version, prereleases=True)
        ):
            continue
        if name == "torch":
            raise RuntimeError(
                f"dte_lab needs {text}, and this runtime has {version or 'none'}: "
                "install it as https://pytorch.org says."
            )
        install.append(text)
        replaced.add(name)
    return install, [f"{n}=={v}" for n, v in sorted(installed.items()) if n not in replaced]


def installed_versions() -> dict[str, str]:
    """{canonical name: version} of what an import would find.

    Of two of a name the first counts, as for Python: Colab has Debian's copies behind its own. What
    is left of a package that was half removed has no name.
    """
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        if metadata is not None and metadata["Name"] and metadata["Version"]:
            found.setdefault(canonicalize_name(metadata["Name"]), metadata["Version"])
    return found


def main(extras: Sequence[str] = ("notebooks",)) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    installed = installed_versions()
    try:
        install, keep = plan(requirements, installed)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if install:
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(keep))
            subprocess.run([*pip, "-c", str(constraints), *install], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ("notebooks",))
