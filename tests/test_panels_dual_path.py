"""Figures of 04_dual_path show what they are given, and the panel's widgets redraw it."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import f

from dte_lab.common.errors import DTEError
from dte_lab.evaluation.blending import BLENDS
from dte_lab.panels import dual_path


@pytest.fixture(scope="module")
def pictures():
    """{(offsets_on, granularity, alpha, seed): picture of one colour}."""
    return {
        (offsets_on, granularity, alpha, seed): Image.new(
            "RGB", (8, 8), (250 * i, 120 * j + 10 * seed, int(200 * alpha))
        )
        for i, offsets_on in enumerate(("soft", "hard"))
        for j, granularity in enumerate(("attention", "block"))
        for alpha in (0, 0.5, 1)
        for seed in (3, 4)
    }


@pytest.fixture(scope="module")
def table():
    """Random measures of 12 concepts."""
    rng = np.random.default_rng(0)
    return {s: {name: rng.normal(size=12) for name in dual_path.MEASURE_TITLES} for s in BLENDS}


def test_tokens_figure_has_a_bar_per_token_and_path():
    shares = {"soft": [0.5, 0.2, 0.3], "hard": [0.6, 0.4, 0.0]}
    figure = dual_path.tokens_figure(["start", "S*", "end 1"], [0, 0.9, 0.1], shares)
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == [0, 0.9, 0.1]
    for bars, values in zip(bottom.containers, shares.values(), strict=True):
        assert np.allclose([bar.get_height() for bar in bars], 100 * np.array(values))
    assert len({bars[0].get_hatch() for bars in bottom.containers}) == 2
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["start", "S*", "end 1"]


def test_each_row_of_maps_has_one_scale_of_its_own(pictures):
    rng = np.random.default_rng(1)
    maps = {"S*": list(rng.random((3, 4, 4)) / 10), "end tokens": list(rng.random((3, 2, 2)))}
    shown = list(pictures.values())[:3]
    figure = dual_path.maps_figure(shown, maps, ["t = 9", "t = 5", "t = 1"])
    grid = np.array(figure.axes).reshape(3, 4)
    assert [ax.get_title() for ax in grid[0, :3]] == ["t = 9", "t = 5", "t = 1"]
    assert [ax.get_ylabel() for ax in grid[1:, 0]] == list(maps)
    for axes, row in zip(grid[1:], maps.values(), strict=True):
        images = [ax.get_images()[0] for ax in axes[:3]]
        for image, array in zip(images, row, strict=True):
            assert np.allclose(image.get_array(), 100 * array)
            assert image.get_clim() == pytest.approx((0, 100 * max(a.max() for a in row)))
    figure.savefig(io.BytesIO())


def test_cost_figure_draws_what_each_source_has():
    costs = {
        "single path": {"here": (1.0, 1.0, 1.0), "benchmark": (1.0, 1.0, 1.0)},
        "dual": {"here": (1.3, 1.2, 1.5)},
    }
    (ax,) = dual_path.cost_figure(costs).axes
    widths = sorted(bar.get_width() for bar in ax.patches)
    assert widths == [1.0, 1.0, 1.3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["here", "benchmark"]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(costs)


def test_curves_are_means_over_concepts_at_their_alpha(table):
    figure = dual_path.alpha_figure(table)
    assert len(figure.axes) == len(dual_path.MEASURE_TITLES)
    for ax, measure in zip(figure.axes, dual_path.MEASURE_TITLES, strict=True):
        assert len(ax.containers) == len(dual_path.WAY_LOOKS)
        alphas = sorted(key[2] for key in table if key[:2] == ("soft", "attention"))
        line = ax.containers[0].lines[0]
        assert list(line.get_xdata()) == alphas
        means = [table["soft", "attention", a][measure].mean() for a in alphas]
        assert np.allclose(line.get_ydata(), means)


def test_the_ellipse_holds_the_points_that_a_test_of_the_mean_accepts():
    rng = np.random.default_rng(2)
    n, x = 15, rng.normal(size=15)
    y = 0.8 * x + 0.3 * rng.normal(size=15)
    (cx, cy), width, height, angle = dual_path.confidence_ellipse(x, y)
    assert (cx, cy) == pytest.approx((x.mean(), y.mean()))
    turn = np.radians(angle)
    around = np.linspace(0, 2 * np.pi, 50)
    a, b = width / 2 * np.cos(around), height / 2 * np.sin(around)
    edge = np.stack([a * np.cos(turn) - b * np.sin(turn), a * np.sin(turn) + b * np.cos(turn)])
    t_squared = n * np.einsum("ik,ij,jk->k", edge, np.linalg.inv(np.cov(x, y)), edge)
    p_values = f.sf(t_squared * (n - 2) / (2 * (n - 1)), 2, n - 2)
    assert np.allclose(p_values, 0.05)
    with pytest.raises(DTEError, match="3 concepts"):
        dual_path.confidence_ellipse(x[:2], y[:2])


def test_plane_compares_all_ways_at_the_alphas_that_they_share(table):
    left, right = dual_path.plane_figure(table, "clip_t_small", "clip_i_small").axes
    ((line,), lines) = left.get_lines(), right.get_lines()
    along = sorted(key[2] for key in table if key[:2] == ("soft", "attention"))
    xs = [table["soft", "attention", a]["clip_t_small"].mean() for a in along]
    assert np.allclose(line.get_xdata(), xs) and len(left.patches) == len(along)
    assert [text.get_text() for text in left.texts] == [f"{a:g}" for a in along]
    assert len(lines) == 4 and {len(each.get_xdata()) for each in lines} == {2}
    assert len({each.get_marker() for each in lines}) == 4
    ys = [table["hard", "block", a]["clip_i_small"].mean() for a in (0.5, 0.7)]
    assert np.allclose(lines[3].get_ydata(), ys)
    saturated = {key: row | {"scene": np.ones(12)} for key, row in table.items()}
    dual_path.plane_figure(saturated).savefig(io.BytesIO())  # ellipses without width


def test_panel_follows_its_widgets(pictures, shown_picture):
    panel = dual_path.dual_path_panel(pictures)
    assert panel.view in panel.children
    for offsets_on, granularity, alpha, seed in pictures:
        panel.offsets_on.value, panel.granularity.value = offsets_on, granularity
        panel.alpha.value, panel.seed.value = alpha, seed
        shown = shown_picture(panel)
        colour = shown.getpixel((shown.width // 2, shown.height // 2 + 20))
        assert colour == pictures[offsets_on, granularity, alpha, seed].getpixel((0, 0))
        alt = f"Offsets on {offsets_on}, granularity {granularity}, "
        alt += f"alpha_blend {alpha:g}, seed {seed}"
        assert f'alt="{alt}"' in panel.view.value
