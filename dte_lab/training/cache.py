"""What the frozen parts see in each picture, computed once: latents and CLIP's features on disk.

The autoencoder and CLIP take about half of a step's arithmetic on the pictures alone, which are
always the same. A cache holds latents and CLIP's patches in fp16 and CLIP's embedding in fp32 in
shards of `SHARD` pictures, and cache.json, which says what it was made of. A half-precision
backbone loses nothing by it; one in fp32 trains on its values rounded to fp16. Each shard is
written whole, so that a call that was cut off goes on with the next; so may several processes.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
from dte_lab.common.files import check_path, read_settings, write_atomically
from dte_lab.common.resume import check_settings
from dte_lab.common.settings import check_whole
from dte_lab.common.weights import is_finite
from dte_lab.features import image_features
from dte_lab.training.batches import loading
from dte_lab.training.step import Processes, encode_pictures
from dte_lab.training.streams import StreamedPictures

SHARD = 128  # pictures in a file
ENCODED_AT_ONCE = 16  # pictures encoded at once; divides SHARD
CACHE = "cache.json"
TENSORS = {
    "latents": ("F16", 5),
    "patches": ("F16", 4),
    "embeds": ("F32", 2),
    "concept": ("I64", 1),
}
TEXTS = ("prompt", "skipped")
WRITE_AGAIN = "remove it, and call the command that writes the cache again"


class CachedPictures(Dataset):
    """The items of a whole cache, for `pretrain`: see `encode_pictures` for what they hold.

    Raises DTEError where `fill_cache` has not finished, and for a shard that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings, whole = read_head(folder)
        if not whole:
            raise DTEError(f"{folder} holds no whole cache: call the command that writes it again.")
        self.paths = [shard_path(folder, n) for n in range(-(-settings["pictures"] // SHARD))]
        self.shards = {}  # opened when they are first read, by each worker for itself
        of_shards = [self.read(k, "concept", slice(None)) for k in range(len(self.paths))]
        self.concepts = torch.cat(of_shards)  # of all items
        self.places = [(k, j) for k, some in enumerate(of_shards) for j in range(len(some))]
        self.shards = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        shard, row = self.places[index]
        item = {name: self.read(shard, name, slice(row, row + 1))[0] for name in TENSORS}
        if not all(map(is_finite, item.values())):
            raise DTEError(
                f"Item {row} of the shard {self.paths[shard]} is not finite: {WRITE_AGAIN}."
            )
        return item | {name: values[row] for name, values in self.shards[shard][1].items()}

    def read(self, shard: int, name: str, rows: slice) -> Tensor:
        if shard not in self.shards:
            self.shards[shard] = open_shard(self.paths[shard])
        return self.shards[shard][0].get_slice(name)[rows]


def read_head(folder: Path) -> tuple[dict, bool]:
    """Settings of the cache in a folder, and whether it is whole. Raises DTEError for damage."""
    check_path("the cache", folder)
    path = Path(folder) / CACHE
    if not path.exists():
        return {}, False
    head = read_settings(path, WRITE_AGAIN)
    settings, whole = head.get("settings"), head.get("whole")
    if not isinstance(settings, dict) or not isinstance(whole, bool):
        raise DTEError(f"{path} is no head of a cache: {WRITE_AGAIN}.")
    check_whole(f"pictures in {path}", settings.get("pictures"), 1)
    return settings, whole


def open_shard(path: Path) -> tuple[safe_open, dict[str, list[str]]]:
    """A shard's tensors and texts. Raises DTEError where it is not what `write_shard` wrote."""
    try:
        file = safe_open(path, "pt")
        texts = json.loads((file.metadata() or {})["texts"])
        rows = {name: len(texts[name]) for name in TEXTS}
        for name, (dtype, dimensions) in TENSORS.items():
            part = file.get_slice(name)
            if part.get_dtype() != dtype or len(part.get_shape()) != dimensions:
                raise ValueError(f"{name} is {part.get_dtype()} of shape {part.get_shape()}")
            rows[name] = part.get_shape()[0]
        if len(set(rows.values())) > 1 or not 0 < rows["concept"] <= SHARD:
            raise ValueError(f"it has {rows}")
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise DTEError(f"The shard {path} is damaged ({error}): {WRITE_AGAIN}.") from error
    return file, texts


def fill_cache(
    folder: Path,
    dataset: Dataset,
    backbone: Backbone,
    clip_layer: int,
    accelerator: Accelerator,
    max_minutes: float | None = None,
    say: Callable[[str], None] = print,
    num_workers: int | None = None,
) -> bool:
    """Write what is missing of a cache of `dataset`; whether it is whole then.

    clip_layer: the hidden state that the encoder reads. max_minutes: ends this call, to be
    continued by the next. say: told the size beforehand. num_workers: as in `loading`. Of a stream
    as many whole shards are written as the pictures asked for fill. Raises DTEError where the
    folder holds a cache of something else, or the disk has no room.
    """
    started, path, main = time.monotonic(), folder / CACHE, accelerator.is_main_process
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    settings = {
        "backbone": backbone.name, "resolution": backbone.resolution, "clip_layer": clip_layer,
        "pictures": len(dataset), "source": getattr(dataset, "source", type(dataset).__name__),
    }  # fmt: skip
    if isinstance(dataset, StreamedPictures):
        settings["processes"] = processes.count
    if path.exists():
        before, whole = read_head(folder)
        check_settings(folder, before, settings)
        if whole:
            return True
    accelerator.wait_for_everyone()  # all have read what the first is going to write
    if main:
        say(announcement(folder, dataset, backbone))
        write_atomically(path, json.dumps({"settings": settings, "whole": False}).encode())
    numbers = range(processes.rank, -(-len(dataset) // SHARD), processes.count)
    missing = [n for n in numbers if not shard_path(folder, n).is_file()]
    options = loading(dataset, num_workers, backbone.device)
    if isinstance(dataset, StreamedPictures):
        part = dataset.part(processes, (len(numbers) - len(missing)) * SHARD)
        batches = iter(DataLoader(part, batch_size=ENCODED_AT_ONCE, **options))
    else:
        indices = [i for n in missing for i in range(n * SHARD, min((n + 1) * SHARD, len(dataset)))]
        sampler = BatchSampler(indices, ENCODED_AT_ONCE, drop_last=False)
        batches = iter(DataLoader(dataset, batch_sampler=sampler, **options))
    items = {number: min(SHARD, len(dataset) - SHARD * number) for number in missing}
    with tqdm(total=sum(items.values()), desc="cache", disable=not main) as bar:
        for number, count in items.items():
            if max_minutes is not None and time.monotonic() - started > 60 * max_minutes:
                accelerator.set_trigger()
                break
            write_shard(shard_path(folder, number), encoded(backbone, batches, clip_layer))
            bar.update(count)
    if accelerator.check_trigger():  # any of the processes has more to do
        return False
    accelerator.wait_for_everyone()
    if main:
        write_atomically(path, json.dumps({"settings": settings, "whole": True}).encode())
    accelerator.wait_for_everyone()
    return True


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def encoded(backbone: Backbone, batches: Iterator[dict], clip_layer: int) -> list[dict[str, Any]]:
    """What a shard holds, batch by batch."""
    parts = []
    for pictures in islice(batches, SHARD // ENCODED_AT_ONCE):
        latents = encode_pictures(backbone, pictures).half().unflatten(0, (2, -1)).transpose(0, 1)
        clip = image_features(backbone, pictures["image"], clip_layer)
        parts.append({
            "latents": latents if "target" in pictures else latents[:, :1],  # (B, 2 or 1, C, h, w)
            "patches": clip.patches.half(),
            "embeds": clip.embeds,
            "concept": pictures["concept"],
            "prompt": pictures["prompt"],
            "skipped": pictures.get("skipped", [""] * len(latents)),
        })  # fmt: skip
    return parts


def write_shard(path: Path, parts: list[dict[str, Any]]) -> None:
    texts = {name: [x for part in parts for x in part[name]] for name in TEXTS}
    tensors = {
        name: torch.cat([part[name] for part in parts]).cpu().contiguous() for name in TENSORS
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DTEError(f"The {name} of pictures do not fit fp16: train without a cache.")
    write_atomically(path, save(tensors, {"texts": json.dumps(texts)}))


def bytes_each(backbone: Backbone, latents: int) -> int:
    """Of one item, of so many latents, in a cache."""
    channels, height, width = backbone.latent_shape
    clip = backbone.image_encoder.config
    patches = clip.hidden_size * (clip.image_size // clip.patch_size) ** 2
    return 2 * (latents * channels * height * width + patches) + 4 * clip.projection_dim


def announcement(folder: Path, dataset: Dataset, backbone: Backbone) -> str:
    """How large the cache becomes. Raises DTEError where the disk has no room for it."""
    first = next(iter(dataset)) if isinstance(dataset, StreamedPictures) else dataset[0]
    size = len(dataset) * bytes_each(backbone, 2 if "target" in first else 1)
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    took, left = (f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB" for n in (size, free))
    said = f"a cache of {len(dataset):,} items takes {took} in {folder}, which has {left} left"
    if size - there > free:
        raise DTEError(f"{said[0].upper()}{said[1:]}.")
    return said
