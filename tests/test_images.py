"""What can sensibly be read is read; everything else is one clear sentence."""

import io
import struct
import sys
import warnings
import zlib
from datetime import datetime
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
import torch
from ipywidgets import FileUpload
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.images import (
    MIN_SIDE,
    ImageError,
    Picture,
    read_image,
    read_picture,
    read_pictures,
    save_png,
    square,
    square_mask,
    to_bytes,
    to_pil,
    to_square_tensor,
    warn_of_backgrounds,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(size=(64, 48)) -> Image.Image:
    """Red and green above, blue and white below: shows every rotation and flip."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, WHITE])
    return image.resize(size, Image.Resampling.NEAREST)


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    """Colours inside the four corners: upper left, upper right, lower left, lower right."""
    width, height = image.size
    return [image.getpixel((x, y)) for y in (4, height - 5) for x in (4, width - 5)]


def assert_colours(actual, expected, tolerance):
    assert np.abs(np.array(actual, int) - np.array(expected, int)).max() <= tolerance


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, followed by next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("tiff", {}, 0),
        ("ppm", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("jpg", {"quality": 95, "subsampling": 0}, 3),
        ("gif", {}, 3),
    ],
)
def test_formats_are_read(tmp_path, suffix, options, tolerance):
    path = tmp_path / f"picture.{suffix}"
    quadrants().save(path, **options)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (64, 48)
    assert_colours(corners(image), [RED, GREEN, BLUE, WHITE], tolerance)


def test_path_string_file_and_image_give_the_same_picture(tmp_path):
    path = tmp_path / "picture.png"
    quadrants().save(path)
    expected = read_image(path).tobytes()
    assert read_image(str(path)).tobytes() == expected
    assert read_image(io.BytesIO(path.read_bytes())).tobytes() == expected
    assert read_image(Image.open(path)).tobytes() == expected


@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (6, Image.Transpose.ROTATE_90),  # the reader turns it clockwise
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_undone(tmp_path, orientation, stored_as):
    stored = quadrants() if stored_as is None else quadrants().transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    stored.save(path, exif=exif, quality=95, subsampling=0)
    image = read_image(path)
    assert image.size == (64, 48)
    assert_colours(corners(image), [RED, GREEN, BLUE, WHITE], 3)


def test_unreadable_exif_is_ignored(tmp_path):
    path = tmp_path / "picture.jpg"
    quadrants().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk", quality=95, subsampling=0)
    assert_colours(corners(read_image(path)), [RED, GREEN, BLUE, WHITE], 3)


def test_transparency_is_put_on_white(tmp_path):
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    half.paste((0, 0, 0, 0), (0, 0, 16, 32))  # invisible black becomes white, not black
    half.save(tmp_path / "rgba.png")
    image = read_image(tmp_path / "rgba.png")
    assert image.getpixel((4, 16)) == WHITE
    assert_colours(image.getpixel((28, 16)), (255, 127, 127), 1)

    half.convert("LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").getpixel((4, 16)) == WHITE


def test_palette_with_alpha_is_put_on_white(tmp_path):
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(1, (16, 0, 32, 32))
    image.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    image.save(tmp_path / "palette.gif", transparency=0)
    for name in ("palette.png", "palette.gif"):
        read = read_image(tmp_path / name)
        assert (read.getpixel((4, 16)), read.getpixel((28, 16))) == (WHITE, BLUE)


def test_colour_key_transparency_of_an_rgb_png(tmp_path):
    quadrants().save(tmp_path / "key.png", transparency=RED)
    assert corners(read_image(tmp_path / "key.png")) == [WHITE, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.tile(ramp, (32, 1))).save(path)
    row = np.asarray(read_image(path))[0].astype(int)  # (32, 3)
    assert np.abs(row - np.round(ramp / 257).astype(int)[:, None]).max() <= 1
    assert row[0, 0] == 0 and row[-1, 0] == 255


def test_16_bit_rgb_png_is_scaled(tmp_path):
    """Written by hand, since Pillow does not write this common format."""
    pixel = struct.pack(">HHH", 65535, 32768, 0)
    rows = (b"\0" + pixel * 32) * 32

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert_colours(read_image(path).getpixel((5, 5)), (255, 128, 0), 1)


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_is_converted(tmp_path, suffix):
    path = tmp_path / f"print.{suffix}"
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(path)
    assert_colours(read_image(path).getpixel((5, 5)), RED, 3)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white(tmp_path, mode):
    Image.new(mode, (32, 32), 1 if mode == "1" else 200).save(tmp_path / "grey.png")
    value = 255 if mode == "1" else 200
    assert read_image(tmp_path / "grey.png").getpixel((5, 5)) == (value,) * 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"moving.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 3
    assert read_image(path).getpixel((5, 5)) == RED


def test_smallest_size_is_accepted(tmp_path):
    quadrants((MIN_SIDE, MIN_SIDE)).save(tmp_path / "small.png")
    assert read_image(tmp_path / "small.png").size == (MIN_SIDE, MIN_SIDE)


def bad_files(folder):
    """(name, words of the message) of files that cannot be used."""
    (folder / "text.png").write_text("not a picture\n" * 50)
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "huge.png").write_bytes(png_header(20_000, 20_000))
    (folder / "large.png").write_bytes(png_header(10_001, 10_000))
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (400, MIN_SIDE - 1)).save(folder / "thin.png")
    Image.new("F", (32, 32)).save(folder / "float.tiff")
    Image.fromarray(np.full((32, 32), 1_000_000, np.int32)).save(folder / "int.tiff")
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for suffix in ("jpg", "png", "webp", "gif", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format={"jpg": "jpeg"}.get(suffix, suffix))
        data = buffer.getvalue()
        (folder / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
    return {
        "missing.png": "does not exist",
        "folder.png": "is a folder",
        "text.png": "not a picture",
        "empty.png": "is empty",
        "dot.png": "too small (1 x 1",
        "thin.png": "too small",
        "huge.png": "too large",
        "large.png": "too large (10001 x 10000",
        "float.tiff": "floating-point",
        "int.tiff": "more than 16 bits",
        "postscript.png": "not a picture",
        **{f"truncated.{s}": "damaged" for s in ("jpg", "png", "webp", "gif", "bmp")},
    }


def test_bad_files_are_answered_in_one_line(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
            pytest.fail(f"{name} was read")
        message = str(caught.value)
        assert words in message and name in message and "\n" not in message
        assert message.endswith("."), message


def test_damaged_files_never_raise_anything_else():
    """Flip bytes of small files of every format: a picture comes out, or an ImageError."""
    rng = np.random.default_rng(0)
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "ico"):
        buffer = io.BytesIO()
        quadrants((32, 32)).save(buffer, format=kind)
        clean = np.frombuffer(buffer.getvalue(), np.uint8)
        for _ in range(60):
            data = clean.copy()
            where = rng.integers(0, min(len(data), 400), 6)
            data[where] = rng.integers(0, 256, 6)
            try:
                image = read_image(io.BytesIO(data.tobytes()))
            except ImageError as error:
                assert "\n" not in str(error)
            else:
                assert image.mode == "RGB" and min(image.size) >= MIN_SIDE


def test_square_tensor_keeps_the_centre():
    image = Image.new("RGB", (192, 64), BLUE)
    image.paste(RED, (64, 0, 128, 64))
    for upright in (image, image.transpose(Image.Transpose.ROTATE_90)):
        tensor = to_square_tensor(upright, 32)
        assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
        assert torch.equal(tensor[0], torch.ones(32, 32))  # red everywhere
        assert torch.equal(tensor[2], -torch.ones(32, 32))


def test_square_tensor_is_exact_at_the_same_size_and_antialiased_when_smaller():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tensor = to_square_tensor(Image.fromarray(noise), 64)
    assert np.array_equal(((tensor + 1) * 127.5).round().numpy().transpose(1, 2, 0), noise)

    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    small = to_square_tensor(Image.fromarray(stripes), 64)
    assert small.abs().max() < 0.1  # mid-grey; without antialiasing it would be black or white


def test_tensors_become_pictures_with_rounding_and_each_in_its_place():
    levels = torch.arange(256) / 127.5 - 1
    assert torch.equal(to_bytes(levels + 0.49 / 127.5)[:-1], torch.arange(255, dtype=torch.uint8))
    assert torch.equal(to_bytes(levels[1:] - 0.49 / 127.5), torch.arange(1, 256).byte())
    pictures = [quadrants((8, 4)), quadrants((8, 4)).transpose(Image.Transpose.ROTATE_180)]
    arrays = np.stack([np.asarray(picture) for picture in pictures])  # (2, 4, 8, 3)
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
    assert [p.tobytes() for p in to_pil(pixels)] == [p.tobytes() for p in pictures]


def test_save_png_round_trip_and_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "out" / "picture.png"
    save_png(quadrants(), path)
    before = path.read_bytes()
    assert read_image(path).tobytes() == quadrants().tobytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (64, 64)), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def noise(height=24, width=20, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def upload(*contents):
    """A widget into which files have been put; ipywidgets 7 has them by name."""
    files = [
        {"name": f"{n}.png", "type": "image/png", "size": len(x), "content": memoryview(x),
         "last_modified": datetime.now()}
        for n, x in enumerate(contents)
    ]  # fmt: skip
    widget = FileUpload(multiple=True)
    known = int(ipywidgets.__version__.split(".")[0]) > 7
    widget.set_trait("value", files if known else {file["name"]: file for file in files})
    return widget


RGB, GREY = noise(), noise(channels=0)
SOURCES = {  # every way to hand over the same picture
    "array": RGB,
    "channels first": RGB.transpose(2, 0, 1),
    "not contiguous": np.repeat(RGB, 2, axis=1)[:, ::2],
    "float": RGB / 255,
    "float32": (RGB / 255).astype(np.float32),
    "opaque RGBA": np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)]),
    "tensor": torch.from_numpy(RGB).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy(RGB),
    "tensor, float with a gradient": (torch.from_numpy(RGB) / 255).requires_grad_(),
    "tensor, bfloat16 is too coarse, float64 not": torch.from_numpy(RGB).double() / 255,
    "bytes": png(RGB),
    "bytearray": bytearray(png(RGB)),
    "memoryview": memoryview(png(RGB)),
    "ipywidgets 7": {"a.png": {"metadata": {"name": "a.png"}, "content": png(RGB)}},
    "ipywidgets 8": ({"name": "a.png", "type": "image/png", "content": memoryview(png(RGB))},),
    "Colab": {"a.png": png(RGB)},
    "FileUpload itself": upload(png(RGB)),
    "FileUpload of ipywidgets 7": SimpleNamespace(
        accept="image/*", value={"a.png": {"metadata": {"name": "a.png"}, "content": png(RGB)}}
    ),
    "list": [RGB],
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_notebooks_hand_over_is_read(name):
    assert np.array_equal(np.asarray(read_image(SOURCES[name])), RGB)
    with pytest.warns(UserWarning, match="busy"):  # one door leads to the other
        [picture] = read_pictures(SOURCES[name])
    assert np.array_equal(np.asarray(picture.image), RGB)


def test_uploads_are_pictures_and_masks():
    mask = np.zeros(RGB.shape[:2], np.uint8)
    mask[4:9, 5:11] = 255
    two = upload(png(RGB), png(255 - RGB))
    found = read_pictures(two, upload(png(mask), png(255 - mask)))
    assert [np.asarray(picture.mask).mean() for picture in found] == [
        mask.mean(),
        255 - mask.mean(),
    ]
    assert np.array_equal(np.asarray(found[1].image)[0, 0], 255 - RGB[0, 0])
    assert len(read_pictures({"a.png": png(RGB), "b.png": png(RGB)}, [mask, None])) == 2
    for nothing in (upload(), (), {}, []):
        with pytest.raises(ImageError, match="At least one picture"):
            read_pictures(nothing)
    with pytest.raises(ImageError, match="1.png is not a picture"):
        read_pictures(upload(png(RGB), b"abc"))


def test_grey_arrays_and_masks_of_truth_values_are_read():
    for source in (GREY, GREY[..., None], GREY[None], torch.from_numpy(GREY)[None], GREY / 255):
        assert np.array_equal(np.asarray(read_image(source)), np.dstack([GREY] * 3))
    assert np.array_equal(np.asarray(read_image(GREY > 99))[..., 0], (GREY > 99) * 255)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (RGB.astype(np.int64), "is of int64"),
        (RGB.astype(np.uint16), "is of uint16"),
        (torch.from_numpy(RGB).long(), "from 0 to 1"),
        (RGB / 127.5 - 1, "not from 0 to 1"),
        (np.full((20, 20, 3), np.nan), "not from 0 to 1"),
        (np.zeros((0, 20, 3), np.uint8), "is empty"),
        (np.zeros((2, 20, 20, 3), np.uint8), "has the shape (2, 20, 20, 3)"),
        (np.zeros((20, 20, 5), np.uint8), "has the shape"),
        (np.zeros((20, 20, 3), object), "is of object"),
        (np.zeros((20, 20, 3), complex), "is of complex"),
        (np.zeros(300, np.uint8), "has the shape"),
        (np.zeros((8, 8, 3), np.uint8), "too small (8 x 8"),
        (b"abc", "not a picture"),
        (b"", "is empty"),
        (io.StringIO("abc"), "open as text"),
        (3, "not int"),
        (None, "not NoneType"),
        ([], "At least one picture"),
        ({}, "At least one picture"),
        ((), "At least one picture"),
        ([RGB, RGB], "One picture is needed here, not 2"),
        ({"a.png": {"content": b"abc"}}, "a.png is not a picture"),
        ({"a.png": b""}, "a.png is empty"),
        ("a\0b.png", "does not exist"),
        ("n" * 300, "cannot be read"),
        ("n/" * 3000, "cannot be read"),
        (b"P2\n" + b"# comment\n" * 200_000, "plain text and too large"),
    ],
)
def test_what_is_no_picture_is_answered_in_one_line(source, words):
    with pytest.raises(ImageError) as caught:
        read_image(source)
    message = str(caught.value)
    assert words in message and "\n" not in message and message.endswith(".")


def test_a_file_of_more_bytes_than_any_picture_needs_is_refused(tmp_path):
    with (tmp_path / "sparse.gif").open("wb") as file:
        file.write(b"GIF89a")
        file.truncate(100_000_001)
    with pytest.raises(ImageError, match="at most 100 MB"):
        read_image(tmp_path / "sparse.gif")
    with (tmp_path / "sparse.gif").open("rb") as file:
        with pytest.raises(ImageError, match="at most 100 MB"):
            read_image(file)


def test_a_lazily_opened_broken_picture_and_premultiplied_alpha():
    with pytest.raises(ImageError, match="damaged"):
        read_image(Image.open(io.BytesIO(png(RGB)[:-200])))
    pale = Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)]), "LA")
    assert np.array_equal(np.asarray(read_image(pale.convert("La")))[..., 0], GREY)


def test_the_transparent_grey_of_a_16_bit_png_becomes_white(tmp_path):
    deep = np.full((20, 20), 257 * 40, np.uint16)
    deep[:, 10:] = 7
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=7)
    row = np.asarray(read_image(tmp_path / "deep.png"))[3, :, 0]
    assert row.tolist() == [40] * 10 + [255] * 10


def test_heic_is_read_with_its_library_and_named_without(tmp_path, monkeypatch):
    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50)
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="phone.heic is a HEIC picture: pip install pillow-heif"):
        read_image(path)
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    quadrants().save(path, format="HEIF", quality=95)
    assert_colours(corners(read_image(path)), [RED, GREEN, BLUE, WHITE], 6)


def cut_out() -> Image.Image:
    """A red thing in the middle of transparent noise: (48, 32), opaque from 12 to 36."""
    alpha = np.zeros((32, 48), np.uint8)
    alpha[8:24, 12:36] = 255
    image = Image.fromarray(noise(32, 48))
    image.paste(RED, (12, 8, 36, 24))
    image.putalpha(Image.fromarray(alpha))
    return image


def test_transparency_or_a_mask_says_what_the_thing_is():
    transparent, alpha = cut_out(), cut_out().getchannel("A")
    by_alpha = read_picture(transparent)
    assert by_alpha.mask.tobytes() == alpha.tobytes()
    opaque = transparent.convert("RGB")
    assert read_picture(opaque).mask is None
    for mask in (alpha, np.asarray(alpha) > 0, transparent, png(np.asarray(alpha))):
        by_mask = read_picture(opaque, mask)
        assert by_mask.mask.tobytes() == alpha.tobytes()
        assert by_mask.image.tobytes() == by_alpha.image.tobytes()
    assert by_mask.image.getpixel((2, 2)) == WHITE and by_mask.image.getpixel((20, 20)) == RED


def test_a_mask_that_does_not_fit_is_answered():
    with pytest.raises(ImageError, match="48 x 32"):
        read_picture(RGB, cut_out())
    with pytest.raises(ImageError, match="is black"):
        read_picture(RGB, np.zeros(RGB.shape[:2], bool))
    with pytest.raises(ImageError, match="2 pictures need as many masks, not 1"):
        read_pictures([RGB, RGB], RGB)


@pytest.mark.parametrize("image", [Image.new("RGB", (20, 30), RED), Image.new("RGBA", (20, 30))])
def test_a_blank_picture_is_refused(image):
    with pytest.raises(ImageError, match="is blank"):
        read_pictures(image)


def test_a_padded_picture_is_whole_and_its_padding_is_not_the_thing():
    image = Image.fromarray(noise(16, 32))
    padded = square(image, 32, "pad")
    assert padded.crop((0, 8, 32, 24)).tobytes() == image.tobytes()
    assert padded.getpixel((5, 7)) == padded.getpixel((5, 24)) == WHITE
    mask = np.asarray(square_mask(Picture(image), 32, "pad"))
    assert mask[8:24].min() == 255 and mask[:8].max() == mask[24:].max() == 0
    assert square_mask(Picture(image), 32, "crop") is None
    assert square_mask(Picture(padded), 32, "pad") is None
    marked = read_picture(cut_out())
    cropped = np.asarray(square_mask(marked, 32, "crop"))  # columns 8 to 40 of 48
    assert cropped[16, 4:28].min() == 255 and cropped[16, :4].max() == 0 == cropped[16, 28:].max()
    for wrong in ("stretch", np.array(["crop", "pad"]), None):
        with pytest.raises(DTEError, match="fit is one of crop, pad"):
            square(image, 32, wrong)
        with pytest.raises(DTEError, match="fit is one of crop, pad"):
            read_pictures(image, fit=wrong)


def warned(picture: Picture, fit: str = "crop") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_backgrounds([picture], fit)
    return [str(w.message) for w in caught]


def test_a_crop_that_throws_away_much_and_a_busy_background_are_told():
    plain = Image.new("RGB", (100, 59), "white")
    assert "Of picture 1 only" in warned(Picture(plain))[0] and "59%" in warned(Picture(plain))[0]
    assert warned(Picture(plain), "pad") == []
    assert warned(Picture(plain.resize((100, 60)))) == []
    busy = Image.fromarray(noise(64, 64))
    assert "background of picture 1 is busy" in warned(Picture(busy))[0]
    assert warned(Picture(busy, Image.new("L", (64, 64), 255))) == []


def test_pictures_that_were_read_are_taken_as_they_are(recwarn):
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    pictures = read_pictures([noise], [np.full((40, 80), 255, np.uint8)])
    assert len(recwarn) == 1 + 1 and pictures[0].mask is None  # an all-white mask says nothing
    recwarn.clear()
    assert read_pictures(pictures) is pictures and not recwarn
