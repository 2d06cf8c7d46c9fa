"""Random pictures and captions of the small world, as tensors."""

import numpy as np
import torch
from torch import Tensor

from dte_lab.world.captions import held_out, random_caption
from dte_lab.world.scenes import SCENES, render
from dte_lab.world.sprites import STYLES, concepts, split_names


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def random_item(rng: np.random.Generator, names: list[str]) -> tuple[str, str, str, int]:
    """A (concept, style, scene, seed) that is not a held-out combination."""
    while True:
        name, style = names[rng.integers(len(names))], STYLES[rng.integers(len(STYLES))]
        scene = SCENES[rng.integers(len(SCENES))]
        if not held_out(name, style, scene):
            return name, style, scene, int(rng.integers(1 << 31))


def random_captions(
    rng: np.random.Generator, size: int, split: str = "train"
) -> tuple[list[str], list[tuple[str, str, str, int]]]:
    """Captions, and what each describes: (concept, style, scene, seed)."""
    names = split_names(split)
    items = [random_item(rng, names) for _ in range(size)]
    return [random_caption(*item[:3], rng, concepts()[item[0]].tags) for item in items], items


def random_batch(
    rng: np.random.Generator, size: int, split: str = "train"
) -> tuple[Tensor, list[str], list[tuple[str, str, str, int]]]:
    """Pictures (B, 3, 64, 64) in [-1, 1], captions, and what each shows."""
    captions, items = random_captions(rng, size, split)
    return rendered(items), captions, items


def rendered(items: list[tuple[str, str, str, int]]) -> Tensor:
    """The pictures of (concept, style, scene, seed): (B, 3, 64, 64) in [-1, 1]."""
    return to_tensor(np.stack([render(*item) for item in items]))


@torch.no_grad()
def rendered_latents(vae, items: list[tuple[str, str, str, int]]) -> Tensor:
    """Their scaled latents (B, 64, 4, 4), in half precision, on the CPU."""
    z = vae.encode(rendered(items).to(vae.device)).latent_dist.mode()
    return (z * vae.config.scaling_factor).half().cpu()


def picture_grid(x: Tensor, columns: int) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> one uint8 picture, row by row."""
    x = (x.detach().float().clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    rows = [np.concatenate(list(r), axis=1) for r in x.numpy().reshape(-1, columns, *x.shape[1:])]
    return np.concatenate(rows)
