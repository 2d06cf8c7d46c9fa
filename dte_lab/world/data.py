"""Random pictures and captions of the small world, as tensors."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dte_lab.common.images import save_png
from dte_lab.common.settings import check_whole
from dte_lab.world.captions import held_out, random_caption
from dte_lab.world.scenes import SCENES, render_all, render_image
from dte_lab.world.sprites import STYLES, concepts, split_names

Rendering = tuple[str, str, str, int]  # concept, style, scene, seed of the background


def to_tensor(
    pictures: UInt8[np.ndarray, "batch height width 3"],
) -> Float[Tensor, "batch 3 height width"]:
    """Bytes -> [-1, 1]."""
    return from_bytes(torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2))


def random_item(rng: np.random.Generator, names: list[str]) -> Rendering:
    """A (concept, style, scene, seed) that is not a held-out combination."""
    while True:
        name, style = names[rng.integers(len(names))], STYLES[rng.integers(len(STYLES))]
        scene = SCENES[rng.integers(len(SCENES))]
        if not held_out(name, style, scene):
            return name, style, scene, int(rng.integers(1 << 31))


def random_batch(
    rng: np.random.Generator, size: int, split: str = "train"
) -> tuple[Float[Tensor, "batch 3 height width"], list[str], list[Rendering]]:
    """Pictures in [-1, 1], captions, and what each shows."""
    items = random_items(rng, size, split)
    texts = [random_caption(*item[:3], rng, concepts()[item[0]].tags) for item in items]
    return rendered(items), texts, items


def random_items(rng: np.random.Generator, size: int, split: str = "train") -> list[Rendering]:
    """`size` random items of a split: see `random_item`."""
    names = split_names(split)
    return [random_item(rng, names) for _ in range(size)]


def write_drawings(out: Path, each: int) -> None:
    """`each` random drawings of each `train` thing, to out/THING/NUMBER.png. Raises DTEError."""
    check_whole("each", each, 1)
    for k, name in enumerate(split_names("train")):
        rng = np.random.default_rng(k)
        for number in range(each):
            save_png(render_image(*random_item(rng, [name])), out / name / f"{number}.png")


def save_pairs(
    path: Path,
    first: Float[Tensor, "pairs 3 height width"],
    second: Float[Tensor, "pairs 3 height width"],
) -> None:
    """Pictures in [-1, 1], each beside the second of its pair, twelve in a row of a PNG."""
    both = torch.stack([first, second], 1).flatten(0, 1)
    save_png(Image.fromarray(pixel_grid(both, 12)), path)


def rendered(items: list[Rendering]) -> Float[Tensor, "batch 3 height width"]:
    """The pictures of (concept, style, scene, seed), in [-1, 1]."""
    return to_tensor(render_all(items))


def from_bytes(
    pictures: UInt8[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Bytes -> [-1, 1]."""
    return pictures.float() / 127.5 - 1


def indices(items: list[Rendering], names: list[str]) -> dict[str, Int[Tensor, " items"]]:
    """Which of `names`, STYLES and SCENES the items show."""
    concept = {name: i for i, name in enumerate(names)}
    return {
        "concept": torch.tensor([concept[item[0]] for item in items]),
        "style": torch.tensor([STYLES.index(item[1]) for item in items]),
        "scene": torch.tensor([SCENES.index(item[2]) for item in items]),
    }


def pixel_grid(
    x: Float[Tensor, "batch 3 height width"], columns: int
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Pictures in [-1, 1] -> one picture of them all, row by row."""
    x = (x.detach().float().clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    rows = [np.concatenate(list(r), axis=1) for r in x.numpy().reshape(-1, columns, *x.shape[1:])]
    return np.concatenate(rows)
