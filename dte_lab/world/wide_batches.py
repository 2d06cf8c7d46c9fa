"""Batches to train the base model on: dictionary words and words made from pictures.

Half of the samples are captions of train emoji. The others say "S*", and show the same drawing
twice: before the background of the input picture and before that of the target. Many of these
drawings exist nowhere: parts of two, mirrored, turned, with their colours exchanged.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dte_lab.world.captions import caption, held_out, random_caption, scene_words
from dte_lab.world.clip import tokenize
from dte_lab.world.data import from_bytes
from dte_lab.world.pairs import BACKGROUNDS, VARIANTS, behind, vary
from dte_lab.world.scenes import BOX, LIGHT, SCENES, SPRITE_PX
from dte_lab.world.sprites import STYLES, concepts, split_names, sprite
from dte_lab.world.wide import Wide

PLACEHOLDER = "thing"  # a word of the vocabulary whose embedding the picture's takes the place of


@dataclass
class Shares:
    """Of the samples of a batch; `mixed` and below: of those whose word is made from a picture."""

    dictionary: float = 0.5
    wide_names: float = 0.4  # of the dictionary's: drawings of the wide world by their names
    wide: float = 0.6  # of the pictures' words: drawings of the wide world; the rest are emoji
    mixed: float = 0.3
    varied: float = 0.5
    same_scene: float = 0.15  # "a picture of S*": the scene is the input's
    restyled: float = 0.15  # of emoji: another style, and the prompt says which
    on_white: bool = False  # the pictures that make words show the thing on white


@dataclass
class Batch:
    """Both kinds of samples, dictionary words first."""

    ids: Tensor  # (B, T)
    is_slot: Tensor  # (B, T) bool, where the picture's word goes; nowhere in dictionary samples
    image: Tensor  # (B - D, 3, 64, 64) in [-1, 1], which makes the words
    target: Tensor  # (B, 3, 64, 64)
    word: Tensor  # (B - D,) index of the train concept that the input shows as it is, or -1
    white: Tensor  # (B - D, 3, 64, 64), the input's thing on white
    concept: Tensor  # (B - D,)


class Composer:
    """Drawings before backgrounds, as tensors."""

    def __init__(self, rgba: Tensor):
        """rgba: (N, 48, 48, 4) uint8, colours premultiplied by alpha."""
        self.rgba = rgba
        rooms = [[behind(scene, seed) for seed in range(BACKGROUNDS)] for scene in SCENES]
        self.rooms = torch.from_numpy(np.asarray(rooms)).half()  # (20, BACKGROUNDS, 64, 64, 3)
        numbers = np.arange(SPRITE_PX**2 * 4).reshape(SPRITE_PX, SPRITE_PX, 4)
        sources = [vary(numbers, variant).ravel() for variant in range(len(VARIANTS))]
        self.sources = torch.from_numpy(np.stack(sources))  # where each number is taken from
        plain = ((1, 1, 1), (0, 0, 0), 0)
        light = zip(*(LIGHT.get(scene, plain) for scene in SCENES), strict=True)
        self.multiply, self.tint, self.amount = (torch.tensor(x).float() for x in light)

    def thing(self, left: Tensor, right: Tensor, seam: Tensor, variant: Tensor) -> Tensor:
        """Parts of drawings (B,) beside each other, varied: (B, 48, 48, 4) float in [0, 1].

        seam (B,): the first column of the right one. A seam that were always in the middle, where
        two cells of the latents meet, would teach that a thing changes there.
        """
        is_left = torch.arange(SPRITE_PX) < seam[:, None]  # (B, 48)
        rgba = self.rgba[left].where(is_left[:, None, :, None], self.rgba[right]).float() / 255
        return rgba.flatten(1).gather(1, self.sources[variant]).view_as(rgba)

    def __call__(self, rgba: Tensor, scene: Tensor) -> Tensor:
        """Things (B, 48, 48, 4) in scenes (B,): (B, 3, 64, 64) in [-1, 1]."""
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        multiply, tint, amount = (
            x[scene].reshape(len(scene), 1, 1, -1) for x in (self.multiply, self.tint, self.amount)
        )
        colour = colour * multiply * (1 - amount) + alpha * tint * amount
        picture = self.rooms[scene, torch.randint(BACKGROUNDS, (len(scene),))].float()
        picture[:, BOX, BOX] = picture[:, BOX, BOX] * (1 - alpha) + colour
        pixels = (picture.clamp(0, 1) * 255 + 0.5).byte()
        return from_bytes(pixels.permute(0, 3, 1, 2))


def small_rgba(names: list[str]) -> Tensor:
    """The sprites of concepts of the small world in the three styles: (3 N, 48, 48, 4) uint8."""
    sprites = [sprite(name, style, SPRITE_PX) for name in names for style in STYLES]
    return torch.from_numpy(np.stack(sprites)).mul(255).round().byte()


def wide_words(wide: Wide) -> list[str]:
    """Words in the names of at least two drawings."""
    counts = Counter(w for d in wide.drawings for w in set(d.name.split()))
    return sorted(w for w, n in counts.items() if n >= 2)


def wide_caption(drawing, scene: str, rng) -> str:
    """'a red game picture of a war axe on the beach', or without colour and style."""
    name = drawing.name
    name = name if name.endswith("s") else ("an " if name[0] in "aeiou" else "a ") + name
    kind = rng.random()
    style = " ".join(filter(None, (drawing.colour, drawing.style)))
    if kind < 0.6:
        return f"a {style} picture of {name} {scene_words(scene)}"
    colour = f"{drawing.colour} " if drawing.colour else ""
    if kind < 0.9:
        return f"a {colour}picture of {name} {scene_words(scene)}"
    return f"{name} {scene_words(scene)}, {style}"


class WideBatches:
    """Random batches from torch's random numbers, see `Batch`."""

    def __init__(self, tokenizer, wide: Wide | None, shares: Shares | None = None):
        """wide: None for the small world alone. Things of `val` and `test` are in neither."""
        self.shares, self.tokenizer = shares or Shares(), tokenizer
        self.train = split_names("train")
        names = self.train + split_names("extra")  # train first, so that word = drawing // 3
        self.small = 3 * len(names)
        parts = [small_rgba(names)] + ([wide.rgba] if wide else [])
        self.compose = Composer(torch.cat(parts))
        self.count = len(self.compose.rgba)
        if not wide:
            self.shares.wide = 0.0
        allowed = [
            [[not held_out(name, style, scene) for scene in SCENES] for style in STYLES]
            for name in names
        ]
        others = torch.ones(self.count - self.small, len(SCENES), dtype=torch.bool)
        self.allowed = torch.cat([torch.tensor(allowed).flatten(0, 1), others])  # (N, 20)
        self.shown = self.allowed[: 3 * len(self.train)].nonzero()  # (M, 2): drawing, scene
        self.prompts, self.slots = self._prompts()
        words = set(wide_words(wide)) if wide else set()
        train = {w for name in self.train for w in name.split()}
        self.named = [
            self.small + i
            for i, d in enumerate(wide.drawings if wide else [])
            if len(d.name.split()) <= 3 and set(d.name.split()) <= words | train
        ]
        self.drawings = wide.drawings if wide else []

    def _prompts(self) -> tuple[Tensor, Tensor]:
        """Ids (81, T) of what is said with "S*", and where it stands: none, scenes, styles."""
        texts = [caption(PLACEHOLDER, None, None)]
        texts += [
            caption(PLACEHOLDER, style, scene) for style in (None, *STYLES) for scene in SCENES
        ]
        texts += [f"{PLACEHOLDER} {scene_words(scene)}" for scene in SCENES]
        ids = tokenize(self.tokenizer, texts)
        token = self.tokenizer(PLACEHOLDER, add_special_tokens=False).input_ids
        assert len(token) == 1
        return ids, ids == token[0]

    def __call__(self, size: int) -> Batch:
        D = round(size * self.shares.dictionary)
        ids, target = self._dictionary(D)
        made = self._made(size - D)
        nowhere = torch.zeros_like(ids, dtype=torch.bool)
        return Batch(
            torch.cat([ids, made.ids]), torch.cat([nowhere, made.is_slot]), made.image,
            torch.cat([target, made.target]), made.word, made.white, made.concept,
        )  # fmt: skip

    def _dictionary(self, size: int) -> tuple[Tensor, Tensor]:
        """Captions (D, T) of train emoji, and pictures (D, 3, 64, 64)."""
        drawing, scene = self.shown[torch.randint(len(self.shown), (size,))].unbind(1)
        if self.named:
            other = torch.tensor(self.named)[torch.randint(len(self.named), (size,))]
            is_wide = torch.rand(size) < self.shares.wide_names
            drawing = other.where(is_wide, drawing)
            scene = torch.randint(len(SCENES), (size,)).where(is_wide, scene)
        rng = np.random.default_rng(torch.randint(1 << 31, ()).item())
        texts = []
        for d, s in zip(drawing.tolist(), scene.tolist(), strict=True):
            if d >= self.small:
                texts.append(wide_caption(self.drawings[d - self.small], SCENES[s], rng))
                continue
            name = self.train[d // 3]
            texts.append(
                random_caption(name, STYLES[d % 3], SCENES[s], rng, concepts()[name].tags)
                if rng.random() < 0.5
                else caption(name, STYLES[d % 3], SCENES[s])
            )
        nothing = torch.zeros_like(drawing)  # neither mixed nor varied
        things = self.compose.thing(drawing, drawing, nothing, nothing)
        return tokenize(self.tokenizer, texts), self.compose(things, scene)

    def _made(self, size: int) -> Batch:
        """Samples whose word is made from a picture."""

        def chance(share: float) -> Tensor:
            return torch.rand(size) < share

        def drawings(wide: Tensor) -> Tensor:
            small = torch.randint(self.small, (size,))
            if self.count == self.small:
                return small
            return torch.randint(self.small, self.count, (size,)).where(wide, small)

        wide = chance(self.shares.wide)
        first = drawings(wide)
        second = drawings(chance(self.shares.wide)).where(chance(self.shares.mixed), first)
        some = torch.randint(1, len(VARIANTS), (size,))
        variant = some.where(chance(self.shares.varied), torch.zeros_like(some))
        here = torch.randint(len(SCENES), (size,))
        if self.shares.on_white:
            here = torch.full_like(here, SCENES.index("white"))
        there = torch.randint(len(SCENES), (size,))
        plain = (first == second) & (variant == 0)
        bad = plain & ~self.allowed[first, there]  # a combination that is kept to measure with
        same = chance(self.shares.same_scene)
        there = here.where(same | bad, there)
        seam = torch.randint(SPRITE_PX // 4, 3 * SPRITE_PX // 4, (size,))
        thing = self.compose.thing(first, second, seam, variant)
        image = self.compose(thing, here)
        white = self.compose(thing, torch.full_like(here, SCENES.index("white")))
        concept = first + self.count * (second + self.count * variant)

        restyled = chance(self.shares.restyled) & (first < self.small) & (first == second) & ~same
        style = torch.randint(3, (size,))
        other = (first // 3 * 3 + style).where(restyled, first)
        restyled &= ~(plain & ~self.allowed[other, there])
        other = other.where(restyled, first)
        second = second.where(first != second, other)
        target = self.compose(self.compose.thing(other, second, seam, variant), there)
        target = image.where(same[:, None, None, None], target)
        short = chance(0.3) & ~restyled
        asked = (1 + style).where(restyled, 4 * short)
        prompt = ~same * (1 + len(SCENES) * asked + there)
        known = plain & (first < 3 * len(self.train))
        word = (first // 3).where(known, torch.full_like(first, -1))
        return Batch(
            self.prompts[prompt], self.slots[prompt], image, target, word, white, concept
        )
