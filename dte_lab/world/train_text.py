"""Train the text tower anew in a word space of pictures: it learns to paint.

dte world train text --out DIR --parts DIR --wide CACHE

`parts` holds the vae that was trained before. The tower starts in closed form (see word_space and
painter). Then it says the latents of dictionary captions and of words made from pictures, cell by
cell. There is no network that makes words: that of a picture is linear. It costs half of a
denoiser's step and teaches more: the denoiser draws no better than its captions tell, and what they
tell is what it learns soonest. Ours.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTokenizer

from dte_lab.common.checkpoint import CHECKPOINT, save_folder
from dte_lab.common.files import write_atomically
from dte_lab.world.batches import PLACEHOLDER, wide_words
from dte_lab.world.captions import caption
from dte_lab.world.clip import build_text_tower, build_tokenizer
from dte_lab.world.data import save_pairs
from dte_lab.world.drawings import WHITE, Drawings, drawings_to_train_on
from dte_lab.world.latents import load_autoencoder, pictures_of, scaled_latents
from dte_lab.world.options import PartOptions
from dte_lab.world.painter import TextPainter, start_painter
from dte_lab.world.scenes import SCENES
from dte_lab.world.spoken import Mixture, Spoken, SpokenBatches
from dte_lab.world.sprites import STYLES
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.word_space import CODE, PICTURE_WORDS, PictureWords, start_words
from dte_lab.world.words import WORDS_FILE, grammar_words

PAINTED = Mixture(captions=0.4, wide_names=0.4)
FITTED = 2000  # drawings that the start is fitted on
TRAIN_WEIGHT = 4.0  # of a train thing's name at the start; a wide drawing's counts 1


def latents_of(
    batches: SpokenBatches, rows: Int[Tensor, " n"], scene: Int[Tensor, " n"]
) -> Float[Tensor, "n channels 4 4"]:
    """Of whole drawings in scenes."""
    parts = zip(rows.split(128), scene.split(128), strict=True)
    show = batches.pairs.drawings.plain
    return torch.cat([scaled_latents(batches.vae, show(*part)) for part in parts])


def fit_picture_words(vae: torch.nn.Module, drawings: Drawings) -> PictureWords:
    """On FITTED random drawings on white."""
    rows = torch.randperm(len(drawings))[:FITTED].to(drawings.device)
    parts = [drawings.plain(part, torch.full_like(part, WHITE)) for part in rows.split(128)]
    return PictureWords.fit(torch.cat([scaled_latents(vae, x) for x in parts]))


@torch.no_grad()
def start_text(painter: TextPainter, batches: SpokenBatches) -> list[float]:
    """Start words and tower in closed form; returns what `start_painter` does."""
    drawings, named = batches.pairs.drawings, batches.captions.named
    tokenizer = batches.tokenizer
    small = len(STYLES) * len(drawings.train_names)
    rows = torch.tensor([*range(small), *named], device=drawings.device)
    on_white = latents_of(batches, rows, torch.full_like(rows, WHITE))
    codes = batches.picture_words(on_white)[:, :CODE]
    of_train = codes[:small].unflatten(0, (-1, len(STYLES))).mean(1)
    weights = codes.new_ones(len(of_train) + len(named))
    weights[: len(of_train)] = TRAIN_WEIGHT
    names = drawings.train_names + [drawings.wide[i - drawings.small].name for i in named]
    texts = [caption(PLACEHOLDER, style, scene) for style in STYLES for scene in SCENES]
    texts += sorted({f"{d.colour or ''} {d.style}" for d in drawings.wide}) + ["an of , ."]
    start_words(
        painter.text,
        tokenizer(names, add_special_tokens=False).input_ids,
        torch.cat([of_train, codes[small:]]),
        weights,
        set(sum(tokenizer(texts).input_ids, [])),
    )
    rows = torch.randperm(len(drawings))[:FITTED].to(drawings.device)
    scene = torch.randint(len(SCENES), rows.shape, device=rows.device)
    scene = drawings.not_kept(rows, scene, torch.ones_like(rows, dtype=torch.bool))
    v = batches.picture_words(latents_of(batches, rows, torch.full_like(rows, WHITE)))
    prompt = 1 + scene  # "a picture of S*" in it
    ids, is_slot = batches.pairs.ids[prompt], batches.pairs.is_slot[prompt]
    which = batches.captions.random(len(rows) // 2)
    said = batches.captions.ids[which]
    target = latents_of(batches, batches.captions.rows[which], batches.captions.scenes[which])
    return start_painter(
        painter,
        torch.cat([ids, said]),
        torch.cat([is_slot, torch.zeros_like(said, dtype=torch.bool)]),
        torch.cat([v, v.new_zeros(len(said), v.shape[1])]),
        torch.cat([latents_of(batches, rows, scene), target]),
    )


@dataclass
class TextTraining:
    """What `train` calls: the error of what random batches paint, and of a fixed one, `test`."""

    batches: SpokenBatches
    test: Spoken
    batch_size: int
    out: Path

    def errors(self, painter: TextPainter, batch: Spoken) -> Float[Tensor, " batch"]:
        """Mean squared error of the latents that each sample paints."""
        painted = painter.paint(painter.states(batch.ids, batch.is_slot, batch.v))
        return (painted - batch.latents).square().mean((1, 2, 3))

    @contextmanager
    def loss(self, painter: TextPainter) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        error = self.errors(painter, self.batches(self.batch_size))
        told = self.batches.told(self.batch_size)
        yield error.mean(), {"captions": error[:told].mean(), "pictures": error[told:].mean()}

    def sample(self, painter: TextPainter, step: int) -> dict[str, float]:
        error, half = self.errors(painter, self.test), len(self.test.ids) // 2
        shown = Spoken(*(torch.cat([x[:half][:24], x[half:][:24]]) for x in self.test))
        painted = painter.paint(painter.states(shown.ids, shown.is_slot, shown.v))
        pairs = (pictures_of(self.batches.vae, z) for z in (shown.latents, painted))
        save_pairs(self.out / "samples.png", *pairs)
        halves = {"captions": error[:half], "unseen": error[half:]}
        return {f"test_{name}": values.mean().item() for name, values in halves.items()}


def main(
    out: Path,
    parts: Path,
    wide: Path,
    steps: int = 2600,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 128,
    count: int | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train the tower; save `tokenizer`, `text_encoder`, its reader, the map of pictures to words
    and `words.json`, the words that captions say, to `out`.

    wide: cache of the wide world. count: of its and the small world's drawings, None for all.
    """
    options = PartOptions(steps, minutes, seed, batch_size, count, device, mixed_precision)
    device = options.device
    out = Path(out)
    vae = load_autoencoder(parts, device)
    drawings = drawings_to_train_on(wide, count, device)
    torch.manual_seed(seed)
    begun = (out / CHECKPOINT).exists()
    if not begun:
        save_folder(build_tokenizer(wide_words(drawings.wide)), out / "tokenizer")
        fit_picture_words(vae, drawings).save(out / PICTURE_WORDS)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    words = PictureWords.load(out / PICTURE_WORDS).to(device)
    batches = SpokenBatches(tokenizer, drawings, vae, words, PAINTED, seed)
    painter = TextPainter(build_text_tower(tokenizer), vae.config.patch_channels * 4).to(device)
    if not begun:
        errors = start_text(painter, batches)
        print("squared error of latents, layer by layer of the start:", errors)
    training = TextTraining(batches, batches.unseen(wide), batch_size, out)
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=3e-4,
        muon_learning_rate=6e-4,
        warmup_steps=50,
        decay_fraction=0.3,
        ema_decay=0.99,
        mixed_precision=mixed_precision,
        seed=seed,
        sample_every=200,
    )
    settings = options.settings("text")
    average = train(out, painter, config, training.loss, training.sample, minutes, device, settings)
    average.save(out)
    known = sorted({*grammar_words(), *batches.captions.words()})
    write_atomically(out / WORDS_FILE, json.dumps(known).encode())
