"""Many drawings before many backgrounds, composed as tensors on the device that trains on them.

A GPU sees thousands of pictures a second, and more than a processor could draw. `render` of
scenes.py is the same for one picture, in numpy.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dte_lab.world.captions import held_out
from dte_lab.world.data import from_bytes
from dte_lab.world.pairs import BACKGROUNDS, VARIANTS, behind, vary
from dte_lab.world.scenes import BOX, LIGHT, SCENES, SPRITE_PX
from dte_lab.world.sprites import STYLES, split_names, sprite
from dte_lab.world.wide import Wide, load

WHITE = SCENES.index("white")


def small_drawings(names: list[str]) -> UInt8[Tensor, "drawings 48 48 4"]:
    """The sprites of things of the small world, each in the three styles, premultiplied."""
    sprites = [sprite(name, style, SPRITE_PX) for name in names for style in STYLES]
    return torch.from_numpy(np.stack(sprites)).mul(255).round().byte()


class Drawings:
    """All that batches show: things of the small world in three styles, then the wide world's.

    `allowed` (N, 20): scenes in which no combination is kept to measure with (see `held_out`).
    `wide`: what is known of those behind the first `small`.
    """

    def __init__(
        self, names: list[str], wide: Wide | None = None, count: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """names: of the small world. count: the first so many drawings alone, None for all."""
        self.device = torch.device(device)
        extra = len(wide.drawings) if wide else 0
        count = len(STYLES) * len(names) + extra if count is None else count
        self.names = names[: max(1, count // len(STYLES))]
        self.small = len(STYLES) * len(self.names)
        train = set(split_names("train"))
        self.train_names = [name for name in self.names if name in train]  # the first, if any
        self.wide = wide.drawings[: max(0, count - self.small)] if wide else []
        parts = [small_drawings(self.names)] + ([wide.rgba[: len(self.wide)]] if wide else [])
        self.rgba = torch.cat(parts).to(self.device)  # (N, 48, 48, 4)
        allowed = [
            [not held_out(name, style, scene) for scene in SCENES]
            for name in self.names
            for style in STYLES
        ]
        anywhere = torch.ones(len(self.wide), len(SCENES), dtype=torch.bool)
        self.allowed = torch.cat([torch.tensor(allowed), anywhere]).to(self.device)
        self.next_allowed = next_allowed(self.allowed)
        rooms = [[behind(scene, seed) for seed in range(BACKGROUNDS)] for scene in SCENES]
        self.rooms = torch.as_tensor(np.asarray(rooms), device=self.device).half()
        numbers = np.arange(SPRITE_PX**2 * 4).reshape(SPRITE_PX, SPRITE_PX, 4)
        sources = [vary(numbers, variant).ravel() for variant in range(len(VARIANTS))]
        self.sources = torch.as_tensor(np.stack(sources), device=self.device)  # taken from where
        plain = ((1, 1, 1), (0, 0, 0), 0)
        light = zip(*(LIGHT.get(scene, plain) for scene in SCENES), strict=True)
        self.multiply, self.tint, self.amount = (
            torch.tensor(x, device=self.device).float() for x in light
        )

    def __len__(self) -> int:
        return len(self.rgba)

    def random(self, size: int, wide_share: float) -> Int[Tensor, " size"]:
        """Rows of random drawings; wide_share: of the wide world's, if there are any."""
        small = torch.randint(self.small, (size,), device=self.device)
        if not self.wide:
            return small
        other = torch.randint(self.small, len(self), (size,), device=self.device)
        return other.where(torch.rand(size, device=self.device) < wide_share, small)

    def things(
        self,
        left: Int[Tensor, " batch"],
        right: Int[Tensor, " batch"],
        seam: Int[Tensor, " batch"],
        variant: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch 48 48 4"]:
        """Parts of two drawings beside each other, as VARIANTS say, in [0, 1].

        seam: the first column of the right one. A seam that were always in the middle, where two
        cells of the latents meet, would teach that things change there.
        """
        is_left = torch.arange(SPRITE_PX, device=self.device) < seam[:, None]  # (B, 48)
        rgba = self.rgba[left].where(is_left[:, None, :, None], self.rgba[right]).float() / 255
        return rgba.flatten(1).gather(1, self.sources[variant]).view_as(rgba)

    def before(
        self, things: Float[Tensor, "batch 48 48 4"], scene: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch 3 64 64"]:
        """Things before one of the BACKGROUNDS of their scenes, in [-1, 1]."""
        colour, alpha = things[..., :3], things[..., 3:]
        multiply, tint, amount = (
            x[scene].reshape(len(scene), 1, 1, -1) for x in (self.multiply, self.tint, self.amount)
        )
        colour = colour * multiply * (1 - amount) + alpha * tint * amount
        which = torch.randint(BACKGROUNDS, (len(scene),), device=self.device)
        picture = self.rooms[scene, which].float()
        picture[:, BOX, BOX] = picture[:, BOX, BOX] * (1 - alpha) + colour
        pixels = (picture.clamp(0, 1) * 255 + 0.5).byte()
        return from_bytes(pixels.permute(0, 3, 1, 2))

    def plain(
        self, rows: Int[Tensor, " batch"], scene: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch 3 64 64"]:
        """Whole drawings as they are, in scenes."""
        zero = torch.zeros_like(rows)
        return self.before(self.things(rows, rows, zero, zero), scene)

    def not_kept(
        self,
        rows: Int[Tensor, " batch"],
        scene: Int[Tensor, " batch"],
        whole: Bool[Tensor, " batch"],
    ) -> Int[Tensor, " batch"]:
        """The scenes, but the next where a whole drawing in it is kept to measure with."""
        return torch.where(whole, self.next_allowed[rows, scene], scene)


def drawings_to_train_on(
    cache: Path | None, count: int | None, device: torch.device | str
) -> Drawings:
    """Of `train` and `extra` things and, where there is a cache, the wide world.

    count: see `Drawings`. Raises DTEError for a cache that holds no wide world.
    """
    names = split_names("train") + split_names("extra")
    return Drawings(names, load(cache) if cache else None, count, device)


def drawings_never_seen(cache: Path, device: torch.device | str) -> Drawings:
    """To watch training with: of `val` things, then those in the style that no training sees.

    Raises DTEError for a cache that holds no wide world.
    """
    wide = load(cache)
    unseen = Wide(wide.held_out, wide.held_out_rgba, [], wide.held_out_rgba[:0])
    return Drawings(split_names("val"), unseen, device=device)


def next_allowed(allowed: Bool[Tensor, "drawings scenes"]) -> Int[Tensor, "drawings scenes"]:
    """Of each scene, itself if it is allowed, else the next that is, in a circle."""
    later = torch.arange(allowed.shape[1], device=allowed.device)
    turned = torch.stack([allowed.roll(-k, 1) for k in later.tolist()], dim=2)  # (N, S, steps)
    return (later + turned.int().argmax(2)) % allowed.shape[1]
