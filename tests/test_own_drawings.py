"""A folder of drawings: what is cut out of them, the pairs, a fresh encoder's first words."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dte_lab.common.errors import DTEError
from dte_lab.encoder import TuningEncoder
from dte_lab.evaluation import own_encoder
from dte_lab.training import drawings
from dte_lab.training.drawings import DrawingPairs, cut_thing, fit_first_words, words_on_white
from dte_lab.world.scenes import BOX, SCENES, render_image
from dte_lab.world.sprites import sprite


def on_paper(path, colour="#204080", paper="#fbf7ee"):
    """An ellipse, 60 x 30 pixels, with a white hole in it, off the middle of a sheet."""
    image = Image.new("RGB", (200, 120), paper)
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 40, 79, 69), fill=colour)
    draw.rectangle((45, 50, 54, 59), fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def test_of_paper_the_thing_is_cut_out_as_large_as_it_fits(tmp_path):
    rgba = cut_thing(on_paper(tmp_path / "eye" / "0.png"))
    assert rgba.shape == (48, 48, 4)
    rows, columns = np.nonzero(rgba[..., 3] > 0.5)
    assert columns.min() <= 1 and columns.max() >= 46, "as wide as the box"
    assert 10 <= rows.min() <= 14 and 34 <= rows.max() <= 37, "padded above and below alike"
    assert np.allclose(rgba[24, 8], [0x20 / 255, 0x40 / 255, 0x80 / 255, 1], atol=0.02)
    assert np.allclose(rgba[24, 24], 1, atol=0.05), "a white hole is no paper"
    assert (rgba[2] == 0).all() and (rgba[..., :3] <= rgba[..., 3:]).all(), "premultiplied"


def test_of_a_transparent_drawing_its_own_edge_is_kept(tmp_path):
    rgba = sprite("cupcake", "noto", 48)
    straight = np.divide(
        rgba[..., :3], rgba[..., 3:], where=rgba[..., 3:] > 0, out=0 * rgba[..., :3]
    )
    pixels = np.concatenate([straight, rgba[..., 3:]], axis=2)
    path = tmp_path / "cupcake.png"
    Image.fromarray((255 * pixels + 0.5).astype(np.uint8)).save(path)
    rows, columns = np.nonzero(rgba[..., 3])
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    found = cut_thing(path)
    if side == 48:  # nothing was resized
        assert np.abs(found - rgba).mean() < 0.01
    assert found[..., 3].mean() == pytest.approx(rgba[..., 3].mean() * (48 / side) ** 2, rel=0.03)


def test_a_blank_sheet_and_an_empty_folder_are_told(tmp_path):
    Image.new("RGB", (50, 50), "#eeeeee").save(tmp_path / "blank.png")
    with pytest.raises(DTEError, match="blank.png shows nothing but paper"):
        cut_thing(tmp_path / "blank.png")
    with pytest.raises(DTEError, match="no sub-folders with drawings"):
        DrawingPairs(tmp_path)


@pytest.fixture
def folder(tmp_path):
    own_encoder.stand_in(tmp_path / "drawings", things=6)
    return tmp_path / "drawings"


def test_the_stand_in_shows_other_things_than_are_judged_by(folder):
    seen = {path.name for path in folder.iterdir()}
    assert len(seen) == 6 and not seen & set(own_encoder.held_out_pictures(60))


def test_items_are_pure_functions_of_their_number(folder):
    first, again = (DrawingPairs(folder, seed=3) for _ in range(2))
    for k in (0, 7):
        a, b = first[k], again[k]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])
        assert (a["prompt"], a["concept"]) == (b["prompt"], b["concept"])
    assert not torch.equal(first[0]["image"], DrawingPairs(folder, seed=4)[0]["image"])
    with pytest.raises(IndexError):
        DrawingPairs(folder, length=5)[5]


def test_a_pair_shows_two_scenes_and_asks_for_the_second(folder, monkeypatch):
    calls = []

    def pair(draw, say, first, second):
        calls.append((first, second))
        return drawings.training_pair(draw, say, first, second)

    def same_thing(rgba, scene, rng):  # its background alone, of one colour each
        return np.full((64, 64, 3), SCENES.index(scene), np.uint8)

    monkeypatch.setattr(drawings, "in_scene", same_thing)
    pairs = DrawingPairs(folder, pair=pair)
    others = 0
    for k in range(40):
        item = pairs[k]
        first, second = calls[-1]
        shown = [round((item[x].mean().item() + 1) * 127.5) for x in ("image", "target")]
        if item["prompt"] == "a picture of S*":
            assert shown == [SCENES.index(first)] * 2
        else:
            others += 1
            assert shown == [SCENES.index(first), SCENES.index(second)]
            assert item["prompt"] == drawings.caption("S*", None, second)
    assert 22 <= others <= 38  # three quarters of 40


def test_other_things_have_other_numbers(folder):
    pairs = DrawingPairs(folder, things=2)
    assert pairs.names == sorted(p.name for p in folder.iterdir())[:2]
    rng = np.random.default_rng(0)
    numbers = {}
    for _ in range(200):
        rgba, number = pairs.thing(rng)
        numbers.setdefault(number, rgba)
        assert np.array_equal(numbers[number], rgba)
    assert len(numbers) > 50


def test_first_words_are_those_of_pictures(small_pipe, folder):
    pairs = DrawingPairs(folder)
    things = [Image.fromarray(drawings.in_scene(rgba, "white", np.random.default_rng(0)))
              for rgba in pairs.sprites]  # fmt: skip
    encoder = own_encoder.fresh_encoder(small_pipe)
    before = own_encoder.unexplained(small_pipe, encoder, things)
    fit_first_words(encoder, small_pipe.backbone, pairs, pictures=256)
    after = own_encoder.unexplained(small_pipe, encoder, things)
    assert after < 0.6 < before


def test_unexplained_is_one_for_the_mean_word(small_pipe, monkeypatch):
    things = [render_image(name, "noto", "white") for name in ("cupcake", "tractor")]
    truth = words_on_white(small_pipe.backbone, small_pipe.pixels(things))
    mean = truth.mean(0, keepdim=True)
    for words, expected in (([mean] * 2, 1), ([truth[:1], truth[1:]], 0)):
        words = iter(words)

        def predict(self, *args, words=words, **options):
            return type("Prediction", (), {"v_star": next(words)})

        monkeypatch.setattr(TuningEncoder, "predict", predict)
        found = own_encoder.unexplained(small_pipe, small_pipe.encoder, things)
        assert found == pytest.approx(expected, abs=1e-5)


def test_what_is_drawn_is_measured_on_white_and_on_the_beach(small_pipe, monkeypatch):
    thing = render_image("cupcake", "noto", "white")
    beach = render_image("cupcake", "noto", "beach")
    dark = Image.fromarray((np.asarray(thing) * 0.5).astype(np.uint8))
    drawn = iter([[[thing], [beach]], [[dark], [thing]]])

    def generate(self, concept, prompts, **options):
        assert prompts == list(own_encoder.ASKED.values()) and options["alpha_blend"] == 1
        return next(drawn)

    monkeypatch.setattr(type(small_pipe), "generate", generate)
    found = own_encoder.draw_unseen(small_pipe, small_pipe.encoder, [thing, thing])
    assert found.right == [True, False]
    difference = (np.asarray(thing, float) - np.asarray(dark, float)) / 255
    assert found.distances == pytest.approx([0, np.sqrt((difference**2).mean())], abs=1e-4)
    assert found.pictures[0] == {"white": thing, "beach": beach}


def test_a_thing_fills_its_box(folder):
    pairs, rng = DrawingPairs(folder), np.random.default_rng(0)
    picture = drawings.in_scene(pairs.sprites[0], "green", rng)
    empty = drawings.in_scene(0 * pairs.sprites[0], "green", np.random.default_rng(0))
    changed = (picture != empty).any(axis=2)
    around = np.ones_like(changed)
    around[BOX, BOX] = False
    assert not changed[around].any()
    assert changed[BOX, BOX].any(axis=0).mean() > 0.9 or changed[BOX, BOX].any(axis=1).mean() > 0.9
