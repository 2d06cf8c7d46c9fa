"""Weights from a folder: safetensors alone, and only when every tensor is there and is a number.

The libraries fill what a file lacks with random numbers and say so in a log line; a damaged model
would then draw nonsense, another one each time.
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from dte_lab.common.errors import DTEError

Model = TypeVar("Model", bound=nn.Module)

# What the libraries raise for a configuration or a file that is no such thing.
DAMAGE = (
    OSError,
    SafetensorError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
COPY = "it is damaged or of another model, so copy it again"


def load_weights(
    load: Callable[..., Model],
    folder: Path | str,
    strangers: bool = False,
    absent: Collection[str] = (),
    **options: Any,
) -> Model:
    """The model in a folder; load: the `from_pretrained` of its class (diffusers, transformers).

    strangers: whether the file may hold tensors of other parts, as one with both towers of CLIP.
    absent: tensors that it may lack; they are random. options: of `from_pretrained`.
    Raises DTEError, with the file and the tensor, when one is missing, unknown, of a wrong shape or
    not finite, when there is none but a pickle, and when the folder cannot be read at all.
    """
    folder = Path(folder)
    read_config(folder)
    names = [path.name for path in folder.glob("*.safetensors")]
    if names and all(".fp16." in name for name in names):  # a copy of the halved files alone
        options["variant"] = "fp16"
    if not any(folder.glob("*.safetensors")):
        raise DTEError(
            f"{folder} holds no weights in safetensors, and pickled ones are never read: "
            "convert them, or copy the folder again."
        )
    try:
        with _without_report():
            model, info = load(
                folder, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise DTEError(f"{folder} cannot be loaded ({reason}): {COPY}.") from error
    wrong = [(str(key[0]), "has another shape") for key in info["mismatched_keys"]]
    wrong += [(key, "is missing") for key in sorted({*info["missing_keys"]} - {*absent})]
    if not strangers:
        unknown = {key for key in info["unexpected_keys"] if not key.endswith("position_ids")}
        wrong += [(key, "is unknown") for key in sorted(unknown)]  # (those are no weights)
    wrong = wrong or [
        (name, "holds values that are not finite")
        for name, tensor in model.state_dict().items()
        if not _finite(tensor)
    ]
    if wrong:
        name, fault = wrong[0]
        more = f" (one of {len(wrong)} such faults)" if len(wrong) > 1 else ""
        raise DTEError(f"{_file_of(folder, name)}: the tensor {name} {fault}{more}; {COPY}.")
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers lists all tensors of other parts, dozens for CLIP; we judge them ourselves."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a folder's config.json. Raises DTEError where there are none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DTEError(f"{path} cannot be read: {COPY}.") from error
    if not isinstance(config, dict):
        raise DTEError(f"{path} holds no settings: {COPY}.")
    return config


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # makes no copy


def _file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor or ought to: of several parts, the one that the index names."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = json.loads(index.read_text())["weight_map"]
        return folder / weight_map.get(name, index.name)
    return folder
