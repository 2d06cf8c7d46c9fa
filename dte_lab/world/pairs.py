"""The pre-training data of the tuning-encoder: one picture of a concept, and what to draw with it.

Ours, not the paper's, which reconstructs the picture itself: half of the targets show the concept
in another scene and a quarter in another style as well, with the prompt that says so. Without
that, the background of the one picture becomes part of the concept.
"""

from functools import cache
from itertools import permutations

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dte_lab.world.captions import caption, scene_words
from dte_lab.world.data import random_item, to_tensor
from dte_lab.world.scenes import SCENES, SPRITE_PX, background, compose
from dte_lab.world.sprites import STYLES, concepts, split_names, spread, sprite

SAME_PICTURE, OTHER_SCENE = 0.25, 0.5  # the rest: other scene and other style
SHORT_PROMPT = 0.3  # of the prompts that name a scene alone: "S* at night", as people write
MIXED = 0.5  # of the items: half of one concept beside half of another
VARIED = 0.75  # of the items: the concept mirrored, turned and with its colours exchanged
BACKGROUNDS = 64  # of each scene; they differ in shade and waves alone
VARIANTS = [
    (mirrored, turns, order)
    for mirrored in (False, True)
    for turns in range(4)  # quarters
    for order in permutations(range(3))  # of red, green and blue
]  # the first is the concept as it is


@cache
def behind(scene: str, seed: int) -> np.ndarray:
    """One of the BACKGROUNDS of a scene: (64, 64, 3)."""
    return background(scene, np.random.default_rng(seed))


def vary(rgba: np.ndarray, variant: int) -> np.ndarray:
    """A sprite (48, 48, 4), colours premultiplied, as the thing that VARIANTS[variant] makes of it.

    To the encoder these are other concepts: there are few real ones to learn to read things from.
    """
    mirrored, turns, order = VARIANTS[variant]
    rgba = np.rot90(rgba[:, ::-1] if mirrored else rgba, turns)
    return rgba[..., [*order, 3]]


def mix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The left half of one sprite (48, 48, 4) beside the right half of another: one more thing."""
    middle = SPRITE_PX // 2
    return np.concatenate([left[:, :middle], right[:, middle:]], axis=1)


class SeededItems(Dataset):
    """Item i is a pure function of (seed, i), so a resumed run sees what it would have seen."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.item(np.random.default_rng((self.seed, index)))

    def item(self, rng: np.random.Generator) -> dict[str, Tensor | str | int]:
        """`image` and `target` (3, 64, 64) in [-1, 1], `prompt` with "S*", `concept` id."""
        raise NotImplementedError


class ConceptPairs(SeededItems):
    """Pictures of named things, and what is said of the second of them; see `SeededItems`.

    `count` concepts of the splits, spread evenly over their order, which is by kind; None for all.
    """

    def __init__(
        self,
        splits: tuple[str, ...] = ("train", "extra"),
        length: int = 1_000_000,
        seed: int = 0,
        count: int | None = None,
        varied: float = VARIED,
        mixed: float = MIXED,
    ) -> None:
        super().__init__(length, seed)
        names = [name for split in splits for name in split_names(split)]
        self.names = spread(names, len(names) if count is None else count)
        self.varied, self.mixed = varied, mixed

    def item(self, rng: np.random.Generator) -> dict[str, Tensor | str | int]:
        name, style, scene, seed = random_item(rng, self.names)
        variant = int(rng.integers(1, len(VARIANTS))) if rng.random() < self.varied else 0
        other = self.names[rng.integers(len(self.names))] if rng.random() < self.mixed else name

        def draw(style: str, scene: str, seed: int) -> np.ndarray:
            left, right = (sprite(half, style, SPRITE_PX) for half in (name, other))
            rgba = vary(mix(left, right), variant)
            return compose(rgba, scene, behind(scene, seed % BACKGROUNDS))

        image = draw(style, scene, seed)
        kind, prompt_style = rng.random(), None
        if kind < SAME_PICTURE:
            target, prompt = image, caption("S*", None, None)
        else:
            scene = SCENES[rng.integers(len(SCENES))]
            if kind >= SAME_PICTURE + OTHER_SCENE:
                style = prompt_style = STYLES[rng.integers(len(STYLES))]
            target = draw(style, scene, int(rng.integers(1 << 31)))
            prompt = caption("S*", prompt_style, scene)
            if not prompt_style and rng.random() < SHORT_PROMPT:
                prompt = f"S* {scene_words(scene)}"
        image, target = to_tensor(np.stack([image, target]))
        left, right = concepts()[name].index, concepts()[other].index
        return {
            "image": image,
            "target": target,
            "prompt": prompt,
            "concept": left + len(concepts()) * (right + len(concepts()) * variant),
        }
