"""Train CLIP in two phases: the text tower by painting, then both towers' meeting by contrast.

dte world train clip --out DIR --parts DIR

`parts` holds the vae that was trained before.

1. Text. Words of names start where a latent semantic analysis of their pictures puts them. Then the
   tower learns to say what the picture looks like: each of its last 16 end tokens the latents of
   one cell, and the first end token the principal components of the whole, and the kind of thing.
   This is ours. It costs half of a denoiser's step and teaches more: the denoiser draws no better
   than its captions tell, and what they tell is what it learns soonest.
2. Towers. The text states are frozen. The picture tower and both projections learn to match
   pictures with captions, and with the name, style and scene among all names, styles and scenes.
"""

from pathlib import Path

from dte_lab.common.checkpoint import save_folder
from dte_lab.common.weights import load_weights
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.clip import build_image_processor, build_tokenizer
from dte_lab.world.train_text import train_text
from dte_lab.world.train_towers import train_towers
from dte_lab.world.training import PartOptions


def main(
    out: Path,
    parts: Path,
    steps: int = 10_000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    bank_size: int = 40_000,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train both phases, `steps` each; `minutes` stops the phase that is under way.

    Saves `tokenizer` and `text_encoder` to `out` after the first phase, and after the second
    `text_encoder` again (now with its projection), `image_encoder` and `feature_extractor`.
    """
    out = Path(out)
    options = PartOptions(steps, minutes, seed, batch_size, bank_size, device, mixed_precision)
    tokenizer = build_tokenizer()
    vae = load_weights(PatchAutoencoder.from_pretrained, Path(parts) / "vae")
    text = train_text(out / "text", tokenizer, vae.eval().to(device), options)
    tokenizer.save_pretrained(out / "tokenizer")
    save_folder(text, out / "text_encoder")
    text = text.requires_grad_(False)
    towers = train_towers(out / "towers", tokenizer, text, options)
    text.text_projection = towers.projection
    save_folder(text, out / "text_encoder")
    save_folder(towers.image, out / "image_encoder")
    build_image_processor().save_pretrained(out / "feature_extractor")
