"""The first cell of the notebooks: it makes the package importable, wherever the notebook runs."""

# REPOSITORY and TAG are filled in. Colab opens a notebook alone, in /content.
TEXT = """\
import importlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

found = importlib.util.find_spec("dte_lab")
if found is None or found.origin is None:  # a folder of this name is no package yet
    here, repository = Path.cwd(), "REPOSITORY"

    def checkout():
        places = (here, *here.parents, *sorted(here.glob("*/")))
        return next((p for p in places if (p / "tools/install.py").is_file()), None)

    if checkout() is None:
        for path in sorted(here.glob("*.zip")):  # uploaded
            with zipfile.ZipFile(path) as packed:
                if any(name.endswith("tools/install.py") for name in packed.namelist()):
                    inside = "tools/install.py" in packed.namelist()
                    packed.extractall(here / path.stem if inside else here)
                    break
    reason = "no address is known to fetch it from"
    if checkout() is None and repository:
        for branch in (["--branch", "TAG"], []):  # where there is no such tag, the newest
            clone = ["git", "clone", "--quiet", "--depth", "1", *branch, repository]
            done = subprocess.run(clone, cwd=here, capture_output=True, text=True)
            reason = " ".join(done.stderr.split())
            if done.returncode == 0:
                break
    if (root := checkout()) is None:
        raise RuntimeError(
            f"dte_lab is not installed ({reason}): upload the repository as a zip file, or its "
            f"folder, to {here} and run this cell again."
        )
    if root not in (here, *here.parents):
        os.chdir(root / "notebooks")
    subprocess.run([sys.executable, str(root / "tools/install.py")], check=True)
    importlib.invalidate_caches()
"""


def setup_cell(address: str, tag: str) -> str:
    """The cell's code for a repository's address, or "" where it has none, and a tag of it."""
    return TEXT.replace("REPOSITORY", address).replace("TAG", tag).rstrip()
