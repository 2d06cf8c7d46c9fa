"""Reading pictures that users bring, whatever their format, and saying clearly what is wrong.

Everything here ends in an 8-bit RGB picture, upright and opaque. What cannot become one raises
`ImageError` with one sentence that names the file, the fault and, where there is one, the cure.
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically

if TYPE_CHECKING:  # a bad picture is reported before torch is loaded
    from jaxtyping import Float, UInt8
    from torch import Tensor

MIN_SIDE = 16  # px; below this nothing of a concept is left
MAX_PIXELS = 100_000_000  # 300 MB once decoded; read from the header, before any decoding
# Pictures only. Left out on purpose: EPS and PDF, which Pillow hands to an external interpreter.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "ICO")


class ImageError(DTEError):
    """A picture that cannot be used; the message is one sentence fit for the user."""


def read_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """Read a picture from a path, a binary file or a PIL image, as upright, opaque 8-bit RGB.

    EXIF orientation is applied, transparency is put on white, 16-bit depth is scaled to 8, CMYK
    and palettes are converted, and of an animation the first frame is taken.

    Raises ImageError for anything that is missing, is no picture, is damaged, has a side under
    `MIN_SIDE` or more than `MAX_PIXELS` pixels (judged by the header, before decoding).
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if isinstance(source, str | Path):
        with _open_file(Path(source)) as file:
            return _decode(file, str(source))
    data = source.read()
    name = str(getattr(source, "name", "the picture"))
    if not data:
        raise ImageError(f"{name} is empty.")
    return _decode(io.BytesIO(data), name)


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square of the shorter side, resized with an antialiased bicubic filter.

    A picture that already has this size comes out unchanged.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Cropped first: with resize(box=...) the filter would see pixels outside the square.
    image = image.crop((left, top, left + side, top + side))
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)


def to_square_tensor(image: Image.Image, resolution: int) -> "Float[Tensor, '3 side side']":
    """RGB picture to `square` to a float32 tensor (3, resolution, resolution) in [-1, 1]."""
    import torch

    array = np.asarray(square(image, resolution), dtype=np.float32) / 127.5 - 1  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()  # (3, H, W)


def save_png(image: Image.Image, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG that is either whole or not there; an existing file survives a failed write.

    texts: ASCII, for text chunks by their keywords.
    Raises OSError when the folder cannot be written.
    """
    buffer = io.BytesIO()
    chunks = PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    image.save(buffer, format="PNG", optimize=True, pnginfo=chunks)
    write_atomically(path, buffer.getvalue())


def _open_file(path: Path) -> BinaryIO:
    if path.is_dir():
        raise ImageError(f"{path} is a folder; give a picture file.")
    if not path.exists():
        raise ImageError(f"{path} does not exist.")
    if not path.is_file():
        raise ImageError(f"{path} is not a regular file.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty.")
    try:
        return path.open("rb")
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror or error}).") from error


def _decode(file: BinaryIO, name: str) -> Image.Image:
    Image.init()
    with _damage_reported(name), warnings.catch_warnings():
        # Our own limit is checked below, and metadata oddities do not concern the user.
        warnings.simplefilter("ignore")
        formats = [f for f in FORMATS if f in Image.OPEN]  # AVIF only in newer builds of Pillow
        with Image.open(file, formats=formats) as image:
            _check_size(image, name)
            image.load()
            return _to_rgb(image, name)


@contextmanager
def _damage_reported(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture in a known format; use PNG, JPEG, WebP, GIF, TIFF or BMP."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {_limit()}.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} is damaged and cannot be decoded ({detail}).") from error


def _limit() -> str:
    return f"at most {MAX_PIXELS // 1_000_000} megapixels can be read"


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is too large ({width} x {height} pixels): {_limit()}.")
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{name} is too small ({width} x {height} pixels): each side needs at least {MIN_SIDE}."
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    image = _upright(image)
    if image.mode.startswith("I"):  # "I;16", "I;16B", "I": grey with more than 8 bits
        image = _from_16_bit(image, name)
    elif image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels, whose range is not known; save it with 8 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be parsed says nothing about the orientation
        return image


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey (H, W) with 16 bits to 8 bits: 0 stays 0 and 65535 becomes 255."""
    array = np.asarray(image).astype(np.int64)
    if array.min() < 0 or array.max() > 65535:
        raise ImageError(f"{name} has more than 16 bits per pixel; save it with 8 or 16 bits.")
    return Image.fromarray(((array * 255 + 32767) // 65535).astype(np.uint8))


def to_bytes(pixels: "Float[Tensor, '*shape']") -> "UInt8[Tensor, '*shape']":
    """Pixels in [-1, 1] -> uint8, of the same shape."""
    return ((pixels.float() + 1) * 127.5).round().byte()


def to_pil(pixels: "Float[Tensor, 'batch 3 height width']") -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> list of B PIL images."""
    return [Image.fromarray(a) for a in to_bytes(pixels).permute(0, 2, 3, 1).cpu().numpy()]
