"""Batches of the wide world: captions of the dictionary, and pictures that make a word.

`Captions` are what the base model reads. `PicturePairs` say "S*", and show the same thing twice:
before the background of the input picture and before that of the target. Many of these things exist
nowhere: parts of two drawings, mirrored, turned, with their colours exchanged. The tuning-encoder
is trained on them alone.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import CLIPTokenizer

from dte_lab.world.captions import caption, noun_phrase, random_caption, scene_words
from dte_lab.world.clip import WORDS, tokenize
from dte_lab.world.drawings import WHITE, Drawings
from dte_lab.world.pairs import VARIANTS
from dte_lab.world.scenes import SCENES, SPRITE_PX
from dte_lab.world.sprites import STYLES, concepts, split_names
from dte_lab.world.wide import Drawing

PLACEHOLDER = "thing"  # a word of the vocabulary; the picture's word takes its embedding's place
FULL_CAPTIONS = 0.5  # of the small world's: those that name style and scene for sure
LONGEST_NAME = 3  # words of a wide name that a caption says


def wide_words(drawings: list[Drawing]) -> list[str]:
    """Words in the names of at least two drawings, sorted."""
    counts = Counter(word for drawing in drawings for word in set(drawing.name.split()))
    return sorted(word for word, count in counts.items() if count >= 2)


def wide_caption(drawing: Drawing, scene: str, rng: np.random.Generator) -> str:
    """'a red game picture of a war axe on the beach', or without the style, or the short form."""
    name, where, kind = noun_phrase(drawing.name), scene_words(scene), rng.random()
    style = " ".join(filter(None, (drawing.colour, drawing.style)))
    if kind < 0.6:
        return f"a {style} picture of {name} {where}"
    if kind < 0.9:
        return f"a {drawing.colour + ' ' if drawing.colour else ''}picture of {name} {where}"
    return f"{name} {where}, {style}"


class Captions:
    """Random captions and what they show, from a bank of token ids that lies on the device."""

    def __init__(
        self, tokenizer: CLIPTokenizer, drawings: Drawings, wide_share: float, bank_size: int,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """wide_share: of the bank, drawings of the wide world by their names. bank_size: captions,
        of which the few that are too long are left out.

        Those of `train` things alone are said by their names; `extra` things are pictures only.
        """
        rng = np.random.default_rng((seed, 78))
        self.drawings, allowed = drawings, drawings.allowed.cpu().numpy()
        shown = range(len(STYLES) * len(drawings.train_names))
        self.named = named_drawings(drawings)
        shows, texts = [], []  # (row, scene) of each
        while len(texts) < bank_size:
            is_wide = len(self.named) > 0 and rng.random() < wide_share
            rows = self.named if is_wide else shown
            row, scene = rows[rng.integers(len(rows))], int(rng.integers(len(SCENES)))
            if allowed[row, scene]:
                shows.append((row, scene))
                texts.append(self.say(row, SCENES[scene], rng))
        ids, shows = tokenize(tokenizer, texts), torch.tensor(shows)
        fits = ids[:, WORDS - 1] == tokenizer.eos_token_id  # the cells' tokens are left alone
        self.ids, shows = ids[fits].to(drawings.device), shows[fits].to(drawings.device)  # (N, T)
        self.rows, self.scenes = shows.unbind(1)

    def say(self, row: int, scene: str, rng: np.random.Generator) -> str:
        """A caption of a drawing in a scene."""
        if row >= self.drawings.small:
            return wide_caption(self.drawings.wide[row - self.drawings.small], scene, rng)
        name, style = self.drawings.names[row // len(STYLES)], STYLES[row % len(STYLES)]
        if rng.random() < FULL_CAPTIONS:
            return caption(name, style, scene)
        return random_caption(name, style, scene, rng, concepts()[name].tags)

    def __call__(
        self, size: int
    ) -> tuple[Int[Tensor, "batch tokens"], Float[Tensor, "batch 3 64 64"]]:
        """Ids, and the pictures in [-1, 1]."""
        which = self.random(size)
        return self.ids[which], self.pictures(which)

    def random(self, size: int) -> Int[Tensor, " size"]:
        """Numbers of random captions of the bank."""
        return torch.randint(len(self.ids), (size,), device=self.ids.device)

    def pictures(self, which: Int[Tensor, " batch"]) -> Float[Tensor, "batch 3 64 64"]:
        """What captions of the bank say, in [-1, 1], before random ones of the backgrounds."""
        return self.drawings.plain(self.rows[which], self.scenes[which])

    def words(self) -> list[str]:
        """Words in the names that captions say, sorted."""
        wide = [self.drawings.wide[row - self.drawings.small].name for row in self.named]
        return sorted({word for name in self.drawings.train_names + wide for word in name.split()})


def named_drawings(drawings: Drawings) -> list[int]:
    """Rows of the wide world's drawings that captions can name: short, of words that come again."""
    known = set(wide_words(drawings.wide))
    known |= {word for name in split_names("train") for word in name.split()}
    return [
        drawings.small + i
        for i, drawing in enumerate(drawings.wide)
        if len(drawing.name.split()) <= LONGEST_NAME and known.issuperset(drawing.name.split())
    ]


