"""The figures of 01_features show what they are given, and the panel's widgets redraw it."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dte_lab.panels import features

FRACTIONS = (0.0, 0.5, 1.0)


def image_in(ax):
    return np.asarray(ax.get_images()[0].get_array())


def test_principal_maps_separate_what_differs_and_have_unit_scale():
    rng = np.random.default_rng(0)
    where = rng.integers(0, 2, (6, 4, 4))  # two kinds of positions, far apart in one direction
    direction = rng.normal(size=(1, 10, 1, 1))
    maps = 5 * where[:, None] * direction + rng.normal(size=(6, 10, 4, 4))
    components = features.principal_maps(maps)
    assert components.shape == (6, 4, 4, 3)
    np.testing.assert_allclose(components.std((0, 1, 2), ddof=1), 1, rtol=1e-5)
    first = components[..., 0]
    means = first[where == 0].mean(), first[where == 1].mean()
    assert abs(means[0] - means[1]) > 1.5

    colours = features.as_colours(np.array([-9.0, -2, 0, 2, 9]))
    np.testing.assert_allclose(colours, [0, 0, 0.5, 1, 1])


def test_map_grid_gives_the_single_maps_of_a_row_one_scale():
    picture = Image.new("RGB", (8, 8), (200, 10, 10))
    colours, low, high = np.full((2, 2, 3), 0.5), np.zeros((2, 2)), np.full((2, 2), 7.0)
    figure = features.map_grid([[picture, colours], [low, high]], ["a", "b"], ["first", "second"])
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "", "second", ""]
    for ax, shown in zip(figure.axes, (picture, colours, low, high), strict=True):
        assert np.array_equal(image_in(ax), np.asarray(shown))
    for ax in figure.axes[2:]:
        assert ax.get_images()[0].get_clim() == (0, 7)


def test_linear_cka_is_the_formula_by_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 9)) + 3
    y[:, :2] += 2 * x[:, :2]
    a, b = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    expected = norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    assert features.linear_cka(x, y) == pytest.approx(expected)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert features.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)


def test_neighbours_alike_leaves_out_the_same_thing():
    """Two clumps; in each, every thing has two pictures, and styles are mixed within a thing."""
    clump = np.repeat([0, 1], 6)
    thing = np.arange(12) // 2
    style = np.tile(["x", "y"], 6)
    rng = np.random.default_rng(0)
    points = np.eye(2)[clump] + 0.01 * rng.normal(size=(12, 2))
    assert features.neighbours_alike(points, clump, thing, k=4) == 1
    assert features.neighbours_alike(points, style, thing, k=4) == 0.5
    assert features.neighbours_alike(points, thing, thing, k=4) == 0


def test_similarity_figure_writes_each_value_into_its_cell():
    between = np.array([[1, 0.25, 0.1], [0.25, 1, 0.5], [0.1, 0.5, 1]])
    figure = features.similarity_figure(FRACTIONS, between, {"CLIP": ([0.9, 0.5, 0.1], None)})
    left, right = figure.axes
    assert np.array_equal(image_in(left), between)
    assert [t.get_text() for t in left.texts[:3]] == ["1.00", "0.25", "0.10"]
    assert list(right.get_lines()[0].get_ydata()) == [0.9, 0.5, 0.1]


def test_umap_figure_marks_labels_by_shape_as_well_as_colour():
    points = {"CLIP": np.arange(8.0).reshape(4, 2), "UNet": -np.arange(8.0).reshape(4, 2)}
    labels = {"group": ["food", "toys", "food", "toys"], "style": ["a", "b", "c", "c"]}
    notes = {(what, space): f"{what} {space}" for what in labels for space in points}
    figure = features.umap_figure(points, labels, notes)
    assert [ax.get_xlabel() for ax in figure.axes] == [notes[w, s] for w in labels for s in points]
    food, toys = figure.axes[1].collections
    np.testing.assert_allclose(food.get_offsets(), points["UNet"][[0, 2]])
    assert len(food.get_paths()[0]) != len(toys.get_paths()[0])
    assert not np.array_equal(food.get_facecolor(), toys.get_facecolor())
    legends = [[t.get_text() for t in ax.get_legend().get_texts()] for ax in figure.axes[1::2]]
    assert legends == [["food", "toys"], ["a", "b", "c"]]


def test_curves_figure_draws_curves_levels_chance_and_marks():
    panels = {
        "style": {"UNet": ([0.9, 0.6, 0.3], [0.1, 0.1, 0.1]), "CLIP": (0.8, 0.05)},
        "scene": {"UNet": ([0.5, 0.4, 0.1], None), "CLIP": (0.7, None)},
    }
    chance = {"style": 0.33, "scene": 0.05}
    figure = features.curves_figure(FRACTIONS, panels, "accuracy", chance, marks=[0.5])
    assert [ax.get_title() for ax in figure.axes] == ["style", "scene"]
    for ax, (title, curves) in zip(figure.axes, panels.items(), strict=True):
        unet, clip = ax.containers
        assert list(unet.lines[0].get_ydata()) == curves["UNet"][0]
        assert unet.lines[0].get_marker() != clip.lines[0].get_marker()
        np.testing.assert_allclose(unet.lines[0].get_xdata(), FRACTIONS)
        level = {tuple(line.get_ydata()) for line in ax.get_lines()}
        assert {(curves["CLIP"][0],) * 2, (chance[title],) * 2} <= level
        assert any(list(line.get_xdata()) == [0.5, 0.5] for line in ax.get_lines())
        assert ax.yaxis.get_major_formatter()(0.25, 0) == "25 %"
    (legend,) = figure.legends
    assert sorted(t.get_text() for t in legend.get_texts()) == ["CLIP", "UNet", "guessing"]

    figure = features.curves_figure(
        FRACTIONS, {"v*": {"noise": ([0.1, 0.2, 1.5], None)}}, "", log=True
    )
    assert figure.axes[0].get_yscale() == "log"
    figure.savefig(io.BytesIO())


@pytest.fixture
def given():
    """Noisy pictures of one colour each, and components of one value each."""
    keys = [(name, f) for f in FRACTIONS for name in ("bus", "cat")]
    noisy = {key: Image.new("RGB", (8, 8), (40 * i, 0, 200)) for i, key in enumerate(keys)}
    components = {
        layer: {key: np.full((4, 4, 3), (i + start) / 4 - 1.5) for i, key in enumerate(keys)}
        for start, layer in enumerate(("conv_in", "mid_block"))
    }
    return noisy, components


def test_panel_follows_its_widgets(given, shown_picture):
    noisy, components = given
    panel = features.layer_panel(*given)
    assert panel.view in panel.children
    first, *_, last = FRACTIONS
    shown = set()
    for name, fraction, layer in (  # each widget by itself; every setting has its own colours
        ("bus", first, "conv_in"),
        ("cat", first, "conv_in"),
        ("cat", last, "conv_in"),
        ("cat", last, "mid_block"),
    ):
        panel.picture.value, panel.t.value, panel.layer.value = name, fraction, layer
        assert f'alt="Maps of {name}, t = {fraction:g} T, {layer}"' in panel.view.value
        image = shown_picture(panel)
        middle = image.height // 2 + 10
        left, centre = (image.getpixel((image.width * k // 6, middle)) for k in (1, 3))
        assert left == noisy[name, fraction].getpixel((0, 0))
        expected = 255 * features.as_colours(components[layer][name, fraction][0, 0])
        np.testing.assert_allclose(centre, expected, atol=2)
        shown.add((left, centre))
    assert len(shown) == 4


def test_layer_figure_is_a_figure_of_three(given):
    noisy, components = given
    key = ("bus", 0.5)
    figure = features.layer_figure(noisy[key], components["conv_in"][key], "bus")
    assert isinstance(figure, Figure) and len(figure.axes) == 3
    assert np.array_equal(image_in(figure.axes[2]), components["conv_in"][key][..., 0])


def test_maps_are_shown_in_the_components_of_others():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(6, 5, 3, 3)) * np.array([5, 3, 2, 0.1, 0.1])[:, None, None]
    own = features.principal_maps(maps)
    again = features.principal_maps(maps[2:3] + 1e-6, of=maps)
    np.testing.assert_allclose(again[0], own[2], atol=1e-4)
    assert own.reshape(-1, 3).std(0) == pytest.approx([1, 1, 1], abs=0.02)
