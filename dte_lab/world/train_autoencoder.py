"""Train the autoencoder: L1 plus gradient loss, with noise on the latents.

dte world train autoencoder --out DIR [--parts DIR]

With `parts`, which holds a vae, only its decoder is trained further: its latents stay what other
parts have learned from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from dte_lab.common.checkpoint import save_folder
from dte_lab.common.images import save_png
from dte_lab.common.stats import psnr
from dte_lab.common.weights import load_weights
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.data import (
    from_bytes,
    picture_bank,
    pixel_grid,
    random_batch,
    random_items,
    random_rows,
)
from dte_lab.world.training import PartOptions, TrainConfig, train

LATENT_NOISE = 0.08  # std of the noise on latents of unit variance: the denoiser is never exact
GRADIENT_WEIGHT = 0.5


def reconstruction_loss(
    x: Float[Tensor, "batch 3 height width"], y: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """L1 of pixels plus L1 of their horizontal and vertical differences (keeps edges sharp)."""
    loss = nn.functional.l1_loss(x, y)
    for axis in (-1, -2):
        loss = loss + GRADIENT_WEIGHT * nn.functional.l1_loss(x.diff(dim=axis), y.diff(dim=axis))
    return loss


def varied(x: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
    """Half of the pictures mirrored, half turned, half with colours exchanged.

    Unseen things need an autoencoder that knows more than the training things.
    """

    def half() -> Bool[Tensor, "batch 1 1 1"]:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5

    x = torch.where(half(), x.flip(3), x)
    x = torch.where(half(), x.mT, x)
    return torch.where(half(), x.roll(1, dims=1), x)


@torch.no_grad()
def scale_latents(model: PatchAutoencoder, x: Float[Tensor, "pictures 3 height width"]) -> None:
    """Set the scaling factor so that the latents of x have unit variance."""
    model.register_to_config(scaling_factor=1 / model.encode(x).latent_dist.mode().std().item())


class AutoencoderTraining:
    """What `train` calls: the loss of random pictures of a bank, and how well it does on others.

    bank: bytes of N pictures. noise: standard deviation on unscaled latents. x_val: in [-1, 1].
    """

    def __init__(
        self,
        bank: UInt8[Tensor, "items 3 height width"],
        noise: float,
        x_val: Float[Tensor, "pictures 3 height width"],
        batch_size: int,
        out: Path,
    ) -> None:
        self.bank, self.noise, self.x_val = bank, noise, x_val
        self.batch_size, self.out = batch_size, out

    @contextmanager
    def loss(self, model: PatchAutoencoder) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        x = varied(from_bytes(self.bank[random_rows(self.bank, self.batch_size)]))
        z = model.encode(x).latent_dist.mode()
        y = model.decode(z + self.noise * torch.randn_like(z)).sample
        yield reconstruction_loss(y, x), {}

    def sample(self, model: PatchAutoencoder, step: int) -> dict[str, float]:
        z = model.encode(self.x_val).latent_dist.mode()
        y = model.decode(z).sample
        grid = pixel_grid(torch.stack([self.x_val[:24], y[:24]], 1).flatten(0, 1), 12)
        save_png(Image.fromarray(grid), self.out / "samples.png")
        std = (z.std() * model.config.scaling_factor).item()
        return {"val_psnr": psnr(y, self.x_val), "latent_std": std}


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
    options = PartOptions(steps, minutes, seed, batch_size, bank_size, device, mixed_precision)
    out = Path(out)
    torch.manual_seed(seed)
    bank = picture_bank(random_items(np.random.default_rng(seed), bank_size)).to(device)
    x = from_bytes(bank[:1024]).cpu()
    if parts is None:
        model = PatchAutoencoder()
        model.initialise_from_pca(x)
        scale_latents(model, x)
    else:
        model = load_weights(PatchAutoencoder.from_pretrained, Path(parts) / "vae")
        model.encoder.requires_grad_(False)
        model.linear_encode.requires_grad_(False)
    x_val, _, _ = random_batch(np.random.default_rng(10_000), 240, "val")
    noise = LATENT_NOISE / model.config.scaling_factor
    training = AutoencoderTraining(bank, noise, x_val.to(device), batch_size, out)
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
    settings = options.settings("autoencoder" if parts is None else "decoder")
    model = train(out, model, config, training.loss, training.sample, minutes, device, settings)
    model = model.cpu()
    if parts is None:
        scale_latents(model, x)  # training lets them grow, away from the noise
    save_folder(model, out / "vae")
