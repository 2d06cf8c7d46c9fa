"""Latents of the small world's pictures, and whether their cells show."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab.common.weights import load_weights
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.scenes import BOX

CELL = 16  # px, side of what one latent says


def load_autoencoder(parts: Path, device: torch.device | str = "cpu") -> PatchAutoencoder:
    """The frozen `vae` of a folder of parts, in single precision. Raises DTEError without one."""
    load = PatchAutoencoder.from_pretrained
    vae = load_weights(load, Path(parts) / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def scaled_latents(
    vae: PatchAutoencoder, x: Float[Tensor, "batch 3 64 64"]
) -> Float[Tensor, "batch channels 4 4"]:
    """Of pictures in [-1, 1], in units in which their variance is about 1."""
    return vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor


def pictures_of(
    vae: PatchAutoencoder, latents: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch 3 pixels pixels"]:
    """Undo `scaled_latents`: pictures in about [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample


def border_ratio(x: Float[Tensor, "pictures 3 64 64"]) -> Float[Tensor, " pictures"]:
    """How much more pictures change across the borders of cells than elsewhere.

    The mean absolute difference of neighbours in the sprite's box, both directions; ours.
    """
    box, across, elsewhere = x[..., BOX, BOX], 0, 0
    at = (torch.arange(BOX.start + 1, BOX.stop, device=x.device) % CELL) == 0  # (47,)
    for axis in (-1, -2):
        steps = box.diff(dim=axis).abs().mean(1).transpose(axis, -1)  # (B, 48, 47)
        across = across + steps[..., at].mean((1, 2))
        elsewhere = elsewhere + steps[..., ~at].mean((1, 2))
    return across / elsewhere
