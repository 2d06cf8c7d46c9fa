"""Random pictures and captions of the small world, as tensors.

Training draws from banks that are made once and lie on its device: rendering as one goes would keep
a GPU waiting.
"""

from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.world.captions import caption, held_out, random_caption
from dte_lab.world.clip import tokenize
from dte_lab.world.scenes import SCENES, render
from dte_lab.world.sprites import STYLES, concepts, split_names

Item = tuple[str, str, str, int]  # concept, style, scene, seed of the background


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float in [-1, 1]."""
    return from_bytes(torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2))


def random_item(rng: np.random.Generator, names: list[str]) -> Item:
    """A (concept, style, scene, seed) that is not a held-out combination."""
    while True:
        name, style = names[rng.integers(len(names))], STYLES[rng.integers(len(STYLES))]
        scene = SCENES[rng.integers(len(SCENES))]
        if not held_out(name, style, scene):
            return name, style, scene, int(rng.integers(1 << 31))


def random_batch(
    rng: np.random.Generator, size: int, split: str = "train"
) -> tuple[Tensor, list[str], list[Item]]:
    """Pictures (B, 3, 64, 64) in [-1, 1], captions, and what each shows."""
    items = random_items(rng, size, split)
    texts = [random_caption(*item[:3], rng, concepts()[item[0]].tags) for item in items]
    return rendered(items), texts, items


def random_items(rng: np.random.Generator, size: int, split: str = "train") -> list[Item]:
    """`size` random items of a split: see `random_item`."""
    names = split_names(split)
    return [random_item(rng, names) for _ in range(size)]


def rendered(items: list[Item]) -> Tensor:
    """The pictures of (concept, style, scene, seed): (B, 3, 64, 64) in [-1, 1]."""
    return to_tensor(_render(items))


def _render(items: list[Item]) -> np.ndarray:
    return np.stack([render(*item) for item in items])


def picture_bank(items: list[Item]) -> Tensor:
    """The pictures as bytes (B, 3, 64, 64), drawn by all cores: see `from_bytes`."""
    chunks = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ProcessPoolExecutor() as pool:
        bar = tqdm(pool.map(_render, chunks), total=len(chunks), desc="pictures", mininterval=5)
        return torch.from_numpy(np.concatenate(list(bar))).permute(0, 3, 1, 2).contiguous()


def from_bytes(pictures: Tensor) -> Tensor:
    """(B, 3, 64, 64) uint8 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def latent_bank(vae, items: list[Item]) -> Tensor:
    """The scaled latents (B, 96, 4, 4) of the pictures, in half precision, on the vae's device."""
    parts = picture_bank(items).split(256)
    latents = [vae.encode(from_bytes(x.to(vae.device))).latent_dist.mode() for x in parts]
    return (torch.cat(latents) * vae.config.scaling_factor).half()


def caption_bank(
    tokenizer, items: list[Item], rng: np.random.Generator, count: int, full: float = 0.0
) -> Tensor:
    """Token ids of `count` random captions of each item: (B, count, T).

    `full`: the share of those that name style and scene for sure.
    """
    texts = [
        caption(*item[:3])
        if rng.random() < full
        else random_caption(*item[:3], rng, concepts()[item[0]].tags)
        for item in items
        for _ in range(count)
    ]
    return tokenize(tokenizer, texts).unflatten(0, (len(items), count))


def random_rows(bank: Tensor, size: int) -> Tensor:
    """Indices (size,) of random rows of a bank, on its device."""
    return torch.randint(len(bank), (size,), device=bank.device)


def one_caption(captions: Tensor, rows: Tensor) -> Tensor:
    """A random one of the captions (N, count, ...), ids or states, of each of the rows (B,)."""
    which = torch.randint(captions.shape[1], rows.shape, device=rows.device)
    return captions[rows, which]


def indices(items: list[Item], names: list[str]) -> dict[str, Tensor]:
    """Which of `names`, STYLES and SCENES the items show, (B,) each."""
    concept = {name: i for i, name in enumerate(names)}
    return {
        "concept": torch.tensor([concept[item[0]] for item in items]),
        "style": torch.tensor([STYLES.index(item[1]) for item in items]),
        "scene": torch.tensor([SCENES.index(item[2]) for item in items]),
    }


def picture_grid(x: Tensor, columns: int) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> one uint8 picture, row by row."""
    x = (x.detach().float().clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    rows = [np.concatenate(list(r), axis=1) for r in x.numpy().reshape(-1, columns, *x.shape[1:])]
    return np.concatenate(rows)
