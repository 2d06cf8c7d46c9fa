"""Whether a GPU holds what is asked of it, and what to ask for instead.

What Stable Diffusion 1.5 needs was predicted once (hardware/memory.py) and lies beside this file in
sd15_memory.json, which `python benchmarks/sd15_memory.py` writes: an answer must not take the
minute of a prediction, nor memory that is used up. ("ours")
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from dte_lab.backbone import DTYPES, Backbone
from dte_lab.common.errors import DTEError, is_out_of_memory
from dte_lab.common.settings import check_one_of, check_whole
from dte_lab.sd15 import UNET

NEEDS = Path(__file__).parent / "sd15_memory.json"
BATCHES = (16, 8, 4, 2, 1)
WORKLOADS = ("tuning", "pre-training", "sampling")


@dataclass(frozen=True)
class Setting:
    """What memory depends on; `batch` is noise levels in tuning, pictures elsewhere.

    Raises DTEError for a batch or dtype that can be none.
    """

    backbone: str = "sd15"
    resolution: int = 512
    batch: int = 4
    dtype: str = "fp16"
    rank: int | str = 4
    gradient_checkpointing: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        check_whole("batch", self.batch, 1, 1024)
        check_one_of("dtype", self.dtype, tuple(DTYPES))

    def __str__(self) -> str:
        options = [
            n.replace("_", " ") for n in ("gradient_checkpointing", "offload") if asdict(self)[n]
        ]
        return ", ".join(
            [self.backbone, f"{self.resolution} pixels", f"batch {self.batch}", self.dtype,
             f"rank {self.rank}", *options]
        )  # fmt: skip


def choices(setting: Setting) -> Iterator[Setting]:
    """Settings that need less, those that change least first."""
    for batch in (setting.batch, *(b for b in BATCHES if b < setting.batch)):
        for checkpointing, offload in ((False, False), (False, True), (True, False), (True, True)):
            choice = replace(
                setting, batch=batch, offload=setting.offload or offload,
                gradient_checkpointing=setting.gradient_checkpointing or checkpointing,
            )  # fmt: skip
            if choice != setting:
                yield choice


def options_of(choice: Setting, setting: Setting) -> str:
    """How to ask for `choice` in place of `setting`, as options of the command and in Python."""
    flags, names = [], []
    if choice.batch != setting.batch:
        flags.append(f"--batch-size {choice.batch}")
        names.append(f"batch_size={choice.batch}")
    for name in ("gradient_checkpointing", "offload"):
        if getattr(choice, name) != getattr(setting, name):
            flags.append(f"--{name.replace('_', '-')}")
            names.append(f"{name}=True")
    return f"{' '.join(flags)} (in Python {', '.join(names)})"


@cache
def _needs() -> dict[Setting, dict[str, int]]:
    rows = json.loads(NEEDS.read_text())["rows"]
    return {Setting(**row["setting"]): row["bytes"] for row in rows}


def needed(setting: Setting, part: str) -> int | None:
    """Predicted bytes of a part, "tuning", "pre-training" or "sampling"; None where not known.

    Of a batch between two that were predicted, the larger one's.
    """
    known = _needs()
    larger = sorted(b for b in BATCHES if b >= setting.batch)
    dtype = "fp16" if setting.dtype == "bf16" else setting.dtype  # of one size
    row = known.get(replace(setting, batch=larger[0], dtype=dtype)) if larger else None
    return row[part] if row else None


def room(device: torch.device | str) -> tuple[str, int] | None:
    """The name of a GPU and the bytes that this process may have of it; None for other devices."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.cuda.get_device_name(device), free


def advice(setting: Setting, part: str, free: int) -> str:
    """What makes a part fit into `free` bytes, as the end of a sentence."""
    rest = [(c, n) for c in choices(setting) if (n := needed(c, part)) is not None]
    for choice, need in rest:
        if need <= free:
            return f"it fits with {options_of(choice, setting)}, predicted {need / 1e9:.1f} GB"
    least = min(need for _, need in rest) if rest else needed(setting, part)
    return f"it needs {least / 1e9:.1f} GB at least, predicted, so take a larger GPU"


def check_room(setting: Setting, part: str, device: torch.device | str) -> None:
    """Raise DTEError where a GPU is certainly too small, before anything is loaded.

    The prediction is of tensors alone: CUDA itself takes more, so what barely fits is let through.
    """
    there, need = room(device), needed(setting, part)
    if there is None or need is None or need <= there[1]:
        return
    name, free = there
    raise DTEError(
        f"{part.capitalize()} with {setting} takes {need / 1e9:.1f} GB, predicted, and {name} has "
        f"{free / 1e9:.1f} GB free: {advice(setting, part, free)}."
    )


def setting_of(backbone: Backbone, batch: int) -> Setting | None:
    """What is asked of a loaded model; None where it is no Stable Diffusion 1.5 at 512 pixels."""
    config = backbone.unet.config
    names = ("block_out_channels", "cross_attention_dim", "sample_size")
    if any(_as_list(config[name]) != _as_list(UNET[name]) for name in names):
        return None
    dtype = next(name for name, dtype in DTYPES.items() if dtype == backbone.dtype)
    return Setting(
        batch=batch, dtype=dtype, offload=backbone.offload,
        gradient_checkpointing=backbone.unet.is_gradient_checkpointing,
    )  # fmt: skip


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def out_of_memory_advised(backbone: Backbone, part: str, batch: int) -> Iterator[None]:
    """Answer an exhausted memory inside the block by DTEError, with what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        setting, there = setting_of(backbone, batch), room(backbone.device)
        where = "This machine" if there is None else f"{there[0]}, with {there[1] / 1e9:.1f} GB,"
        asked = f"{part} with {setting or f'batch {batch}'}"
        told = "a smaller --batch-size, --gradient-checkpointing or --offload take less"
        if setting and there and needed(setting, part) is not None:
            told = advice(setting, part, min(there[1], needed(setting, part) - 1))
        raise DTEError(f"{where} ran out of memory in {asked}: {told}.") from error
