"""Train the autoencoder's decoder further, on what the denoiser of the base model draws.

dte world train decoder --out DIR --parts DIR --wide CACHE

A denoiser errs differently from cell to cell, so that its drawings of unseen things are mosaics. It
is given noisy latents of pictures, and told what they show; of the latents that it makes of them
the decoder learns to paint the pictures themselves. Latents stay what other parts have learned
from: the encoder is frozen. (ours; Stable Diffusion's decoder was trained on clean latents)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from dte_lab.common.checkpoint import save_folder
from dte_lab.common.stats import psnr
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.data import random_batch, save_pairs
from dte_lab.world.latents import CELL, border_ratio, load_autoencoder, pictures_of, scaled_latents
from dte_lab.world.options import PartOptions
from dte_lab.world.painter import TextPainter
from dte_lab.world.spoken import Mixture, Spoken, SpokenBatches
from dte_lab.world.train_autoencoder import random_pictures, reconstruction_loss, white_noise
from dte_lab.world.train_unet import NoiseLevels, load_unet
from dte_lab.world.training import TrainConfig, train

TOLD = Mixture(captions=0.2, wide_names=0.3)  # words of pictures draw as unseen things do
REDRAWN = 0.5  # of a batch; the others are pictures with a little white noise on their latents
LEAST_NOISE = 250  # of 1,000: with less the denoiser copies
ROUNDS = 4  # steps of DDIM
BORDER_WEIGHT = 2.0  # of changes across the borders of cells, added to the 1 of all changes


@dataclass
class Redrawing:
    """Pictures that the denoiser draws again from some noise, told what they show."""

    batches: SpokenBatches
    levels: NoiseLevels
    unet: UNet2DConditionModel
    painter: TextPainter

    def __call__(
        self, size: int
    ) -> tuple[Float[Tensor, "batch channels 4 4"], Float[Tensor, "batch 3 64 64"]]:
        """Latents with its errors, and the pictures, in [-1, 1]."""
        batch = self.batches(size)
        return self.redrawn(batch), batch.pictures

    @torch.no_grad()
    def redrawn(self, batch: Spoken) -> Float[Tensor, "batch channels 4 4"]:
        """DDIM (arXiv 2010.02502, eq. 12 without noise) from a random level of noise to none."""
        states = self.painter.states(batch.ids, batch.is_slot, batch.v)
        alphas = self.levels.scheduler.alphas_cumprod
        share = torch.rand(len(states), device=states.device)
        start = (LEAST_NOISE + (len(alphas) - LEAST_NOISE) * share).long()
        t, x = start, self.levels.noised(batch.latents, start)[0]
        for left in reversed(range(ROUNDS)):
            a, b = self.amounts(alphas, t)
            v = self.unet(x, t, states).sample
            clean, noise = a * x - b * v, b * x + a * v
            t = start * left // ROUNDS
            a, b = self.amounts(alphas, t)
            x = a * clean + b * noise
        return clean

    @staticmethod
    def amounts(
        alphas: Float[Tensor, " levels"], t: Tensor
    ) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
        """What of a picture, and what of noise, is in x at t."""
        a = alphas[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()


def border_loss(
    x: Float[Tensor, "batch 3 height width"], y: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """L1 of the changes across the borders of cells; a mean over all changes."""
    loss = x.new_zeros(())
    for axis in (-1, -2):
        error = (x.diff(dim=axis) - y.diff(dim=axis)).abs()
        at = torch.arange(CELL - 1, error.shape[axis], CELL, device=x.device)
        loss = loss + error.index_select(axis, at).sum() / error.numel()
    return 0.5 * loss


@dataclass
class DecoderTraining:
    """What `train` calls: the loss of random pictures, and how well it does on others.

    held: latents and pictures of a `Redrawing` of things never seen. x_val: in [-1, 1].
    """

    redrawing: Redrawing
    held: tuple[Float[Tensor, "pictures channels 4 4"], Float[Tensor, "pictures 3 64 64"]]
    x_val: Float[Tensor, "pictures 3 64 64"]
    batch_size: int
    out: Path

    @contextmanager
    def loss(self, model: PatchAutoencoder) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        z, x = self.redrawing(redrawn := max(1, round(REDRAWN * self.batch_size)))
        drawings = self.redrawing.batches.pairs.drawings
        plain = random_pictures(drawings, self.batch_size - redrawn)
        clean = scaled_latents(model, plain)
        y = pictures_of(model, torch.cat([z, clean + white_noise(clean)]))
        x = torch.cat([x, plain])
        loss = reconstruction_loss(x, y) + BORDER_WEIGHT * border_loss(x, y)
        yield loss, {"redrawn": nn.functional.l1_loss(x[:redrawn], y[:redrawn])}

    def sample(self, model: PatchAutoencoder, step: int) -> dict[str, float]:
        latents, pictures = self.held
        y = pictures_of(model, latents)
        save_pairs(self.out / "samples.png", pictures[:24], y[:24])
        plain = pictures_of(model, scaled_latents(model, self.x_val))
        return {
            "val_psnr": psnr(plain, self.x_val),
            "redrawn_psnr": psnr(y, pictures),
            "border_ratio": border_ratio(y).mean().item(),
            "border_ratio_true": border_ratio(pictures).mean().item(),
        }


def main(
    out: Path,
    parts: Path,
    wide: Path,
    steps: int = 300,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    count: int | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train, and save the EMA weights to `out/vae` in the diffusers layout.

    parts: a base model. wide: cache of the wide world. count: of its and the small world's
    drawings, None for all.
    """
    options = PartOptions(steps, minutes, seed, batch_size, count, device, mixed_precision)
    device, out, parts = options.device, Path(out), Path(parts)
    painter = TextPainter.load(parts).to(device)
    batches = SpokenBatches.of(parts, wide, TOLD, count, seed, device)
    redrawing = Redrawing(batches, NoiseLevels(device), load_unet(parts).to(device), painter)
    unseen = batches.unseen(wide)
    held = redrawing.redrawn(unseen), unseen.pictures
    x_val, _, _ = random_batch(np.random.default_rng(10_000), 240, "val")
    training = DecoderTraining(redrawing, held, x_val.to(device), batch_size, out)
    model = load_autoencoder(parts, device)
    model.decoder.requires_grad_(True)
    model.linear_decode.requires_grad_(True)
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=3e-4,
        muon_learning_rate=1e-3,
        warmup_steps=30,
        decay_fraction=0.4,
        ema_decay=0.99,
        mixed_precision=mixed_precision,
        seed=seed,
        sample_every=100,
    )
    settings = options.settings("decoder")
    model = train(out, model, config, training.loss, training.sample, minutes, device, settings)
    save_folder(model.cpu(), out / "vae")
