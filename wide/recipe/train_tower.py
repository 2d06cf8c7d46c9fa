"""Train a text tower anew in the word space of pictures (see word_space).

It says the latents of dictionary captions and of words made from pictures, cell by cell. There is
no network that makes words: the word of a picture is linear in the latents of its thing on white.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dte_lab.world.captions import caption
from dte_lab.world.clip import build_text_tower, build_tokenizer
from dte_lab.world.data import picture_grid
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES
from dte_lab.world.train_words import Words, load_parts, scaled_latents
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide_batches import Batch, Composer, Shares, WideBatches, wide_words
from dte_lab.world.word_space import CODE, PictureWords, start_painter, start_words

FITTED = 2000  # drawings that the start is fitted on
WHITE = SCENES.index("white")


class Examples:
    """Latents of drawings on white and in a random scene, (n, 96, 4, 4) each."""

    @torch.no_grad()
    def __init__(self, vae, compose: Composer, rows: Tensor):
        def latents(scene: Tensor) -> Tensor:
            things = compose.rgba[rows].float() / 255
            parts = zip(things.split(128), scene.split(128), strict=True)
            return torch.cat([scaled_latents(vae, compose(*part)) for part in parts])

        self.scene = torch.randint(len(SCENES), rows.shape)
        self.white, self.target = latents(torch.full_like(rows, WHITE)), latents(self.scene)


def build(tokenizer, vae, batches: WideBatches, count: int = FITTED) -> tuple[Words, PictureWords]:
    """A tower that starts as `word_space` says, fitted on `count` drawings."""
    rows = torch.randperm(batches.count)[:count]
    examples = Examples(vae, batches.compose, rows)
    picture_words = PictureWords.fit(examples.white)
    train_rows = torch.arange(3 * len(batches.train))
    white = Examples(vae, batches.compose, train_rows).white
    codes = picture_words(white)[:, :CODE].unflatten(0, (-1, len(STYLES))).mean(1)
    named = torch.tensor(batches.named)
    codes = torch.cat([codes, picture_words(Examples(vae, batches.compose, named).white)[:, :CODE]])
    wide_names = [batches.drawings[i - batches.small].name for i in batches.named]
    weights = torch.cat([torch.full((len(batches.train),), 4.0), torch.ones(len(named))])
    texts = [caption("thing", style, scene) for style in STYLES for scene in SCENES]
    styles = sorted({f"{d.colour or ''} {d.style}" for d in batches.drawings})
    grammar = set(sum(tokenizer([*texts, *styles, "an of , ."]).input_ids, []))
    names = tokenizer(batches.train + wide_names, add_special_tokens=False).input_ids
    text = build_text_tower(tokenizer)
    start_words(text, names, codes, grammar, weights)
    model = Words(text, None, vae.config.patch_channels * 4)
    prompt = 1 + examples.scene
    v = picture_words(examples.white)
    ids, pictures = batches._dictionary(count // 2)
    with torch.no_grad():
        told = torch.cat([scaled_latents(vae, x) for x in pictures.split(128)])
    nowhere, nothing = torch.zeros_like(ids, dtype=torch.bool), v.new_zeros(len(ids), v.shape[1])
    errors = start_painter(
        model,
        torch.cat([batches.prompts[prompt], ids]),
        torch.cat([batches.slots[prompt], nowhere]),
        torch.cat([v, nothing]),
        torch.cat([examples.target, told]),
    )
    print("mean squared error of latents after each layer of the start:", errors)
    return model, picture_words


def main(
    out: Path,
    parts: Path,
    wide=None,
    steps: int = 4000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 96,
    shares: Shares | None = None,
    learning_rate: float = 1e-4,
    muon_learning_rate: float = 2e-4,
    decay_fraction: float = 0.3,
    mixed_precision: str = "bf16",
) -> Words:
    """Train and save the EMA tower to `out/text_encoder`; the word map to `out/words.pt`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    vae, _, _ = load_parts(Path(parts))
    tokenizer = build_tokenizer(wide_words(wide))
    tokenizer.save_pretrained(out / "tokenizer")
    vae = vae.to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    batches = WideBatches(tokenizer, wide, shares)
    started = out / "start.pt"
    if not started.exists():
        model, words = build(tokenizer, vae, batches)
        torch.save({"model": model.state_dict(), "words": (words.mean, words.basis)}, started)
    state = torch.load(started)
    words = PictureWords(*state["words"])
    model = Words(build_text_tower(tokenizer), None, vae.config.patch_channels * 4)
    model.load_state_dict(state["model"])
    model.text.text_projection.requires_grad_(False)

    def said(model: Words, batch: Batch) -> Tensor:
        v = words(scaled_latents(vae, batch.image))
        some = v.new_zeros(len(batch.ids) - len(v), v.shape[1])
        return model.states(batch.ids, batch.is_slot, torch.cat([some, v]))

    def loss(model: Words) -> tuple[Tensor, dict]:
        batch = batches(batch_size)
        truth = scaled_latents(vae, batch.target)
        error = (model.paint(said(model, batch)) - truth).pow(2).mean((1, 2, 3))
        made = len(batch.image)
        return error.mean(), {"dictionary": error[:-made].mean(), "made": error[-made:].mean()}

    torch.manual_seed(1)
    shown = batches(48)

    def sample(model: Words, step: int) -> dict[str, float]:
        drawn = vae.decode(model.paint(said(model, shown)) / vae.config.scaling_factor).sample
        both = torch.stack([shown.target, drawn], 1).flatten(0, 1)
        Image.fromarray(picture_grid(both, 12)).save(out / "samples.png")
        return {}

    config = TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate,
        muon_learning_rate=muon_learning_rate, warmup_steps=20, decay_fraction=decay_fraction,
        ema_decay=0.99, seed=seed, log_every=10, sample_every=50, checkpoint_minutes=4,
        mixed_precision=mixed_precision,
    )  # fmt: skip
    ema = train(out, model, config, loss, sample, minutes)
    ema.text.save_pretrained(out / "text_encoder")
    return ema
