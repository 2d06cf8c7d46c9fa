"""Whatever is handed over as a picture or a setting: a result, or one sentence."""

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.images import MIN_SIDE, read_picture
from dte_lab.prompts import check_drawing, check_tuning

BOUNDED = settings(max_examples=150, deadline=None, derandomize=True, database=None)
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO")
MODES = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
MODES += ("I", "F", "I;16")
VALUES = some.one_of(
    some.none(), some.booleans(), some.integers(), some.floats(), some.text(), some.binary(),
    some.lists(some.floats(), max_size=3), some.tuples(some.floats(), some.floats()),
)  # fmt: skip


def answered(source, mask=None):
    try:
        picture = read_picture(source, mask)
    except DTEError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
    else:
        assert picture.image.mode == "RGB" and min(picture.image.size) >= MIN_SIDE
        assert picture.mask is None or picture.mask.size == picture.image.size


@BOUNDED
@given(some.data(), some.sampled_from(KINDS))
def test_changed_bytes(data, kind):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((20, 24)).save(file, format=kind)
    changed = bytearray(file.getvalue())
    for _ in range(data.draw(some.integers(1, 8))):
        changed[data.draw(some.integers(0, len(changed) - 1))] = data.draw(some.integers(0, 255))
    answered(bytes(changed[: data.draw(some.integers(1, len(changed)))]))


@BOUNDED
@given(
    arrays.arrays(
        some.sampled_from([np.dtype(kind) for kind in "?bBhHiIqQefdFD"]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=18),
        fill=some.just(0),
    )
)
def test_arrays_of_any_kind(array):
    answered(array)
    answered(np.zeros((18, 18), np.uint8), array)


@BOUNDED
@given(some.sampled_from(MODES), some.integers(1, 40), some.integers(1, 40), some.booleans())
def test_pil_pictures_of_any_mode(mode, width, height, transparent):
    image = Image.new(mode, (width, height))
    if transparent:
        image.info["transparency"] = 0
    answered(image)
    answered(Image.new("RGB", (20, 20)), image)


@BOUNDED
@given(VALUES)
def test_sources_of_any_type(value):
    answered(value)
    answered({"a": value})
    answered([value, {"content": value}])


@BOUNDED
@given(some.dictionaries(some.integers(0, 6), VALUES))
def test_settings_of_any_type(changes):
    good = [["S*"], [0], 2.0, 25, "", 0.5, 8]
    for arguments, check in ((good, check_drawing), ([12, 0.1, 8], check_tuning)):
        asked = [changes.get(i, value) for i, value in enumerate(arguments)]
        try:
            check(*asked)
        except DTEError as error:
            assert str(error).endswith(".")
