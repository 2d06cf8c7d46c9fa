"""Train the autoencoder: L1 plus gradient loss, with noise on the latents.

dte world train autoencoder --out DIR [--wide CACHE]

Once there is a denoiser, `train_decoder` makes its decoder better.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dte_lab.common.checkpoint import save_folder
from dte_lab.common.stats import psnr
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.data import random_batch, save_pairs
from dte_lab.world.drawings import Drawings, drawings_to_train_on
from dte_lab.world.latents import border_ratio, pictures_of, scaled_latents
from dte_lab.world.options import PartOptions
from dte_lab.world.pairs import VARIANTS
from dte_lab.world.scenes import SCENES
from dte_lab.world.training import TrainConfig, train

LATENT_NOISE = 0.08  # std of the noise on latents of unit variance: the denoiser is never exact
GRADIENT_WEIGHT = 0.5
WIDE_SHARE, VARIED_SHARE = 0.6, 0.5  # of pictures: of the wide world; mirrored, turned, recoloured


def reconstruction_loss(
    x: Float[Tensor, "batch 3 height width"], y: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """L1 of pixels plus L1 of their horizontal and vertical differences (keeps edges sharp)."""
    loss = nn.functional.l1_loss(x, y)
    for axis in (-1, -2):
        loss = loss + GRADIENT_WEIGHT * nn.functional.l1_loss(x.diff(dim=axis), y.diff(dim=axis))
    return loss


def white_noise(
    z: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    return LATENT_NOISE * torch.randn_like(z)


def random_pictures(drawings: Drawings, size: int) -> Float[Tensor, "batch 3 64 64"]:
    """Random drawings in random scenes, in [-1, 1], some of them varied.

    Unseen things need an autoencoder that knows more than the training things.
    """
    device, rows = drawings.device, drawings.random(size, WIDE_SHARE)
    zero = torch.zeros_like(rows)
    variant = torch.randint(len(VARIANTS), (size,), device=device)
    variant = variant.where(torch.rand(size, device=device) < VARIED_SHARE, zero)
    scene = torch.randint(len(SCENES), (size,), device=device)
    scene = drawings.not_kept(rows, scene, variant == 0)
    return drawings.before(drawings.things(rows, rows, zero, variant), scene)


@torch.no_grad()
def scale_latents(model: PatchAutoencoder, x: Float[Tensor, "pictures 3 height width"]) -> None:
    """Set the scaling factor so that the latents of x have unit variance."""
    model.register_to_config(scaling_factor=1 / model.encode(x).latent_dist.mode().std().item())


@dataclass
class AutoencoderTraining:
    """What `train` calls: the loss of random pictures, and how well it does on others.

    x_val: in [-1, 1].
    """

    drawings: Drawings
    x_val: Float[Tensor, "pictures 3 64 64"]
    batch_size: int
    out: Path

    @contextmanager
    def loss(self, model: PatchAutoencoder) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        x = random_pictures(self.drawings, self.batch_size)
        z = model.encode(x).latent_dist.mode() * model.config.scaling_factor
        yield reconstruction_loss(pictures_of(model, z + white_noise(z)), x), {}

    def sample(self, model: PatchAutoencoder, step: int) -> dict[str, float]:
        z = scaled_latents(model, self.x_val)
        y = pictures_of(model, z)
        save_pairs(self.out / "samples.png", self.x_val[:24], y[:24])
        return {
            "val_psnr": psnr(y, self.x_val),
            "latent_std": z.std().item(),
            "border_ratio": border_ratio(y).mean().item(),
            "border_ratio_true": border_ratio(self.x_val).mean().item(),
        }


def main(
    out: Path,
    wide: Path | None = None,
    steps: int = 20_000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    count: int | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train and save the EMA weights to `out/vae` in the diffusers layout.

    wide: cache of the wide world, or None for the small world alone. count: of its and the small
    world's drawings, None for all.
    """
    options = PartOptions(steps, minutes, seed, batch_size, count, device, mixed_precision)
    device = options.device
    out = Path(out)
    torch.manual_seed(seed)
    drawings = drawings_to_train_on(wide, count, device)
    x = random_pictures(drawings, 1024).cpu()
    model = PatchAutoencoder()
    model.initialise_from_pca(x)
    scale_latents(model, x)
    x_val, _, _ = random_batch(np.random.default_rng(10_000), 240, "val")
    training = AutoencoderTraining(drawings, x_val.to(device), batch_size, out)
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
    settings = options.settings("autoencoder")
    model = train(out, model, config, training.loss, training.sample, minutes, device, settings)
    model = model.cpu()
    scale_latents(model, x)  # training lets them grow, away from the noise
    save_folder(model, out / "vae")
