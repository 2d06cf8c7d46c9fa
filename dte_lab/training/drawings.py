"""A folder of one's own drawings as items of `pretrain`, before the scenes of the small world.

The pairs are those of world/pairs.py, of drawings that nobody has named: one picture of a thing,
and the thing in another scene as the target, with the prompt that says so. Few drawings go far when
each is also mirrored, turned, given other colours, and joined to half of another. `fit_first_words`
says beforehand what the word of a picture is. All of this is ours, not the paper's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from dte_lab.backbone import Backbone, backbone_folder
from dte_lab.common.errors import DTEError
from dte_lab.common.images import Picture, read_picture, square
from dte_lab.encoder import TuningEncoder
from dte_lab.training.first_words import fit_reading
from dte_lab.training.pictures import SUFFIXES
from dte_lab.world.captions import caption
from dte_lab.world.data import to_tensor
from dte_lab.world.pairs import (
    BACKGROUNDS,
    MIXED,
    VARIANTS,
    VARIED,
    SeededItems,
    behind,
    mix,
    vary,
)
from dte_lab.world.scenes import SCENES, SPRITE_PX, compose
from dte_lab.world.word_space import PICTURE_WORDS, PictureWords

INPUT_IS_TARGET = 0.25  # of the items: the target is the input, under "a picture of S*"
Draw = Callable[[str], UInt8[np.ndarray, "64 64 3"]]  # a scene's name -> the thing in it
PAPER = 60  # levels of 255, summed over the colours: what differs less from a corner is paper


def cut_thing(path: Path) -> Float[np.ndarray, "48 48 4"]:
    """The thing in a drawing, in [0, 1], colours premultiplied, as large as it fits.

    Around it the drawing is transparent, or else paper, which is what joins its corners. Raises
    ImageError for a file that is no picture, and DTEError where nothing is left.
    """
    image, mask = read_picture(path)
    mask = mask or off_paper(image)
    box = mask.getbbox()
    if box is None:
        raise DTEError(f"{path} shows nothing but paper: draw something darker.")
    image, mask = (square(x.crop(box), SPRITE_PX, "pad") for x in Picture(image, mask))
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    colour = np.asarray(image, np.float32) / 255 - (1 - alpha)  # of it on white
    return np.concatenate([colour.clip(0, alpha), alpha], axis=2)


def off_paper(image: Image.Image) -> Image.Image:
    """White where an RGB picture cannot be reached from a corner over like colours."""
    filled, marker = image.copy(), (255, 0, 254)
    right, bottom = image.width - 1, image.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        ImageDraw.floodfill(filled, corner, marker, thresh=PAPER)
    is_thing = (np.asarray(filled) != marker).any(axis=2)
    return Image.fromarray((255 * is_thing).astype(np.uint8))


def training_pair(draw: Draw, say: Callable[[str], str], first: str, second: str) -> dict:
    """The thing in one scene to learn from, in another as the target, and what asks for that."""
    return {"image": draw(first), "target": draw(second), "prompt": say(second)}


class DrawingPairs(SeededItems):
    """Items of `pretrain`, from folder/THING/PICTURE; see `SeededItems`.

    things: the first so many alone. pair: see `training_pair`. Raises DTEError where
    there is no drawing, and see `cut_thing`.
    """

    def __init__(
        self, folder: Path | str, things: int | None = None, length: int = 1_000_000, seed: int = 0,
        pair: Callable[..., dict] = training_pair,
    ) -> None:  # fmt: skip
        super().__init__(length, seed)
        paths = sorted(p for p in Path(folder).glob("*/*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise DTEError(f"{folder} has no sub-folders with drawings: make one for each thing.")
        self.names = sorted({path.parent.name for path in paths})[:things]
        paths = [path for path in paths if path.parent.name in self.names]
        self.things = [self.names.index(path.parent.name) for path in paths]
        self.sprites = [cut_thing(path) for path in paths]
        self.pair = pair

    def item(self, rng: np.random.Generator) -> dict[str, Tensor | str | int]:
        rgba, concept = self.thing(rng)
        first, second = (SCENES[k] for k in rng.integers(len(SCENES), size=2))
        draw, say = partial(in_scene, rgba, rng=rng), partial(caption, "S*", None)
        item = self.pair(draw, say, first, second)
        if rng.random() < INPUT_IS_TARGET:
            item |= {"target": item["image"], "prompt": caption("S*", None, None)}
        image, target = to_tensor(np.stack([item["image"], item["target"]]))
        return {"image": image, "target": target, "prompt": item["prompt"], "concept": concept}

    def thing(self, rng: np.random.Generator) -> tuple[Float[np.ndarray, "48 48 4"], int]:
        """A drawing, or what `mix` and `vary` make of it, and a number of its own for each."""
        left = right = int(rng.integers(len(self.sprites)))
        if rng.random() < MIXED:
            right = int(rng.integers(len(self.sprites)))
        variant = int(rng.integers(1, len(VARIANTS))) if rng.random() < VARIED else 0
        rgba = vary(mix(self.sprites[left], self.sprites[right]), variant)
        numbers = self.things[left], self.things[right]
        return rgba, numbers[0] + len(self.names) * (numbers[1] + len(self.names) * variant)


def in_scene(
    rgba: Float[np.ndarray, "48 48 4"], scene: str, rng: np.random.Generator
) -> UInt8[np.ndarray, "64 64 3"]:
    return compose(rgba, scene, behind(scene, int(rng.integers(BACKGROUNDS))))


@torch.no_grad()
def fit_first_words(
    encoder: TuningEncoder, backbone: Backbone, pairs: DrawingPairs, pictures: int = 2000
) -> None:
    """Fit a fresh encoder's token head, in closed form, to the words of pictures.

    Those are linear in the latents of the thing on white (world/word_space.py). Raises DTEError for
    a backbone that has no such words.
    """
    images, white, rng = [], [], np.random.default_rng((pairs.seed, pairs.length))
    for _ in range(pictures):
        rgba, _ = pairs.thing(rng)
        images.append(in_scene(rgba, SCENES[rng.integers(len(SCENES))], rng))
        white.append(in_scene(rgba, "white", rng))
    truth = words_on_white(backbone, to_tensor(np.stack(white)))
    fit_reading(encoder, backbone, to_tensor(np.stack(images)), truth)


@torch.no_grad()
def words_on_white(
    backbone: Backbone, white: Float[Tensor, "pictures 3 64 64"]
) -> Float[Tensor, "pictures dim"]:
    """Of things on white, in [-1, 1]. Raises DTEError as `fit_first_words`."""
    words = PictureWords.load(backbone_folder(backbone.name) / PICTURE_WORDS).to(backbone.device)
    parts = [words(backbone.encode_images(part).float()) for part in white.split(128)]
    return torch.cat(parts)
