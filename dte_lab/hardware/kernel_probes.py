"""What `dte doctor --notebooks` asks of the notebooks' kernel, in the kernel.

The text of this file is sent there, and one of its functions is called at a time. So it needs
nothing but the standard library to be read, and each function imports what it asks for.
"""

import importlib
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MODULES = (  # what the notebooks import, and the package with all that it needs for them
    "torch", "numpy", "PIL", "matplotlib", "tqdm", "safetensors", "transformers", "diffusers",
    "IPython", "ipywidgets", "peft", "psutil", "scipy", "sklearn", "skimage", "umap", "dte_lab",
    "dte_lab.panels",
)  # fmt: skip
MEMORY = 2.0  # GB: a little more than the notebook that takes most
INSTALL_ALL = 'pip install -c constraints.txt -e ".[notebooks]"'
asked: list[str] = []  # machines that anything wanted to reach


def refuse_network(event: str, arguments: tuple) -> None:
    """An audit hook: as on a machine without a network, and what was wanted is kept in `asked`."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "::1") and not host.startswith("127."):
        asked.append(host)
        raise OSError(f"{host} was asked for, and nothing here is to need the network")


def requirements(package: str, extra: str = "") -> Iterator:
    """The packages that one requires, also for an extra, each with what versions it takes."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(package) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def misfits(package: str, extra: str = "") -> list[str]:
    """What is missing of a package's requirements, and what has another version than it takes."""
    found = []
    for wanted in requirements(package, extra):
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} is {version}, not {wanted.specifier}")
    return found


def packages() -> tuple[str, bool]:
    """Whether all packages are there, in versions that belong together."""
    if wrong := misfits("dte_lab", "notebooks"):
        return f"{', '.join(wrong)}: {INSTALL_ALL}", False
    names = ("torch", "jupyterlab", "ipywidgets")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), True


def imports() -> tuple[str, bool]:
    """Whether all that the notebooks import can be imported."""
    wrong = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            wrong.append(f"{name} ({type(error).__name__}: {error})")
    if wrong:
        return f"cannot import {', '.join(wrong)}: {INSTALL_ALL}", False
    return f"all {len(MODULES)} that the notebooks import", True


def widgets() -> tuple[str, bool]:
    """Whether the half of the widgets that runs here and JupyterLab's half belong together."""
    from jupyter_core.paths import jupyter_path

    if wrong := [text for text in misfits("ipywidgets") if "widgets" in text]:
        return f"no slider will be shown, {', '.join(wrong)}: pip install -U ipywidgets", False
    places = (Path(p, "@jupyter-widgets/jupyterlab-manager") for p in jupyter_path("labextensions"))
    there = [place for place in places if (place / "package.json").is_file()]
    if not there:
        advice = "pip install --force-reinstall jupyterlab_widgets"
        return f"JupyterLab's half is missing, no slider will be shown: {advice}", False
    files = importlib.metadata.files("jupyterlab_widgets") or ()
    own = [file.locate().resolve() for file in files if file.name == "package.json"]
    if own and (there[0] / "package.json").resolve() not in own:
        return f"JupyterLab takes its half from another environment: remove {there[0]}", False
    versions = (importlib.metadata.version(n) for n in ("ipywidgets", "jupyterlab_widgets"))
    return "ipywidgets {} and JupyterLab's half {} belong together".format(*versions), True


def free_memory() -> tuple[str, bool]:
    """Whether there is as much as the largest notebook takes."""
    import psutil

    free = psutil.virtual_memory().available / 1e9
    text = f"{free:.1f} GB free"
    if free < MEMORY:
        return f"{text}, and a notebook may take {MEMORY} GB: close other programs", False
    return text, True


def working_folder() -> tuple[str, bool]:
    """Whether a notebook can be saved where the kernel works."""
    try:
        with tempfile.TemporaryFile(dir="."):
            pass
    except OSError as error:
        advice = "copy the notebooks to a folder of your own"
        return f"{Path.cwd()} cannot be written ({error.strerror}): {advice}", False
    return f"{Path.cwd()} can be written", True


def picture() -> tuple[str, bool]:
    """Whether the small model learns and draws, and how fast."""
    from dte_lab import DTEPipeline
    from dte_lab.world import render_image

    began = time.perf_counter()
    pipe = DTEPipeline.from_pretrained("small")
    loaded = time.perf_counter()
    thing = render_image("cupcake", "fluent", "white")
    concept = pipe.personalize(thing, num_steps=0, progress=False)
    prompt = "a picture of S* on the beach"
    ((drawn,),) = pipe.generate(concept, prompt, progress=False)
    seconds = time.perf_counter() - loaded
    if len(drawn.getcolors(drawn.width * drawn.height)) < 100:
        return "the small model draws an empty picture: install anew, as the README says", False
    text = f"loaded in {loaded - began:.1f} s, a picture learned and drawn in {seconds:.1f} s"
    return f"{text} on {pipe.backbone.device}", True


def network() -> tuple[str, bool]:
    """Whether anything up to here wanted to reach another machine."""
    if asked:
        hosts = ", ".join(sorted(set(asked)))
        return f"{hosts} was asked for, so without a network the notebooks will fail", False
    return "nothing of this needed the network", True


def say(probe: str, *arguments: object) -> None:
    """Print what a probe finds as the last line: [text, whether it is good]."""
    try:
        found = globals()[probe](*arguments)
    except Exception as error:
        found = f"{type(error).__name__}: {error}", False
    print("\n" + json.dumps(found))
