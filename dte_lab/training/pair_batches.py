"""Batches of what `ConceptPairs` draws one by one, composed on the device that trains on them.

A GPU sees thousands of pairs a second, and more than a processor could draw.
"""

import copy

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from dte_lab.tokens import PromptEncoder, PromptTokens
from dte_lab.world.captions import caption, held_out, scene_words
from dte_lab.world.data import from_bytes
from dte_lab.world.pairs import (
    BACKGROUNDS,
    MIXED,
    OTHER_SCENE,
    SAME_PICTURE,
    SHORT_PROMPT,
    VARIANTS,
    VARIED,
    ConceptPairs,
    behind,
    vary,
)
from dte_lab.world.scenes import BOX, LIGHT, SCENES, SPRITE_PX
from dte_lab.world.sprites import STYLES, concepts, sprite


class PairBatches:
    """Random batches for a training loop: dicts of tensors, see `__call__`.

    splits, count, varied and mixed are those of ConceptPairs.
    """

    def __init__(
        self, prompt_encoder: PromptEncoder, splits: tuple[str, ...] = ("train", "extra"),
        count: int | None = None, varied: float = VARIED, mixed: float = MIXED,
    ) -> None:  # fmt: skip
        device = prompt_encoder.text_encoder.device
        self.varied, self.mixed, self.device = varied, mixed, device
        names = self.names = ConceptPairs(splits, count=count).names

        def on_device(array: ArrayLike) -> Tensor:
            return torch.as_tensor(np.asarray(array), device=device)

        self.index = on_device([concepts()[name].index for name in names])
        sprites = [[sprite(name, style, SPRITE_PX) for style in STYLES] for name in names]
        self.sprites = on_device(sprites).mul(255).round().byte()  # (N, 3, 48, 48, 4)
        rooms = [[behind(scene, seed) for seed in range(BACKGROUNDS)] for scene in SCENES]
        self.rooms = on_device(rooms).half()  # (20, BACKGROUNDS, 64, 64, 3)
        self.shown = on_device(
            [
                (n, s, b)
                for n, name in enumerate(names)
                for s, style in enumerate(STYLES)
                for b, scene in enumerate(SCENES)
                if not held_out(name, style, scene)
            ]
        )
        numbers = np.arange(SPRITE_PX**2 * 4).reshape(SPRITE_PX, SPRITE_PX, 4)
        sources = [vary(numbers, variant) for variant in range(len(VARIANTS))]
        self.sources = on_device(sources).flatten(1)  # (48, 48 * 48 * 4): where each is taken from
        plain = ((1, 1, 1), (0, 0, 0), 0)
        light = zip(*(LIGHT.get(scene, plain) for scene in SCENES), strict=True)
        self.multiply, self.tint, self.amount = (on_device(x).float() for x in light)
        styled = [caption("S*", style, scene) for style in (None, *STYLES) for scene in SCENES]
        short = [f"S* {scene_words(scene)}" for scene in SCENES]
        prompts = [caption("S*", None, None), *styled, *short]
        self.ids, self.slots = prompt_encoder.tokenize(prompts)

    def random(self, size: int, count: int) -> Int[Tensor, " size"]:
        return torch.randint(count, (size,), device=self.device)

    def chance(self, size: int, share: float) -> Bool[Tensor, " size"]:
        return torch.rand(size, device=self.device) < share

    def only(self, name: str) -> "PairBatches":
        """The same for pictures of one of the concepts alone; they may be mixed with others."""
        one = copy.copy(self)
        one.shown = self.shown[self.shown[:, 0] == self.names.index(name)]
        return one

    def __call__(self, size: int) -> dict:
        """image, target (B, 3, 64, 64) in [-1, 1]; prompt, tokenized; concept (B,)."""
        name, style, scene = self.shown[self.random(size, len(self.shown))].unbind(1)
        other = self.random(size, len(self.index)).where(self.chance(size, self.mixed), name)
        variant = self.chance(size, self.varied) * (1 + self.random(size, len(VARIANTS) - 1))
        image = self.draw(name, other, style, variant, scene)

        kind = torch.rand(size, device=self.device)
        same, restyled = kind < SAME_PICTURE, kind >= SAME_PICTURE + OTHER_SCENE
        scene = self.random(size, len(SCENES))
        style = self.random(size, len(STYLES)).where(restyled, style)
        target = self.draw(name, other, style, variant, scene)
        target = image.where(same[:, None, None, None], target)
        short = self.chance(size, SHORT_PROMPT)
        asked = (1 + style).where(restyled, 4 * short)  # which style, none, or the short form
        prompt = ~same * (1 + len(SCENES) * asked + scene)
        left, right, n = self.index[name], self.index[other], len(concepts())
        return {
            "image": image,
            "target": target,
            "prompt": PromptTokens(self.ids[prompt], self.slots[prompt]),
            "concept": left + n * (right + n * variant),
        }

    def draw(
        self,
        name: Int[Tensor, " batch"],
        other: Int[Tensor, " batch"],
        style: Int[Tensor, " batch"],
        variant: Int[Tensor, " batch"],
        scene: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch 3 64 64"]:
        """The pictures of so many pairs of halves, in [-1, 1]."""
        middle, which = SPRITE_PX // 2, self.random(len(name), BACKGROUNDS)
        left, right = self.sprites[name, style], self.sprites[other, style]
        rgba = torch.cat([left[:, :, :middle], right[:, :, middle:]], dim=2).float() / 255
        rgba = rgba.flatten(1).gather(1, self.sources[variant]).view_as(rgba)
        colour, alpha = rgba[..., :3], rgba[..., 3:]  # (B, 48, 48, ...)
        multiply, tint, amount = (
            x[scene].reshape(len(scene), 1, 1, -1) for x in (self.multiply, self.tint, self.amount)
        )
        colour = colour * multiply * (1 - amount) + alpha * tint * amount
        picture = self.rooms[scene, which].float()
        picture[:, BOX, BOX] = picture[:, BOX, BOX] * (1 - alpha) + colour
        pixels = (picture.clamp(0, 1) * 255 + 0.5).byte()
        return from_bytes(pixels.permute(0, 3, 1, 2))
