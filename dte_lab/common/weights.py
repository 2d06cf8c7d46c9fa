"""Weights from a folder: safetensors alone, and only when every tensor is there and is a number.

The libraries fill what a file lacks with random numbers and say so in a log line; a damaged model
would then draw nonsense, another one each time. Nor do they ask whether there is room for a model,
which some damaged settings would have of any size.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import COPY_AGAIN, check_path, read_settings

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
    MemoryError,
    StrictDataclassError,
)
FILES = re.compile(r"(diffusion_pytorch_)?model[.-].*safetensors")
FLOATS, WHOLE = ("F64", "F32", "F16", "BF16"), ("I64", "I32")
SPARE = 10_000_000  # numbers that a model may have beside those of its files, which it may lack


class Stored(NamedTuple):
    """A tensor as a file has it."""

    file: Path
    dtype: str
    shape: list[int]


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
    check_path("the folder of weights", folder)
    config = read_config(folder)
    names = [path.name for path in folder.glob("*.safetensors")]
    if names and all(".fp16." in name for name in names):  # a copy of the halved files alone
        options["variant"] = "fp16"
    if not any(folder.glob("*.safetensors")):
        raise DTEError(
            f"{folder} holds no weights in safetensors, and pickled ones are never read: "
            "convert them, or copy the folder again."
        )
    stored = stored_tensors(folder, options.get("variant") == "fp16")
    try:
        with _without_report():
            check_described(load.__self__, folder, config, stored)
            model, info = load(
                folder, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except DTEError:
        raise
    except DAMAGE as error:
        raise DTEError(f"{folder} cannot be loaded ({reason_of(error)}): {COPY_AGAIN}.") from error
    wrong = [(str(key[0]), "has another shape") for key in info["mismatched_keys"]]
    wrong += [(key, "is missing") for key in sorted({*info["missing_keys"]} - {*absent})]
    if not strangers:
        unknown = {key for key in info["unexpected_keys"] if not key.endswith("position_ids")}
        wrong += [(key, "is unknown") for key in sorted(unknown)]  # (those are no weights)
    wrong = wrong or [
        (name, "holds values that are not finite")
        for name, tensor in model.state_dict().items()
        if not is_finite(tensor)
    ]
    if wrong:
        name, fault = wrong[0]
        more = f" (one of {len(wrong)} such faults)" if len(wrong) > 1 else ""
        raise DTEError(f"{_file_of(folder, name)}: the tensor {name} {fault}{more}; {COPY_AGAIN}.")
    return model


def read_tensors(
    path: Path | str, shapes: Mapping[str, Sequence[int | str]], remedy: str
) -> dict[str, Tensor]:
    """The tensors of a file that is no model of a library's, in single precision.

    shapes: of those that it must hold, and no others; sizes of the same name must agree. remedy:
    the end of the sentence, what to do. Raises DTEError, with the file and the tensor, when the
    file cannot be read, or a tensor is missing, unknown, of another shape, or not finite.
    """
    try:
        tensors = load_file(path)
    except DAMAGE as error:
        raise DTEError(f"{path} cannot be read ({reason_of(error)}): {remedy}.") from error
    faults = [(name, "is missing") for name in shapes if name not in tensors]
    faults += [(name, "is unknown") for name in tensors if name not in shapes]
    sizes = {}
    for name in shapes if not faults else ():
        tensor, shape = tensors[name], tuple(shapes[name])
        for size, found in zip(shape, tensor.shape, strict=False):
            sizes.setdefault(size, size if isinstance(size, int) else found)
        if tensor.shape != tuple(map(sizes.get, shape)) or not tensor.numel():
            faults.append((name, f"has the shape {tuple(tensor.shape)}"))
        elif tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            faults.append((name, f"is of {tensor.dtype}"))
        elif not is_finite(tensor):
            faults.append((name, "holds values that are not finite"))
    if faults:
        raise DTEError(f"{path}: the tensor {' '.join(faults[0])}: {remedy}.")
    return {name: tensor.float() for name, tensor in tensors.items()}


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
    return read_settings(folder / "config.json")


def stored_tensors(folder: Path, halved: bool) -> dict[str, Stored]:
    """{name: what the files of weights say of it}; halved: of those with fp16 in their name.

    Raises DTEError for a file that is none.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not FILES.fullmatch(path.name) or (".fp16." in path.name) != halved:
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    found[name] = Stored(path, part.get_dtype(), part.get_shape())
        except DAMAGE as error:
            raise DTEError(
                f"{path} cannot be loaded ({reason_of(error)}): {COPY_AGAIN}."
            ) from error
    return found


def check_described(
    kind: type, folder: Path, config: dict[str, Any], stored: dict[str, Stored]
) -> None:
    """Complain of settings whose model is larger than its files, before memory is taken for it, and
    of tensors of another kind than it has.
    """
    for name, value in _flat(config):
        many = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]
        if re.search("layers|depth", name) and max(many, default=0) > max(len(stored), 2):
            raise DTEError(f"{folder / 'config.json'}: {name} is {value}; {COPY_AGAIN}.")
    with torch.device("meta"):
        if hasattr(kind, "load_config"):  # diffusers
            model = kind.from_config(kind.load_config(folder))
        else:
            model = kind(kind.config_class.from_pretrained(folder))
    for name, tensor in model.state_dict().items():
        kinds = FLOATS if tensor.is_floating_point() else WHOLE
        if name in stored and stored[name].dtype not in kinds:
            file, dtype, _ = stored[name]
            raise DTEError(f"{file}: the tensor {name} is of {dtype}; {COPY_AGAIN}.")
    described = sum(tensor.numel() for tensor in model.state_dict().values())
    if described > sum(prod(tensor.shape) for tensor in stored.values()) + SPARE:
        raise ValueError(f"its config.json is of a model of {described:,} numbers")


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of settings, those of settings inside settings as well."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # makes no copy


def _file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor or ought to: of several parts, the one that the index names."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = read_settings(index).get("weight_map", {})
        return folder / weight_map.get(name, index.name)
    return folder
