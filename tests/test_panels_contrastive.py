"""Figures of the contrastive notebook show what they are given; the sliders redraw."""

import html
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from dte_lab.contrastive import contrastive_loss
from dte_lab.panels import contrastive, regularisation, word_map

TOY = {"cat": (1.0, 0.2), "dog": (0.5, 1.0), "bus": (-1.0, 0.5)}
OTHERS = [(0.0, -1.0)]
KINDS = ("contrastive", "none")


def test_neighbours_figure_has_each_picture_over_its_words():
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    nearest = [[("cat", 0.75), ("dog", 0.5)], [("bus", 0.25), ("car", 0.125)]]
    figure = contrastive.neighbours_figure(pictures, ["one", "two"], nearest)
    first, words, second, _ = figure.axes
    assert [first.get_title(), second.get_title()] == ["one", "two"]
    assert np.array_equal(second.get_images()[0].get_array(), np.asarray(pictures[1]))
    assert words.texts[0].get_text() == "0.75  cat\n0.50  dog"


def test_nearness_figure_marks_the_points_below_the_histograms():
    generator = np.random.default_rng(0)
    nearest, random = generator.uniform(0.4, 0.9, 50), generator.uniform(-0.3, 0.3, 80)
    figure = contrastive.nearness_figure(nearest, random, {"v*": [0.5, 0.7]})
    (ax,) = figure.axes
    marks = next(line for line in ax.get_lines() if line.get_label() == "v*")
    assert list(marks.get_xdata()) == [0.5, 0.7] and max(marks.get_ydata()) < 0
    assert ax.get_ylim()[0] < min(marks.get_ydata())
    assert ax.get_xlim()[0] <= random.min()


@pytest.mark.parametrize("norm_weight", [0, 0.3])
def test_field_is_the_loss_and_turns_only_without_the_norm_term(norm_weight):
    table, others = torch.tensor(list(TOY.values())), torch.tensor(OTHERS)
    value, slope, side = contrastive._field(table, others, 2, 0.2, norm_weight, 8)
    x, y = np.meshgrid(side, side)
    radial = (slope * np.stack([x, y], axis=-1)).sum(-1)
    if norm_weight:
        assert radial.min() > 0, "downhill is inwards"
    else:
        np.testing.assert_allclose(radial, 0, atol=2e-3)
        v = torch.tensor([[side[6], side[1]]])  # bottom row but one, to the right
        rows = torch.nn.functional.cosine_similarity(v, table).topk(2).indices
        expected = contrastive_loss(v, table[rows][None], others, temperature=0.2)
        assert value[1, 6] == pytest.approx(expected.item(), abs=1e-3)


def test_field_row_has_one_map_per_setting():
    settings = [(1, 0.3, 0), (2, 0.05, 0.2), (3, 1.0, 0)]
    figure = contrastive.field_row(TOY, OTHERS, settings)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[1] == "N = 2, τ = 0.05, norm weight 0.2" and len(titles) == 3
    assert [text.get_text() for text in figure.axes[0].texts] == list(TOY)


def test_pulls_figure_projects_and_says_how_much_is_seen():
    x, y, z = torch.eye(3)
    pulls = {"first": 2 * x, "second": x + y, "third": 3 * z, "sum": 3 * x + y + 3 * z}
    figure = contrastive.pulls_figure(pulls)
    (ax,) = figure.axes
    arrows = [text.xy for text in ax.texts if text.arrow_patch]
    np.testing.assert_allclose(arrows, [(2, 0), (1, 1), (0, 0), (3, 1)], atol=1e-6)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "100%" in labels[0] and "0%" in labels[2] and "length 3" in labels[2]
    assert len({line.get_linestyle() for line in ax.get_lines()[:4]}) == 4


def interval(mean):
    return {"mean": mean, "low": mean - 1, "high": mean + 2, "n": 4}


def test_comparison_figure_draws_means_intervals_and_differences():
    means = [
        {"regulariser": kind, "after": after, "norm": interval(10 * after + i)}
        for after in (False, True)
        for i, kind in enumerate(KINDS)
    ]
    differences = [{"after": after, "norm": interval(-after)} for after in (False, True)]
    figure = regularisation.comparison_figure(means, differences, {"norm": "the norm"})
    above, below = figure.axes
    assert above.get_title() == "the norm"
    drawn = [container.lines[0].get_ydata().tolist() for container in above.containers]
    assert drawn == [[0, 10], [1, 11]]
    (bars,) = below.containers[0].lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[-1, 2], [-2, 1]]


@pytest.fixture
def sweep():
    keys = ("num_positives", "temperature", "contrastive_weight")
    settings = [(1, 0.1, 0), *((n, tau, 1) for n in (1, 5) for tau in (0.1, 0.5))]
    return [
        dict(zip(keys, setting, strict=True)) | {"concept": c, "a": i + j, "b": 10 * i}
        for i, setting in enumerate(settings)
        for j, c in enumerate(("cat", "dog"))
    ]


def test_sweep_means_fill_the_weight_zero(sweep):
    table = regularisation.sweep_means(sweep, ["a", "b"])
    assert len(table) == 8
    assert table[5, 0.5, 1] == {"a": 4.5, "b": 40}
    assert table[5, 0.5, 0] == table[1, 0.1, 0] == {"a": 0.5, "b": 0}


