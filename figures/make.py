"""Draw the pictures of the README and the model card anew. Same seed, same picture.

    python figures/make.py [quickstart] [world] [unseen]
    python figures/make.py --check

Each picture carries a digest of the function that drew it, of the files that it was drawn from and
of the settings of tuning; `--check` fails where one of these has changed since.
"""

import hashlib
import inspect
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from dte_lab import DTEPipeline
from dte_lab.backbone import WEIGHTS, load_backbone
from dte_lab.common.command import run_command
from dte_lab.common.images import read_image, to_pil
from dte_lab.common.plots import picture_grid, save_figure
from dte_lab.config import MethodConfig
from dte_lab.evaluation.base_model import evaluation_items, generate
from dte_lab.evaluation.edits import items
from dte_lab.recommended import SMALL_WORLD
from dte_lab.world.captions import caption
from dte_lab.world.data import pixel_grid, rendered
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import UNSEEN_STYLE

HERE = Path(__file__).parent
ROOT = HERE.parent
PARTS = ["unet", "vae", "text_encoder"]
UNSEEN_PROMPT = "a picture of S* on the beach"
SETTINGS = ("on the beach", "at night", "in the snow", "in the desert", "in the forest")


def quickstart():
    """The README's example picture, then the concept in new settings."""
    picture = read_image(ROOT / "examples" / "bus.png")
    pipe = DTEPipeline.from_pretrained("small")
    concept = pipe.personalize(picture)
    drawn = pipe.generate(concept, [f"a picture of S* {setting}" for setting in SETTINGS])
    titles = ["the input"] + [f"S* {setting}" for setting in SETTINGS]
    return picture_grid([[picture] + [row[0] for row in drawn]], titles)


def world(seed=4848):
    """48 captions, fixed before the base model was trained, as it draws them, beside the truth."""
    items = evaluation_items(48, seed, novel=False)
    captions = [caption(*item) for item in items]
    true = rendered(items)
    drawn = generate(load_backbone("small"), captions, seed)
    figure, axes = plt.subplots(8, 6, figsize=(12, 10.4), layout="constrained")
    for axis, text, pair in zip(axes.flat, captions, zip(true, drawn, strict=True), strict=True):
        axis.imshow(pixel_grid(torch.stack(pair), columns=2))
        axis.set_title(textwrap.fill(text.removeprefix("a "), 34), fontsize=7)
        axis.axis("off")
    return figure


def unseen(count=8):
    """Things in a drawing style that no training saw: what the predicted word draws alone, what
    the whole prediction does, what 12 steps do, and the truth; input in other scenes."""
    pipe, chosen, columns = DTEPipeline.from_pretrained("small"), items(count, UNSEEN_STYLE), []
    for item in chosen:
        [picture] = to_pil(item.picture())
        predicted = pipe.personalize(picture, num_steps=0, progress=False)
        stages = predicted.word_alone(), predicted, pipe.personalize(picture, progress=False)
        drawn = [pipe.generate(concept, UNSEEN_PROMPT, progress=False)[0][0] for concept in stages]
        true = render_image(item.name, UNSEEN_STYLE, "beach")
        columns.append([picture, *drawn, true])
    stages = ["input", "word alone", "prediction", "12 steps", "truth"]
    names = [textwrap.fill(item.name, 16) for item in chosen]
    return picture_grid([list(row) for row in zip(*columns, strict=True)], names, stages)


FIGURES = {  # name -> what draws it, and the files that it is drawn from
    "quickstart": (quickstart, [*PARTS, "encoder", "examples/bus.png"]),
    "world": (world, PARTS),
    "unseen": (unseen, [*PARTS, "encoder"]),
}


def digest(name: str) -> str:
    """Of a figure's function, of its files and of how things are tuned, in hexadecimal."""
    draw, sources = FIGURES[name]
    found = hashlib.sha256(inspect.getsource(draw).encode())
    if "encoder" in sources:
        found.update(repr((SMALL_WORLD, MethodConfig())).encode())
    for source in sources:
        path = ROOT / source
        if not path.is_file():  # a part of the small backbone
            (path,) = (WEIGHTS / "small" / source).glob("*.safetensors")
        found.update(path.read_bytes())
    return found.hexdigest()


def stale() -> list[str]:
    """Names of the figures that are missing, or were drawn by or from something else."""
    names = []
    for name in FIGURES:
        path = HERE / f"{name}.png"
        if not path.is_file() or Image.open(path).info.get("Source") != digest(name):
            names.append(name)
    return names


def main(arguments: list[str]) -> None:
    """Draw the named figures, or all; with --check alone, exit with the names of those to draw."""
    if arguments == ["--check"]:
        if names := stale():
            sys.exit(f"Draw these figures anew: python figures/make.py {' '.join(names)}")
        return
    for name in arguments or FIGURES:
        figure = FIGURES[name][0]()
        save_figure(figure, HERE / f"{name}.png", dpi=100, metadata={"Source": digest(name)})


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
