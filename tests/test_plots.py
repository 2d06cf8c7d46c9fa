"""Pictures in a grid, and figures written to files."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.common.plots import LETTERS, picture_grid, save_figure, wrapped
from dte_lab.common.stats import mean_and_error

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]
PICTURES = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]


def saved(figure, path):
    """The figure's PNG at 100 dots per inch, as an array (H, W, 3)."""
    save_figure(figure, path, dpi=100)
    return np.asarray(Image.open(path).convert("RGB"), int)


def box_of(sheet, colour):
    """Bounding box (left, top, right, bottom) of all pixels that are near a colour."""
    mask = (abs(sheet - np.array(colour)) <= 2).all(-1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


def test_picture_grid_draws_each_picture_in_its_place():
    figure = picture_grid([PICTURES[:3], PICTURES[3:]], list("abc"), ["first", "second"])
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "", "", "second", "", ""]
    for ax, picture in zip(figure.axes, PICTURES, strict=True):
        assert np.array_equal(ax.get_images()[0].get_array(), np.asarray(picture))


@pytest.mark.parametrize(
    ("rows", "columns", "labels"),
    [
        ([PICTURES[:2]], "abc", None),
        ([PICTURES[:3], PICTURES[:2]], "abc", None),
        ([PICTURES[:2]], "ab", ["one", "two"]),
        ([PICTURES[:2], PICTURES[:2]], "ab", ["one"]),
    ],
)
def test_labels_must_match(rows, columns, labels):
    with pytest.raises(ValueError):
        picture_grid(rows, list(columns), labels)


def test_pictures_stand_in_reading_order_all_of_one_size(tmp_path):
    rows = [PICTURES[:2], PICTURES[2:4]]
    sheet = saved(picture_grid(rows, ["input", "tuned"], ["S* one", "S* two"]), tmp_path / "a.png")
    first, second, third, fourth = (box_of(sheet, colour) for colour in COLOURS[:4])
    for left, top, right, bottom in (first, second, third, fourth):
        assert 130 < right - left == pytest.approx(bottom - top, abs=2)  # of 145 pixels a column
    assert first[0] == third[0] < second[0] == fourth[0]
    assert first[1] == second[1] < third[1] == fourth[1]
    assert tuple(sheet[2, 2]) == (255, 255, 255)


def test_wide_pictures_keep_their_shape(tmp_path):
    wide = Image.new("L", (512, 256), 90).convert("RGB")
    sheet = saved(picture_grid([[wide, PICTURES[0]]], ["input", "tuned"]), tmp_path / "a.png")
    left, top, right, bottom = box_of(sheet, (90, 90, 90))
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.08)


@pytest.mark.parametrize("label", ["S* on the beach", "S* " + "a very long prompt " * 30, "W" * 99])
def test_labels_stand_beside_the_pictures_and_make_them_no_smaller(label):
    figure = picture_grid([PICTURES[:2]] * 2, ["input", "tuned\nseed 7"], [label, "S*"])
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [ax.get_window_extent() for ax in figure.axes]
    assert min(box.width for box in boxes) > 1.3 * figure.dpi
    for ax, box in zip(figure.axes, boxes, strict=True):
        title, beside = ax.title.get_window_extent(), ax.yaxis.label.get_window_extent()
        assert not ax.get_title() or box.y1 < title.y0 < title.y1 <= height
        assert not ax.get_ylabel() or 0 <= beside.x0 < beside.x1 < box.x0
        assert not ax.get_ylabel() or box.y0 < beside.y0 < beside.y1 < box.y1


def test_long_labels_are_wrapped_and_cut():
    lines = wrapped("S* " + "a very long prompt " * 30, lines=4).splitlines()
    assert len(lines) == 4 and lines[-1].endswith("…")
    assert all(len(line) <= LETTERS for line in lines)
    assert wrapped("S* at  night") == "S* at night"
    pieces = wrapped("y" * 60).splitlines()
    assert "".join(pieces) == "y" * 60 and len(pieces) > 1


def test_labels_are_text_in_any_script_and_never_a_formula(tmp_path):
    labels = ["S* for $\\frac$", "夜の S*"]
    figure = picture_grid([PICTURES[:1]] * 2, ["$x^$"], labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "a.png")


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    save_figure(Figure((2, 1)), path, dpi=50, metadata={"Source": "me"})
    picture = Image.open(path)
    assert picture.size == (100, 50) and picture.info["Source"] == "me"
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure((1, 1)), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_mean_and_error_are_what_errorbar_draws():
    intervals = [{"mean": 2.0, "low": 1.5, "high": 4.0}, {"mean": 0.0, "low": -1.0, "high": 0.0}]
    mean, error = mean_and_error(iter(intervals))
    np.testing.assert_allclose(mean, [2, 0])
    np.testing.assert_allclose(error, [[0.5, 1], [2, 0]])
    assert mean_and_error([])[1].shape == (2, 0)
