"""Reading pictures that users bring, whatever their format, and saying clearly what is wrong.

Everything here ends in an 8-bit RGB picture, upright and opaque. What cannot become one raises
`ImageError` with one sentence that names the file, the fault and, where there is one, the cure.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dte_lab.common.errors import reason_of
from dte_lab.common.files import write_atomically
from dte_lab.common.settings import check_one_of
from dte_lab.common.sources import ImageError, Named, PictureSource, each_picture, opened

if TYPE_CHECKING:  # a bad picture is reported before torch is loaded
    from jaxtyping import Float, UInt8
    from torch import Tensor

MIN_SIDE = 16  # px; below this nothing of a concept is left
MAX_PIXELS = 100_000_000  # 300 MB once decoded; read from the header, before any decoding
LIMIT = f"at most {MAX_PIXELS // 1_000_000} megapixels can be read"
# Pictures only. Left out on purpose: EPS and PDF, which Pillow hands to an external interpreter.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "ICO", "HEIF")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
FITS = ("crop", "pad")
BUSY = 20  # levels of 255, standard deviation within a corner
BLANK = 4  # levels of 255 between the darkest and the brightest pixel of each channel


class Picture(NamedTuple):
    """An upright, opaque RGB picture, and of the same size in grey how much of each pixel is the
    thing, 255 all; None where nobody said."""

    image: Image.Image
    mask: Image.Image | None = None


def read_image(source: PictureSource) -> Image.Image:
    """Read a picture as upright, opaque 8-bit RGB, from any `PictureSource`, see sources.py.

    EXIF orientation is applied, transparency is put on white, 16-bit depth is scaled to 8, CMYK
    and palettes are converted, and of an animation the first frame is taken.
    Raises ImageError for anything that is missing, is no picture, is damaged, has a side under
    `MIN_SIDE` or more than `MAX_PIXELS` pixels (judged by the header, before decoding), or more
    than 100 MB.
    """
    return read_picture(source).image


def read_picture(source: PictureSource, mask: PictureSource | None = None) -> Picture:
    """A picture with what says where the thing is: `mask`, or else its own transparency.

    mask: a picture of the same size, white or opaque where the thing is. What is not the thing
    becomes white. Raises ImageError as `read_image`, and for a mask that does not fit.
    """
    found = each_picture(source)
    if len(found) != 1:
        raise ImageError(f"One picture is needed here, not {len(found)}.")
    image, name = _loaded(found[0]), found[0].name
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if mask is not None:
        mask = each_picture(mask)[0]
        marked, mask_name = _loaded(mask), mask.name
        alpha = marked.getchannel("A") if marked.mode == "RGBA" else marked.convert("L")
        if alpha.size != image.size:
            raise ImageError(
                f"the mask {mask_name} has {alpha.width} x {alpha.height} pixels, and {name} "
                f"{image.width} x {image.height}: they must be the same."
            )
        if alpha.getextrema()[1] < 128:
            raise ImageError(f"the mask {mask_name} is black: it is white where the thing is.")
    if alpha is None or alpha.getextrema()[0] == 255:
        return Picture(image.convert("RGB"))
    if image.mode == "RGBA" and mask is not None:
        alpha = ImageChops.multiply(alpha, image.getchannel("A"))
    image = image.convert("RGBA")
    image.putalpha(alpha)
    white = Image.new("RGBA", image.size, "white")
    return Picture(Image.alpha_composite(white, image).convert("RGB"), alpha)


def read_pictures(
    sources: PictureSource | list[PictureSource] | list[Picture],
    masks: PictureSource | list[PictureSource | None] | None = None,
    fit: str = "crop",
) -> list[Picture]:
    """All pictures of a concept, see `read_picture`; masks: one for each of them, or None.

    What this returns is taken as it is. Warns as `warn_of_backgrounds`, refuses a blank picture.
    """
    check_one_of("fit", fit, FITS)
    if isinstance(sources, list) and sources and all(isinstance(x, Picture) for x in sources):
        return sources
    sources = each_picture(sources)
    masks = [None] * len(sources) if masks is None else masks
    masks = masks if isinstance(masks, list | tuple) else each_picture(masks)
    if len(masks) != len(sources):
        raise ImageError(f"{len(sources)} pictures need as many masks, not {len(masks)}.")
    pictures = [read_picture(*pair) for pair in zip(sources, masks, strict=True)]
    for picture, source in zip(pictures, sources, strict=True):
        if all(high - low <= BLANK for low, high in picture.image.getextrema()):
            raise ImageError(f"{source.name} is blank: it shows one colour and no thing.")
    warn_of_backgrounds(pictures, fit)
    return pictures


def warn_of_backgrounds(pictures: Sequence[Picture], fit: str) -> None:
    """Warn of each picture of which a crop takes off over 40 %, or whose corners are not plain."""
    for n, picture in enumerate(pictures, 1):
        short, long = sorted(picture.image.size)
        if fit == "crop" and short < 0.6 * long:
            warnings.warn(
                f"Of picture {n} only the square in the middle is used, {short / long:.0%} of it: "
                'crop it around the thing, or fit it in with fit="pad" (--fit pad).',
                stacklevel=2,
            )
        grey = np.asarray(square(picture.image, 64, fit).convert("L"), np.float32)
        ends = (slice(8), slice(-8, None))
        busy = [grey[y, x].std() > BUSY for y in ends for x in ends]
        if picture.mask is None and sum(busy) >= 2:
            warnings.warn(
                f"The background of picture {n} is busy and may be learned with the thing: cut "
                "the thing out (a PNG with transparency), or give a mask (--mask).",
                stacklevel=2,
            )


def square(image: Image.Image, resolution: int, fit: str = "crop") -> Image.Image:
    """A square of the picture, resized with an antialiased bicubic filter.

    fit: "crop" takes the centre square of the shorter side, "pad" adds white (in a mask: black).
    A picture that already has this size comes out unchanged. Raises DTEError for another fit.
    """
    check_one_of("fit", fit, FITS)
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Cropped first: with resize(box=...) the filter would see pixels outside the square.
    if fit == "crop":
        image = image.crop((left, top, left + side, top + side))
    else:
        padded = Image.new(image.mode, (side, side), "white" if image.mode == "RGB" else 0)
        padded.paste(image, (-left, -top))
        image = padded
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)


def square_mask(picture: Picture, resolution: int, fit: str) -> Image.Image | None:
    """Where the thing is in `square` of a picture, in grey; padding is not it. None: everywhere."""
    if picture.mask is None and (fit == "crop" or len(set(picture.image.size)) == 1):
        return None
    mask = picture.mask or Image.new("L", picture.image.size, 255)
    return square(mask, resolution, fit)


def to_square_tensor(
    image: Image.Image, resolution: int, fit: str = "crop"
) -> "Float[Tensor, '3 side side']":
    """RGB picture to `square` to a float32 tensor (3, resolution, resolution) in [-1, 1]."""
    import torch

    array = np.asarray(square(image, resolution, fit), dtype=np.float32) / 127.5 - 1  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()  # (3, H, W)


def to_mask_tensor(mask: Image.Image | None, resolution: int) -> "Float[Tensor, '1 side side']":
    """A mask of `square_mask` as float32 in [0, 1]; None is 1 everywhere."""
    import torch

    if mask is None:
        return torch.ones(1, resolution, resolution)
    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)[None]


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


def _loaded(source: Named) -> Image.Image:
    """One picture, upright, RGB or RGBA."""
    _register_heif()
    file = opened(*source)
    if isinstance(file, Image.Image):
        _check_size(file, source.name)
        with _damage_reported(source.name):
            file.load()  # may have been opened lazily
            return _upright_rgb(file, source.name)
    return _decode(file, source.name)


def _register_heif() -> None:
    """iPhone's format, where the optional library for it is there."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _decode(file: BinaryIO, name: str) -> Image.Image:
    Image.init()
    if file.getvalue()[4:8] == b"ftyp" and file.getvalue()[8:12] in HEIC_BRANDS:
        if "HEIF" not in Image.OPEN:
            raise ImageError(
                f"{name} is a HEIC picture: pip install pillow-heif, or save it as JPEG."
            )
    with _damage_reported(name), warnings.catch_warnings():
        # Our own limit is checked below, and metadata oddities do not concern the user.
        warnings.simplefilter("ignore")
        formats = [f for f in FORMATS if f in Image.OPEN]  # not all are in every Pillow
        with Image.open(file, formats=formats) as image:
            _check_size(image, name)
            image.load()
            return _upright_rgb(image, name)


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
        raise ImageError(f"{name} is too large: {LIMIT}.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{name} is damaged ({reason_of(error)}): save it anew.") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is too large ({width} x {height} pixels): {LIMIT}.")
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{name} is too small ({width} x {height} pixels): each side needs at least {MIN_SIDE}."
        )


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB, or RGBA where anything says what is transparent."""
    image = _upright(image)
    if image.mode.startswith("I"):  # "I;16", "I;16B", "I": grey with more than 8 bits
        image = _from_16_bit(image, name)
    elif image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels, whose range is not known; save it with 8 bits."
        )
    elif image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be parsed says nothing about the orientation
        return image


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey (H, W) with 16 bits to 8 bits: 0 stays 0 and 65535 becomes 255."""
    array = np.asarray(image)
    if array.min() < 0 or array.max() > 65535:
        raise ImageError(f"{name} has more than 16 bits per pixel; save it with 8 or 16 bits.")
    grey = Image.fromarray(((array.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):  # the grey that is transparent
        grey.putalpha(Image.fromarray((array != clear) * np.uint8(255)))
    return grey


def to_bytes(pixels: "Float[Tensor, '*shape']") -> "UInt8[Tensor, '*shape']":
    """Pixels in [-1, 1] -> uint8, of the same shape."""
    return ((pixels.float() + 1) * 127.5).round().byte()


def to_pil(pixels: "Float[Tensor, 'batch 3 height width']") -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> list of B PIL images."""
    return [Image.fromarray(a) for a in to_bytes(pixels).permute(0, 2, 3, 1).cpu().numpy()]
