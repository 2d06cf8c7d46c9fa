"""What is asked of every method: one picture of each held-out concept, a fixed list of edits."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from dte_lab.common.errors import DTEError
from dte_lab.world.captions import caption
from dte_lab.world.data import to_tensor
from dte_lab.world.scenes import BOX, SIZE, SPRITE_PX, render
from dte_lab.world.sprites import (
    STYLES,
    UNSEEN_STYLE,
    concepts,
    split_names,
    spread,
    sprite,
    unseen_names,
)

INPUT_SCENES = ("white", "grass", "table")  # no edit asks for these but the style edits for white
SCENE_EDITS = (
    "beach", "red", "night", "snow", "blue", "water", "forest", "yellow", "desert", "green",
)  # fmt: skip
QUICK_SCENES = SCENE_EDITS[:2]


@dataclass(frozen=True)
class Item:
    """A held-out concept and the style, scene and seed of its one input picture."""

    name: str
    style: str
    scene: str
    seed: int = 0

    @property
    def group(self) -> str:
        return concepts()[self.name].group

    @property
    def others(self) -> list["Item"]:
        """The other concepts of its split, in the same style and scene."""
        thing = concepts()[self.name]
        names = names_of(UNSEEN_STYLE if self.style == UNSEEN_STYLE else thing.split)
        return [replace(self, name=name) for name in names if name != self.name]

    def picture(self) -> Float[Tensor, "1 3 height width"]:
        """In [-1, 1], 64 pixels wide."""
        return to_tensor(render(self.name, self.style, self.scene, self.seed)[None])

    def mask(self) -> Image.Image:
        """Where in the picture the thing is, in white."""
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[BOX, BOX] = 255 * object_mask(self.name, self.style).numpy()
        return Image.fromarray(mask)


@dataclass(frozen=True)
class Edit:
    """A prompt with "S*" for an item, and what it truly shows. `name` is short and unique."""

    name: str
    prompt: str
    style: str
    scene: str
    is_style: bool


def items(count: int, split: str = "test") -> list[Item]:
    """`count` concepts of a split, evenly spread over its order, the three styles in rotation.

    The split "fxemoji" has those val and test things that exist in this style, which no training
    has seen, drawn in it. Raises DTEError when there is no such split, or it has fewer.
    """
    if not (names := names_of(split)):
        splits = sorted({concept.split for concept in concepts().values()})
        known = ", ".join([*splits, UNSEEN_STYLE])
        raise DTEError(f"Unknown split {split!r}: use one of {known}.")
    if not 1 <= count <= len(names):
        raise DTEError(f"The split {split} has {len(names)} concepts: ask for 1 to {len(names)}.")
    chosen = spread(names, count)
    styles = (UNSEEN_STYLE,) * 3 if split == UNSEEN_STYLE else STYLES
    return [Item(name, styles[i % 3], INPUT_SCENES[(i // 3) % 3]) for i, name in enumerate(chosen)]


def names_of(split: str) -> list[str]:
    return unseen_names() if split == UNSEEN_STYLE else split_names(split)


def edits(item: Item, scenes: tuple[str, ...] = SCENE_EDITS) -> list[Edit]:
    """The scenes, places and colours, in the item's own style; then the other styles."""
    asked = [Edit(s, caption("S*", None, s), item.style, s, False) for s in scenes]
    others = [s for s in STYLES if s != item.style]
    return asked + [Edit(s, caption("S*", s, "white"), s, "white", True) for s in others]


def truth(item: Item, edit: Edit, seed: int = 0) -> Float[Tensor, "3 64 64"]:
    """The true rendering of an edit, in [-1, 1]."""
    return to_tensor(render(item.name, edit.style, edit.scene, seed)[None])[0]


def object_mask(name: str, style: str) -> Bool[Tensor, "48 48"]:
    """Where in its box the sprite is."""
    return torch.from_numpy(sprite(name, style, SPRITE_PX)[..., 3] > 0.1)


def object_region(
    x: Float[Tensor, "*batch height width"], mask: Bool[Tensor, "48 48"]
) -> Float[Tensor, "*batch 48 48"]:
    """The sprite's box of pictures of the small world, mid-grey outside the mask.

    Raises DTEError for pictures of another size.
    """
    if x.shape[-1] != SIZE:
        raise DTEError(f"The small world's pictures have {SIZE} pixels, not {x.shape[-1]}.")
    return torch.where(mask, x[..., BOX, BOX], torch.zeros((), dtype=x.dtype))