def test_sweep_figures_show_the_setting_and_all_settings(sweep):
    table = regularisation.sweep_means(sweep, ["a", "b"])
    figure = regularisation.sweep_figure(table, (5, 0.1, 1), {"a": "x", "b": "y"})
    circle = figure.axes[0].get_lines()[-1]
    assert circle.get_xydata().tolist() == [[table[5, 0.1, 1]["a"], 30]]
    grid = regularisation.sweep_grid(table, {"a": "x", "b": "y"})
    maps = [ax for ax in grid.axes if ax.get_images()]
    assert [ax.get_title() for ax in maps] == ["weight 0", "weight 1", "", ""]
    assert [ax.get_xlabel() for ax in maps] == ["", "", "temperature", "temperature"]
    assert maps[3].get_images()[0].get_array().tolist() == [[10, 20], [30, 40]]
    assert maps[0].get_images()[0].get_clim() == maps[1].get_images()[0].get_clim()


def test_sliders_redraw_the_figure():
    asked = []

    def figure_of(n, tau):
        asked.append((n, tau))
        return Image.new("RGB", (3, 3), (n, 0, 0))

    panel = contrastive.sliders_panel(
        {"N": range(1, 4), "τ": (0.1, 0.5)}, (2, 0.1), figure_of, "N {}, τ {}".format
    )
    assert panel.view in panel.children and len(panel.children) == 3
    assert 'alt="N 2, τ 0.1"' in panel.view.value
    panel.sliders["N"].value = 3
    panel.sliders["τ"].value = 0.5
    assert asked == [(2, 0.1), (3, 0.1), (3, 0.5)]
    assert 'alt="N 3, τ 0.5"' in panel.view.value and "base64," in panel.view.value


WORDS = ["cat", "a<b&\"'"]
POSITIONS = np.array([[0.1, 0.1], [0.9, 0.9]])


@pytest.fixture
def paths():
    return {
        (phase, kind, name): np.array([[0.2, 0.1 * i], [0.4, 0.5], [0.6, 0.5 + 0.1 * i]])
        for phase in ("pretraining", "tuning")
        for kind in KINDS
        for i, name in enumerate(("cup", "bus"))
    }


def curves_in(ax):
    return [line.get_xydata().tolist() for line in ax.get_lines() if len(line.get_xdata()) > 1]


def test_map_shows_each_path_on_its_side_and_the_named_words(paths):
    figure = word_map.map_figure(POSITIONS, WORDS, paths, named=[0])
    for ax, kind in zip(figure.axes, KINDS, strict=True):
        expected = [path.tolist() for key, path in paths.items() if key[1] == kind]
        assert curves_in(ax) == expected
        assert [text.get_text() for text in ax.texts] == ["cat"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:4] == ["cup", "bus", "pretraining", "tuning"]


def test_zoom_shows_one_phase_and_one_scale_per_concept(paths):
    figure = word_map.zoom_figure(POSITIONS, WORDS, paths, "tuning", named=[])
    cup, bus, cup_without, _ = figure.axes
    assert [cup.get_title(), bus.get_title()] == ["cup", "bus"]
    assert curves_in(bus) == [paths["tuning", "contrastive", "bus"].tolist()]
    assert cup.get_xlim() == cup_without.get_xlim() and cup.get_ylim() == cup_without.get_ylim()


def test_labels_do_not_cover_each_other(paths):
    positions = np.array([[0.3, 0.5], [0.31, 0.505], [0.3, 0.7]])
    figure = word_map.map_figure(positions, ["first", "hidden", "apart"], paths, named=[0, 1, 2])
    assert [text.get_text() for text in figure.axes[0].texts] == ["first", "apart"]


def test_curves_have_a_column_per_concept():
    curves = {
        (kind, name): ([0, 1, 2], {"norm": [i, i, i], "cosine": [0, 0, j]})
        for i, kind in enumerate(KINDS)
        for j, name in enumerate(("cup", "bus"))
    }
    figure = word_map.v_star_figure(curves, {"norm": "n", "cosine": "c"}, "step")
    assert len(figure.axes) == 4
    with_term, without = figure.axes[1].get_lines()
    assert list(with_term.get_ydata()) == [0, 0, 0] and list(without.get_ydata()) == [1, 1, 1]
    assert with_term.get_linestyle() != without.get_linestyle()
    assert figure.axes[3].get_xlabel() == "step"
    figure.savefig(io.BytesIO())


def test_hover_view_names_every_word_and_step(paths):
    notes = {key: [f"{key[2]} <{i}>" for i in range(3)] for key in paths}
    text = word_map.hover_view(POSITIONS, WORDS, paths, notes, size=100)
    source = html.unescape(re.search(r'srcdoc="([^"]*)"', text)[1])
    svg = ET.fromstring(source[source.index("<svg") :])
    space = "{http://www.w3.org/2000/svg}"
    circles = list(svg.iter(f"{space}circle"))
    titles = [circle.find(f"{space}title").text for circle in circles]
    assert titles.count("cat") == titles.count(WORDS[1]) == 2, "once on each side"
    assert titles.count("cup <2>") == 4 and len(titles) == 2 * len(WORDS) + 3 * len(paths)
    for circle in circles:
        assert 0 <= int(circle.get("cx")) <= 100 and 0 <= int(circle.get("cy")) <= 100
    low, high = circles[0], circles[1]
    assert int(low.get("cy")) > int(high.get("cy")), "up is up"
    assert "http" not in source.replace("http://www.w3.org/2000/svg", ""), "needs no network"
