"""Pictures in whatever a notebook hands over: bytes, arrays, tensors, what upload widgets give."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dte_lab.common.errors import DTEError, reason_of

# Any: a numpy array or a torch tensor, of (H, W) or with 1, 3 or 4 channels first or last, uint8
# or floats from 0 to 1; ipywidgets' FileUpload or its value; what Colab's files.upload() gives.
PictureSource = str | Path | bytes | BinaryIO | Image.Image | Any
BYTES = bytes | bytearray | memoryview
MAX_BYTES = 100_000_000  # of a file; decoders need up to 0.06 s for each megabyte of junk


class ImageError(DTEError):
    """A picture that cannot be used; the message is one sentence fit for the user."""


class Named(NamedTuple):
    """One picture and what messages call it."""

    picture: PictureSource
    name: str


def each_picture(source: PictureSource | Sequence[PictureSource]) -> list[Named]:
    """The single pictures of a source: of a list, or of an upload widget or its value.

    Raises ImageError where there is none.
    """
    if isinstance(source, Named):
        return [source]
    if hasattr(source, "value") and hasattr(source, "accept"):  # ipywidgets' FileUpload
        source = source.value
    if isinstance(source, Mapping) and isinstance(source.get("content"), BYTES):
        return [Named(source["content"], str(source.get("name", "the picture")))]  # ipywidgets 8
    if isinstance(source, Mapping):  # Colab: {name: bytes}; ipywidgets 7: {name: {"content": ...}}
        pictures = [
            Named(one.picture, str(name))
            for name, value in source.items()
            for one in each_picture(value)
        ]
    elif isinstance(source, list | tuple):
        pictures = [one for item in source for one in each_picture(item)]
    else:
        return [Named(source, str(source) if isinstance(source, str | Path) else "the picture")]
    if not pictures:
        raise ImageError("At least one picture of the concept is needed.")
    return pictures


def opened(source: PictureSource, name: str) -> Image.Image | BinaryIO:
    """One source as a PIL image, or as a file to decode that is not too large.

    Raises ImageError for what is neither.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str | Path):
        return _open_file(Path(source))
    if isinstance(source, BYTES):
        return _bounded(io.BytesIO(source), name)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if hasattr(source, "element_size"):  # a tensor; torch may not be loaded
        source = source.detach().cpu()
        return _from_array((source if source.element_size() == 1 else source.float()).numpy(), name)
    if hasattr(source, "read"):
        return _bounded(source, str(getattr(source, "name", name)))
    raise ImageError(
        f"{name} is a path, a file, bytes, a PIL image, an array or a tensor, "
        f"not {type(source).__name__}."
    )


def _bounded(file: BinaryIO, name: str) -> BinaryIO:
    """The file's bytes, of which there are some, and not too many."""
    data = file.read(MAX_BYTES + 1)
    if not isinstance(data, BYTES):
        raise ImageError(f"{name} is open as text: open it in binary mode.")
    if not data:
        raise ImageError(f"{name} is empty.")
    if len(data) > MAX_BYTES:
        raise _too_large(name)
    if data[:2] in (b"P1", b"P2", b"P3") and len(data) > 1_000_000:  # minutes, with long comments
        raise ImageError(f"{name} is a PPM in plain text and too large: save it as PNG.")
    return io.BytesIO(data)


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name} is too large: at most {MAX_BYTES // 1_000_000} MB can be read.")


def _open_file(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder: give a file.")
        if not path.exists():
            raise ImageError(f"{path} does not exist.")
        if not path.is_file():
            raise ImageError(f"{path} is not a regular file.")
        if path.stat().st_size > MAX_BYTES:
            raise _too_large(str(path))
        with path.open("rb") as file:
            return _bounded(file, str(path))
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({reason_of(error)}).") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, to a PIL image."""
    shape, kinds = array.shape, (1, 3, 4)
    if array.ndim == 3 and shape[-1] not in kinds and shape[0] in kinds:
        array = np.moveaxis(array, 0, -1)  # (H, W, C)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]  # (H, W)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in kinds):
        raise ImageError(
            f"{name} has the shape {tuple(shape)}: an array is (height, width), or has 1, 3 or 4 "
            "channels first or last."
        )
    if 0 in array.shape:
        raise ImageError(f"{name} is empty.")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"{name} has floats that are not from 0 to 1: bring them there.")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name} is of {array.dtype}: an array is uint8, or float from 0 to 1.")
    return Image.fromarray(np.ascontiguousarray(array))
