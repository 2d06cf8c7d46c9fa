import numpy as np
import pytest
from PIL import Image

from dte_lab.common.plots import _font, _wrap, contact_sheet
from dte_lab.common.stats import mean_and_error


def box_of(sheet, colour):
    """Bounding box (left, top, right, bottom) of all pixels of one colour."""
    mask = (np.asarray(sheet) == np.array(colour)).all(-1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


def test_pictures_stand_in_reading_order_at_three_times_their_size():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = contact_sheet([pictures[:2], pictures[2:]], ["S* one", "S* two"], ["input", "tuned"])
    boxes = [box_of(sheet, colour) for colour in colours]
    for left, top, right, bottom in boxes:  # 192 px less the hairline on each side
        assert (right - left + 1, bottom - top + 1) == (190, 190)
    first, second, third, fourth = boxes
    assert first[0] == third[0] < second[0] == fourth[0]
    assert first[1] == second[1] < third[1] == fourth[1]
    assert sheet.getpixel((2, 2)) == (255, 255, 255)


def test_labels_are_drawn_and_change_the_sheet():
    picture = Image.new("RGB", (64, 64), (200, 0, 0))
    plain = contact_sheet([[picture]], [""], [" "])
    labelled = contact_sheet([[picture]], ["S* on the beach"], ["input"])
    assert plain.size == labelled.size
    difference = np.abs(np.asarray(plain, int) - np.asarray(labelled, int)).sum(-1) > 0
    left, top, _, _ = box_of(labelled, (200, 0, 0))
    assert difference[:, : left - 1].any()  # the prompt, to the left of the picture
    assert difference[: top - 1].any()  # the heading, above it
    assert not difference[top:, left:].any()  # no label touches a picture


def test_gaps_wide_pictures_and_other_modes():
    wide = Image.new("L", (512, 256), 90)
    sheet = contact_sheet([[None, wide]], ["S*"], ["input", "tuned"])
    left, top, right, bottom = box_of(sheet, (90, 90, 90))
    assert (right - left + 1, bottom - top + 1) == (190, 94)


def test_long_labels_are_wrapped_and_cut():
    font = _font(16)
    text = _wrap("S* " + "a very long prompt " * 30 + "x" * 200, font, 192, max_lines=4)
    lines = text.splitlines()
    assert len(lines) == 4 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 192 for line in lines)
    assert _wrap("S* at  night", font, 192, max_lines=4) == "S* at night"
    pieces = _wrap("y" * 60, font, 192, max_lines=9).splitlines()
    assert "".join(pieces) == "y" * 60 and len(pieces) > 1


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels"),
    [([], [], ["a"]), ([[None]], ["a", "b"], ["a"]), ([[None]], ["a"], ["a", "b"])],
)
def test_labels_must_match(rows, row_labels, column_labels):
    with pytest.raises(ValueError, match=r"rows of pictures|pictures in a row"):
        contact_sheet(rows, row_labels, column_labels)


def test_mean_and_error_are_what_errorbar_draws():
    intervals = [{"mean": 2.0, "low": 1.5, "high": 4.0}, {"mean": 0.0, "low": -1.0, "high": 0.0}]
    mean, error = mean_and_error(iter(intervals))
    np.testing.assert_allclose(mean, [2, 0])
    np.testing.assert_allclose(error, [[0.5, 1], [2, 0]])
    assert mean_and_error([])[1].shape == (2, 0)
