"""`dte doctor`: what is installed, what will be used and why, and what would fail."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from dte_lab import __version__
from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import check_path
from dte_lab.common.quiet import quiet_libraries

OPTIONAL = {  # what each is for
    "datasets": "dte pretrain --data NAME of the hub",
    "bitsandbytes": "dte pretrain --optimizer-8bit",
}
NOTEBOOKS = r"extra == .notebooks."
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub")


@dataclass
class Finding:
    """One line of the report."""

    topic: str
    text: str
    good: bool = True


def examine(
    backbone: str = "small",
    encoder: Path | str | None = None,
    device: str | None = None,
    out: Path | str = ".",
) -> Iterator[Finding]:
    """Yield the Findings for a backbone and device; nothing is downloaded or loaded."""
    yield Finding("python", f"{sys.version.split()[0]} on {platform.platform()}")
    yield from _libraries()
    yield from _optional()
    yield from _device(device)
    with quiet_libraries():
        parts = [*of_model(backbone, encoder, device), *_room(backbone, device)]
    yield from parts
    yield _folder(Path(out))


def of_model(backbone: str, encoder: Path | str | None, device: str | None) -> list[Finding]:
    """Whether backbone and encoder are there."""
    return [_backbone(backbone, device), _encoder(backbone, encoder)]


def _libraries() -> Iterator[Finding]:
    yield Finding("dte_lab", __version__)
    for name in LIBRARIES:
        found = _version(name)
        yield Finding(name, found or f"is missing: pip install {name}", found is not None)


def _optional() -> Iterator[Finding]:
    """What single options and the notebooks need besides; nothing fails without."""
    for name, purpose in OPTIONAL.items():
        found = _version(name)
        yield Finding(name, found or f"not there; for {purpose}: pip install {name}")
    try:
        requirements = importlib.metadata.requires("dte_lab") or []
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return
    wanted = [re.match(r"[\w.-]+", r)[0] for r in requirements if re.search(NOTEBOOKS, r)]
    missing = [name for name in wanted if _version(name) is None]
    text = f"without {', '.join(missing)}: pip install dte_lab[notebooks]"
    yield Finding("notebooks", text if missing else "all packages are there")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: str | None) -> Iterator[Finding]:
    import torch

    from dte_lab.common.device import checked_device

    try:
        chosen = checked_device(device)
    except DTEError as error:
        yield Finding("device", str(error), False)
        return
    why = "as asked for" if device else "there is a GPU" if chosen != "cpu" else "there is no GPU"
    try:
        torch.ones(1024, 1024, device=chosen).sum().item()  # a driver may fail at first use
    except Exception as error:
        yield Finding("device", f"{chosen} ({why}) cannot be used: {reason_of(error)}", False)
        return
    yield Finding("device", f"{chosen} ({why}), {os.cpu_count()} CPU cores")
    if chosen.startswith("cuda"):
        bf16 = torch.cuda.get_device_capability(chosen) >= (8, 0)
        yield Finding("precision", "fp16 and bf16" if bf16 else "fp16; bf16 needs an Ampere card")
        free, total = (x / 1e9 for x in torch.cuda.mem_get_info(chosen))
        text = f"{torch.cuda.get_device_name(chosen)}: {free:.1f} of {total:.1f} GB free"
        yield Finding("memory", text, free > 1)
    else:
        there = psutil.virtual_memory()
        free, total = there.available / 1e9, there.total / 1e9
        yield Finding("memory", f"{free:.1f} of {total:.1f} GB free", free > 1)


def _backbone(name: str, device: str | None) -> Finding:
    """Whether the backbone could be loaded, from where, and why."""
    import torch

    from dte_lab import backbone_parts as loader
    from dte_lab import sd15

    if name != "sd15":
        root = loader.backbone_folder(name)
        try:
            check_path("the backbone", root)
            loader.check_folders(root)
        except DTEError as error:
            return Finding("backbone", str(error), False)
        if (root / "image_encoder").is_dir():
            why = "the default, ships with the package" if name == "small" else "as asked for"
            return Finding("backbone", f"{name} ({why})")
        wanted = {sd15.CLIP_L14: (sd15.CLIP_FILES, sd15.CLIP_L14_REVISION)}
    else:
        files = sd15.sd15_files(half=torch.cuda.is_available() and device != "cpu")
        wanted = {
            sd15.SD15: (files, sd15.SD15_REVISION),
            sd15.CLIP_L14: (sd15.CLIP_FILES, sd15.CLIP_L14_REVISION),
        }
    missing = {
        repository: files
        for repository, (files, revision) in wanted.items()
        if not sd15.in_cache(repository, files, revision)
    }
    if not missing:
        return Finding("backbone", f"{name} (as asked for), with all files in the hub's cache")
    try:
        sd15.check_hub()
        for repository, files in missing.items():
            sd15.check_space(repository, files)
    except Exception as error:
        reason = reason_of(error)
        return Finding(
            "backbone", f"{name} needs {' and '.join(missing)} from the hub: {reason}", False
        )
    size = sum(sum(files.values()) for files in missing.values())
    return Finding("backbone", f"{name} (as asked for); {size:.1f} GB will be downloaded")


def _room(backbone: str, device: str | None) -> Iterator[Finding]:
    """Whether the device holds Stable Diffusion 1.5 and its tuning with the default batch."""
    from dte_lab.common.device import checked_device
    from dte_lab.memory_needs import Setting, advice, needed, room
    from dte_lab.recommended import STABLE_DIFFUSION

    try:
        there = room(checked_device(device)) if backbone == "sd15" else None
    except (DTEError, RuntimeError):
        return  # said above
    if there is None:
        if backbone == "sd15":
            yield Finding("tuning", "on a CPU a step takes minutes, and a picture as well")
        return
    setting = Setting(batch=STABLE_DIFFUSION.batch_size)
    need = needed(setting, "tuning")
    text = f"batch {setting.batch} takes {need / 1e9:.1f} GB and 1 GB for CUDA, predicted"
    if fits := need + 1e9 <= there[1]:
        yield Finding("tuning", f"{text}; there are {there[1] / 1e9:.1f} GB", fits)
    else:
        free = there[1] - 10**9
        yield Finding("tuning", f"{text}: {advice(setting, 'tuning', free)}", fits)


def _encoder(backbone: str, encoder: Path | str | None) -> Finding:
    from dte_lab.backbone_parts import backbone_folder
    from dte_lab.encoder import encoder_folder

    folder = encoder_folder(backbone_folder(backbone) / "encoder" if encoder is None else encoder)
    try:
        check_path("the encoder", folder / "config.json")
    except DTEError as error:
        return Finding("encoder", str(error), False)
    if (folder / "config.json").is_file():
        return Finding("encoder", str(folder))
    if encoder is not None or backbone == "small":
        return Finding("encoder", f"there is no encoder at {folder}", False)
    return Finding("encoder", "none: v* starts from the nearest words, see docs/sd15.md")


def _folder(out: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        return Finding("disk", f"{out} cannot be written ({reason_of(error)})", False)
    free = shutil.disk_usage(out).free / 1e9
    return Finding("disk", f"{free:.1f} GB free at {out.resolve()}", free > 0.1)
