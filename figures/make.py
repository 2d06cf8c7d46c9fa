"""Draw the pictures of the README and the model card anew. Same seed, same picture.

python figures/make.py [quickstart] [world]
"""

import io
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dte_lab import DTEPipeline
from dte_lab.backbone import load_backbone
from dte_lab.files import write_atomically
from dte_lab.images import read_image
from dte_lab.panels import picture_grid
from dte_lab.world.captions import caption
from dte_lab.world.data import picture_grid as pixel_grid
from dte_lab.world.data import rendered
from dte_lab.world.evaluate import evaluation_items, generate

HERE = Path(__file__).parent
SETTINGS = ("on the beach", "at night", "in the snow", "in the desert", "in the forest")


def quickstart():
    """The README's example picture, then the concept in new settings."""
    picture = read_image(HERE.parent / "examples" / "bus.png")
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


FIGURES = {"quickstart": quickstart, "world": world}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        buffer = io.BytesIO()
        FIGURES[name]().savefig(buffer, format="png", dpi=100)
        write_atomically(HERE / f"{name}.png", buffer.getvalue())
