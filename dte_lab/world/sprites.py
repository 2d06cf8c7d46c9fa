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
def _atlas(style: str) -> Image.Image:
    if style not in STYLES:
        raise DTEError(f"Unknown style {style!r}: use one of {', '.join(STYLES)}.")
    return Image.open(ASSETS / f"{style}.webp").convert("RGBA")


@cache
def sprite(name: str, style: str, size: int = 48) -> np.ndarray:
    """Sprite as (size, size, 4) float32 RGBA in [0, 1], colours premultiplied by alpha.

    Raises DTEError for a concept or style that does not exist.
    """
    if name not in concepts():
        raise DTEError(f"Unknown concept {name!r}: use one of dte_lab.world.concepts().")
    row, column = divmod(concepts()[name].index, ATLAS_COLUMNS)
    left, top = column * SPRITE_SIZE, row * SPRITE_SIZE
    image = _atlas(style).crop((left, top, left + SPRITE_SIZE, top + SPRITE_SIZE))
    # Pillow resizes RGBA premultiplied ("RGBa"), so no dark or bright fringe appears.
    image = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


SAMPLE_CONCEPTS = ("strawberry", "peacock", "tractor", "cupcake")  # val: not trained on
