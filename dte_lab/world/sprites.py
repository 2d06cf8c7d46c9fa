"""The concepts of the small world and their pictures: 822 emoji in three drawing styles."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dte_lab.common.errors import DTEError

ASSETS = Path(__file__).parent / "assets"
STYLES = ("noto", "twemoji", "fluent")
UNSEEN_STYLE = "fxemoji"  # of some val and test things; no training has seen any of its drawings
UNSEEN_SIZE = 48  # px in its atlas
SPRITE_SIZE = 64  # px in the atlas: the native size of the Noto and Twemoji packages
ATLAS_COLUMNS = 32


@dataclass(frozen=True)
class Thing:
    """One thing of the small world; `split` is 'train', 'extra', 'val' or 'test'."""

    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    split: str
    index: int


@cache
def concepts() -> dict[str, Thing]:
    """All concepts by name, in atlas order."""
    splits = json.loads((ASSETS / "splits.json").read_text())
    split_of = {name: split for split, names in splits.items() for name in names}
    return {
        c["name"]: Thing(**{**c, "tags": tuple(c["tags"])}, split=split_of[c["name"]], index=i)
        for i, c in enumerate(json.loads((ASSETS / "concepts.json").read_text()))
    }


def split_names(split: str) -> list[str]:
    """Names of the concepts in a split, in atlas order.

    The base model is trained on 'train', the tuning-encoder on 'train' and 'extra'; 'val' is there
    to choose with, and 'test' to measure with.
    """
    return [c.name for c in concepts().values() if c.split == split]


@cache
def unseen_names() -> list[str]:
    """Names of the val and test things that have a drawing in UNSEEN_STYLE, in its atlas' order."""
    return json.loads((ASSETS / f"{UNSEEN_STYLE}.json").read_text())


@cache
def _atlas(style: str) -> Image.Image:
    return Image.open(ASSETS / f"{style}.webp").convert("RGBA")


@cache
def sprite(name: str, style: str, size: int = 48) -> np.ndarray:
    """Sprite as (size, size, 4) float32 RGBA in [0, 1], colours premultiplied by alpha.

    Raises DTEError for a concept or style that does not exist.
    """
    if name not in concepts():
        raise DTEError(f"Unknown concept {name!r}: use one of dte_lab.world.concepts().")
    if style in STYLES:
        index, side = concepts()[name].index, SPRITE_SIZE
    elif style == UNSEEN_STYLE and name in unseen_names():
        index, side = unseen_names().index(name), UNSEEN_SIZE
    else:
        raise DTEError(
            f"There is no {name} in the style {style!r}: use one of {', '.join(STYLES)}."
        )
    row, column = divmod(index, ATLAS_COLUMNS)
    left, top = column * side, row * side
    image = _atlas(style).crop((left, top, left + side, top + side))
    # Pillow resizes RGBA premultiplied ("RGBa"), so no dark or bright fringe appears.
    image = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


def spread(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly over their order, which is by kind."""
    return [names[i * len(names) // count] for i in range(count)]


SAMPLE_CONCEPTS = ("strawberry", "peacock", "tractor", "cupcake")  # val: not trained on
THINGS = (  # shown where no model has seen them; the page begins with the first
    "bus", "strawberry", "monkey", "peacock", "snowman", "octopus", "volcano", "cupcake", "tractor",
    "pineapple", "key", "handbag", "giraffe", "t rex", "tulip", "sailboat", "accordion", "tent",
    "hamburger", "shrimp", "house", "moose", "paintbrush", "spaghetti", "scorpion", "squid",
    "badger", "ladder", "motorcycle", "jar",
)  # fmt: skip


def unseen_things() -> list[tuple[str, str]]:
    """(name, style) of thirty things that neither base model nor encoder has seen."""
    unseen = [*split_names("val"), *split_names("test")]
    names = [name for name in dict.fromkeys((*THINGS, *unseen)) if name in unseen][: len(THINGS)]
    return [(name, STYLES[(i + 2) % 3]) for i, name in enumerate(names)]
