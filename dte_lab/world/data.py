"""Random pictures and captions of the small world, as tensors.

Training draws from banks that are made once and lie on its device: rendering as one goes would keep
a GPU waiting.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, Shaped, UInt8
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from dte_lab.common.images import save_png
from dte_lab.world.captions import caption, held_out, random_caption
from dte_lab.world.clip import tokenize
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
    """`each` random drawings of each `train` thing, to out/THING/NUMBER.png."""
    for k, name in enumerate(split_names("train")):
        rng = np.random.default_rng(k)
        for number in range(each):
            save_png(render_image(*random_item(rng, [name])), out / name / f"{number}.png")


def rendered(items: list[Rendering]) -> Float[Tensor, "batch 3 height width"]:
    """The pictures of (concept, style, scene, seed), in [-1, 1]."""
    return to_tensor(render_all(items))


def picture_bank(items: list[Rendering]) -> UInt8[Tensor, "items 3 height width"]:
    """The pictures as bytes, drawn by all cores: see `from_bytes`.

    The processes are spawned, since a fork beside torch's threads can hang, and only where there is
    work for several. They load no torch.
    """
    chunks = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ExitStack() as stack:
        results = map(render_all, chunks)
        if len(chunks) > 2:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(mp_context=context))
            results = pool.map(render_all, chunks)
        bar = tqdm(results, total=len(chunks), desc="pictures", mininterval=5)
        return torch.from_numpy(np.concatenate(list(bar))).permute(0, 3, 1, 2).contiguous()


def from_bytes(
    pictures: UInt8[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Bytes -> [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def latent_bank(
    vae: nn.Module, items: list[Rendering]
) -> Float16[Tensor, "items channels height width"]:
    """The scaled latents (N, 96, 4, 4) of the pictures, in half precision, on the vae's device."""
    parts = picture_bank(items).split(256)
    latents = [vae.encode(from_bytes(x.to(vae.device))).latent_dist.mode() for x in parts]
    return (torch.cat(latents) * vae.config.scaling_factor).half()


def caption_bank(
    tokenizer: CLIPTokenizer,
    items: list[Rendering],
    rng: np.random.Generator,
    count: int,
    full: float = 0.0,
) -> Int[Tensor, "items count tokens"]:
    """Token ids of `count` random captions of each item.

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


def random_rows(bank: Shaped[Tensor, "rows ..."], size: int) -> Int[Tensor, " size"]:
    """Indices of random rows of a bank, on its device."""
    return torch.randint(len(bank), (size,), device=bank.device)


def one_caption(
    captions: Shaped[Tensor, "items count ..."], rows: Int[Tensor, " batch"]
) -> Shaped[Tensor, "batch ..."]:
    """A random one of the captions, ids or states, of each of the rows."""
    which = torch.randint(captions.shape[1], rows.shape, device=rows.device)
    return captions[rows, which]


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
