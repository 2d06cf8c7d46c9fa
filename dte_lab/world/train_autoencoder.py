"""Train the autoencoder: L1 plus gradient loss, with noise on the latents.

dte world train autoencoder --out DIR [--parts DIR]

With `parts`, which holds a vae, only its decoder is trained further: its latents stay what other
parts have learned from.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dte_lab.common.stats import psnr
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.data import (
    from_bytes,
    picture_bank,
    picture_grid,
    random_batch,
    random_items,
    random_rows,
)
from dte_lab.world.training import TrainConfig, train

LATENT_NOISE = 0.08  # std of the noise on latents of unit variance: the denoiser is never exact
GRADIENT_WEIGHT = 0.5


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 of pixels plus L1 of their horizontal and vertical differences (keeps edges sharp)."""
    loss = nn.functional.l1_loss(x, y)
    for axis in (-1, -2):
        loss = loss + GRADIENT_WEIGHT * nn.functional.l1_loss(x.diff(dim=axis), y.diff(dim=axis))
    return loss


def varied(x: Tensor) -> Tensor:
    """Half of the pictures (B, 3, 64, 64) mirrored, half turned, half with colours exchanged.

    Unseen things need an autoencoder that knows more than the training things.
    """

    def half() -> Tensor:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5

    x = torch.where(half(), x.flip(3), x)
    x = torch.where(half(), x.mT, x)
    return torch.where(half(), x.roll(1, dims=1), x)


@torch.no_grad()
def scale_latents(model: PatchAutoencoder, x: Tensor) -> None:
    """Set the scaling factor so that the latents of x (B, 3, 64, 64) have unit variance."""
    model.register_to_config(scaling_factor=1 / model.encode(x).latent_dist.mode().std().item())


def main(
    out: Path,
    parts: Path | None = None,
    steps: int = 20_000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    bank_size: int = 40_000,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train and save the EMA weights to `out/vae` in the diffusers layout."""
    torch.manual_seed(seed)
    bank = picture_bank(random_items(np.random.default_rng(seed), bank_size)).to(device)
    x = from_bytes(bank[:1024]).cpu()
    if parts is None:
        model = PatchAutoencoder()
        model.initialise_from_pca(x)
        scale_latents(model, x)
    else:
        model = PatchAutoencoder.from_pretrained(Path(parts) / "vae")
        model.encoder.requires_grad_(False)
        model.linear_encode.requires_grad_(False)
    noise = LATENT_NOISE / model.config.scaling_factor
    x_val, _, _ = random_batch(np.random.default_rng(10_000), 240, "val")
    x_val = x_val.to(device)

    def loss(model: PatchAutoencoder) -> tuple[Tensor, dict]:
        x = varied(from_bytes(bank[random_rows(bank, batch_size)]))
        z = model.encode(x).latent_dist.mode()
        value = reconstruction_loss(model.decode(z + noise * torch.randn_like(z)).sample, x)
        return value, {}

    def sample(model: PatchAutoencoder, step: int) -> dict[str, float]:
        z = model.encode(x_val).latent_dist.mode()
        y = model.decode(z).sample
        grid = torch.stack([x_val[:24], y[:24]], 1).flatten(0, 1)
        Image.fromarray(picture_grid(grid, 12)).save(out / "samples.png")
        std = (z.std() * model.config.scaling_factor).item()
        return {"val_psnr": psnr(y, x_val), "latent_std": std}

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        warmup_steps=100,
        mixed_precision=mixed_precision,
        seed=seed,
        sample_every=200,
    )
    model = train(Path(out), model, config, loss, sample, minutes, device).cpu()
    if parts is None:
        scale_latents(model, x)  # training lets them grow, away from the noise
    model.save_pretrained(Path(out) / "vae")