@dataclass(frozen=True)
class Shares:
    """Of picture pairs, the probabilities of what is shown and asked for."""

    wide: float = 0.6  # of drawings: the wide world's; the rest are the small world's
    mixed: float = 0.3  # parts of two drawings
    varied: float = 0.5  # mirrored, turned, with its colours exchanged
    same_scene: float = 0.15  # "a picture of S*": the target is the input
    restyled: float = 0.15  # of whole small things: another style, which the prompt names
    short: float = 0.3  # of the others: "S* at night", as people write
    on_white: bool = False  # every input is the thing on white


class PairBatch(NamedTuple):
    """Pictures (B, 3, 64, 64) in [-1, 1]; ids (B, T) and where the picture's word goes in them."""

    ids: Int[Tensor, "batch tokens"]
    is_slot: Bool[Tensor, "batch tokens"]
    image: Float[Tensor, "batch 3 64 64"]
    target: Float[Tensor, "batch 3 64 64"]
    white: Float[Tensor, "batch 3 64 64"]  # the input's thing on white
    concept: Int[Tensor, " batch"]  # a number of the thing, the same for the same thing alone


class PicturePairs:
    """Random pairs of pictures of one thing, and what is said of the second."""

    def __init__(
        self, tokenizer: CLIPTokenizer, drawings: Drawings, shares: Shares | None = None
    ) -> None:
        self.drawings, self.shares = drawings, shares or Shares()
        texts = [caption(PLACEHOLDER, None, None)]
        texts += [
            caption(PLACEHOLDER, style, scene) for style in (None, *STYLES) for scene in SCENES
        ]
        texts += [f"{PLACEHOLDER} {scene_words(scene)}" for scene in SCENES]
        self.ids = tokenize(tokenizer, texts).to(drawings.device)  # (101, T)
        (token,) = tokenizer(PLACEHOLDER, add_special_tokens=False).input_ids
        self.is_slot = self.ids == token

    def __call__(self, size: int, rows: tuple[int, int] | None = None) -> PairBatch:
        """rows: of the drawings to show, from the first to before the second; None for all."""
        drawings, shares, device = self.drawings, self.shares, self.drawings.device

        def below(count: int) -> Int[Tensor, " batch"]:
            return torch.randint(count, (size,), device=device)

        def chance(share: float) -> Bool[Tensor, " batch"]:
            return torch.rand(size, device=device) < share

        first = drawings.random(size, shares.wide)
        if rows is not None:
            first = rows[0] + below(rows[1] - rows[0])
        second = drawings.random(size, shares.wide).where(chance(shares.mixed), first)
        variant = chance(shares.varied) * (1 + below(len(VARIANTS) - 1))
        whole = (first == second) & (variant == 0)
        here = torch.full_like(first, WHITE) if shares.on_white else below(len(SCENES))
        here = drawings.not_kept(first, here, whole)
        there = drawings.not_kept(first, below(len(SCENES)), whole)
        same = chance(shares.same_scene)
        seam = torch.randint(SPRITE_PX // 4, 3 * SPRITE_PX // 4, (size,), device=device)
        things = drawings.things(first, second, seam, variant)
        image = drawings.before(things, here)

        style = below(len(STYLES))
        restyled = chance(shares.restyled) & (first < drawings.small) & (first == second) & ~same
        asked = (first // len(STYLES) * len(STYLES) + style).where(restyled, first)
        restyled &= ~whole | drawings.allowed[asked, there]
        asked = asked.where(restyled, first)
        other = drawings.things(asked, second.where(first != second, asked), seam, variant)
        target = drawings.before(other, there)
        target = image.where(same[:, None, None, None], target)
        short = chance(shares.short)
        prompt = 1 + len(SCENES) * (1 + style).where(restyled, 4 * short) + there
        prompt = prompt * ~same
        n = len(drawings)
        return PairBatch(
            self.ids[prompt], self.is_slot[prompt], image, target,
            drawings.before(things, torch.full_like(here, WHITE)),
            first + n * (second + n * variant),
        )  # fmt: skip
