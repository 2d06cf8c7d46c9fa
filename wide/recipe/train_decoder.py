"""Train the decoder alone further, on latents with the errors that a denoiser makes.

    dte world train decoder --out DIR --parts DIR --wide CACHE

The latents stay what they are. A denoiser errs alike in the four patches of a cell of 16 px, and
differently from cell to cell, so what it draws of unseen things is a mosaic. Here the decoder sees
such errors, and learns to smooth the borders of cells where they are nobody's edges.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.data import picture_grid
from dte_lab.world.scenes import BOX
from dte_lab.world.train_autoencoder import psnr, reconstruction_loss
from dte_lab.world.train_words import scaled_latents
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide_batches import WideBatches

CELL = 16  # px
LOUDEST = 0.5  # std of the strongest noise, in units of scaled latents


def denoiser_noise(z: Tensor, loudest: float = LOUDEST) -> Tensor:
    """Noise like scaled latents z (B, 96, 4, 4), of another strength for each picture.

    Half of its variance is shared by the four patches of a cell: channel c of a patch is channels
    4 c to 4 c + 3 of a latent, as pixel_unshuffle lays them.
    """
    B, C, h, w = z.shape
    shared = torch.randn(B, C // 4, 1, h, w, device=z.device).expand(-1, -1, 4, -1, -1)
    own = torch.randn_like(z)
    strength = loudest * torch.rand(B, 1, 1, 1, device=z.device) ** 2
    share = torch.rand(B, 1, 1, 1, device=z.device)
    return strength * (share.sqrt() * shared.flatten(1, 2) + (1 - share).sqrt() * own)


def border_ratio(x: Tensor) -> Tensor:
    """How much more pictures (B, 3, 64, 64) change across borders of cells than elsewhere, (B,).

    Mean absolute difference of neighbours in the sprite's box, both directions.
    """
    box = x[..., BOX, BOX]
    across, elsewhere = [], []
    for axis in (-1, -2):
        steps = box.diff(dim=axis).abs().mean(1).transpose(axis, -1)  # (B, 48, 47)
        at = (torch.arange(47) + BOX.start + 1) % CELL == 0
        across.append(steps[..., at].flatten(1).mean(1))
        elsewhere.append(steps[..., ~at].flatten(1).mean(1))
    return sum(across) / sum(elsewhere)


def decoder_only(vae: PatchAutoencoder) -> PatchAutoencoder:
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.linear_decode.requires_grad_(True)
    return vae


def main(
    out: Path,
    parts: Path,
    wide=None,
    steps: int = 2000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    loudest: float = LOUDEST,
) -> PatchAutoencoder:
    """Train and save the EMA weights to `out/vae`."""
    from transformers import CLIPTokenizer

    out, parts = Path(out), Path(parts)
    out.mkdir(parents=True, exist_ok=True)
    batches = WideBatches(CLIPTokenizer.from_pretrained(parts / "tokenizer"), wide)
    batches.shares.mixed = 0.0  # a seam is not a drawing's edge
    vae = decoder_only(PatchAutoencoder.from_pretrained(parts / "vae"))

    def loss(vae: PatchAutoencoder) -> tuple[Tensor, dict]:
        x = batches._made(batch_size).target
        z = scaled_latents(vae, x)
        y = vae.decode((z + denoiser_noise(z, loudest)) / vae.config.scaling_factor).sample
        return reconstruction_loss(x, y), {}

    torch.manual_seed(1)
    x_test = batches._made(64).target

    def sample(vae: PatchAutoencoder, step: int) -> dict[str, float]:
        z, measures = scaled_latents(vae, x_test), {"ratio_true": border_ratio(x_test).mean()}
        torch.manual_seed(0)
        for name, noise in (("clean", 0), ("noisy", denoiser_noise(z, 0.3))):
            y = vae.decode((z + noise) / vae.config.scaling_factor).sample
            measures[f"psnr_{name}"] = psnr(y, x_test)
            measures[f"ratio_{name}"] = border_ratio(y).mean()
        both = torch.stack([x_test, y], 1).flatten(0, 1)[:96]
        Image.fromarray(picture_grid(both, 12)).save(out / "samples.png")
        return {k: float(v) for k, v in measures.items()}

    config = TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=3e-4, muon_learning_rate=1e-3,
        warmup_steps=50, seed=seed, log_every=20, sample_every=50, ema_decay=0.995, mixed_precision="bf16",
    )  # fmt: skip
    vae = train(out, vae, config, loss, sample, minutes)
    vae.save_pretrained(out / "vae")
    return vae
