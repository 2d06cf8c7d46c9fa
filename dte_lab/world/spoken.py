"""What the text tower says, and what it looks like: captions, and words that pictures made."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import CLIPTokenizer

from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.batches import Captions, PairBatch, PicturePairs, Shares
from dte_lab.world.drawings import Drawings, drawings_never_seen, drawings_to_train_on
from dte_lab.world.latents import load_autoencoder, scaled_latents
from dte_lab.world.word_space import PICTURE_WORDS, PictureWords

CAPTION_BANK = 200_000  # captions that are tokenized beforehand
MEASURED_EACH = 128  # samples of each kind for the log
MADE = Shares(on_white=True)  # of samples whose word a picture makes
UNSEEN_PAIRS = Shares(
    wide=0.5, mixed=0, varied=0, same_scene=0, restyled=0, short=0, on_white=True
)  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """What random batches hold."""

    captions: float  # share of a batch; in the rest, pictures make words
    wide_names: float  # share of captions that say drawings of the wide world by their names


class Spoken(NamedTuple):
    """A batch: captions, then prompts whose word v is made from a picture."""

    ids: Int[Tensor, "batch tokens"]
    is_slot: Bool[Tensor, "batch tokens"]  # where v goes; nowhere in captions
    v: Float[Tensor, "batch dim"]
    latents: Float[Tensor, "batch channels 4 4"]  # scaled, of what is said
    pictures: Float[Tensor, "batch 3 64 64"]  # of which they are, in [-1, 1]


class SpokenBatches:
    """Random batches, on the device of the drawings."""

    def __init__(
        self, tokenizer: CLIPTokenizer, drawings: Drawings, vae: PatchAutoencoder,
        picture_words: PictureWords, mixture: Mixture, seed: int = 0,
    ) -> None:  # fmt: skip
        """seed: of the bank of captions."""
        self.tokenizer, self.vae, self.picture_words = tokenizer, vae, picture_words
        self.captions = Captions(tokenizer, drawings, mixture.wide_names, CAPTION_BANK, seed)
        self.pairs, self.share = PicturePairs(tokenizer, drawings, MADE), mixture.captions

    @classmethod
    def of(
        cls, parts: Path, wide: Path, mixture: Mixture, count: int | None, seed: int,
        device: torch.device | str,
    ) -> "SpokenBatches":  # fmt: skip
        """With the vae, the tokenizer and the word space of a folder of parts.

        wide: cache of the wide world. count: of its and the small world's drawings, None for all.
        Raises DTEError for what is not there.
        """
        tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
        drawings = drawings_to_train_on(wide, count, device)
        words = PictureWords.load(parts / PICTURE_WORDS).to(device)
        return cls(tokenizer, drawings, load_autoencoder(parts, device), words, mixture, seed)

    def told(self, size: int) -> int:
        """How many of `size` samples, the first ones, are captions."""
        return min(max(1, round(size * self.share)), size - 1)

    def __call__(self, size: int) -> Spoken:
        told = self.told(size)
        return self.batch(told, self.pairs(size - told))

    def batch(self, told: int, pairs: PairBatch) -> Spoken:
        """So many random captions, and pairs of pictures."""
        ids, pictures = self.captions(told)
        v = self.picture_words(scaled_latents(self.vae, pairs.white))
        pictures = torch.cat([pictures, pairs.target])
        return Spoken(
            torch.cat([ids, pairs.ids]),
            torch.cat([torch.zeros_like(ids, dtype=torch.bool), pairs.is_slot]),
            torch.cat([v.new_zeros(told, v.shape[1]), v]),
            scaled_latents(self.vae, pictures),
            pictures,
        )

    def unseen(self, cache: Path, seed: int = 0) -> Spoken:
        """To measure with: MEASURED_EACH captions, and as many words of things never trained on.

        Raises DTEError for a cache that holds no wide world.
        """
        drawings = drawings_never_seen(cache, self.pairs.drawings.device)
        torch.manual_seed(seed)
        return self.batch(
            MEASURED_EACH, PicturePairs(self.tokenizer, drawings, UNSEEN_PAIRS)(MEASURED_EACH)
        )
