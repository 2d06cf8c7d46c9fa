"""The figures of 05_tuning show what they are given, and its panel follows its widgets."""

import numpy as np
import pytest
from PIL import Image

from dte_lab.panels import tuning


def point(steps, mean):
    return {"steps": steps, "mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 5}


CURVES = {
    method: {
        "fidelity": [point(0, low), point(12, 0.6), point(50, 0.3)],
        "seconds": [point(0, 0.5), point(12, 2.0), point(50, 8.0)],
    }
    for method, low in (("dte", 0.4), ("ti", 0.2))
}
NAMES = {"dte": "tuning encoder", "ti": "Textual Inversion"}


@pytest.fixture
def pictures():
    """{(steps, scene): picture of one colour}."""
    return {
        (steps, scene): Image.new("RGB", (8, 8), (steps, blue, 0))
        for steps in (0, 12, 150)
        for scene, blue in (("beach", 40), ("night", 200))
    }


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_losses_figure_marks_the_best_step_elsewhere():
    figure = tuning.losses_figure(
        [0.5] * 50, [0, 4, 12, 50], [0.5, 0.4, 0.3, 0.2], [0.5, 0.45, 0.4, 0.6]
    )
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.texts] == ["lowest at 12"]
    seen, own, elsewhere = ax.get_lines()[:3]
    assert list(elsewhere.get_xdata()) == [0, 4, 12, 50]
    assert own.get_marker() != elsewhere.get_marker()
    assert own.get_linestyle() != elsewhere.get_linestyle()


@pytest.mark.parametrize(("over", "x"), [("steps", [0, 12, 50]), ("seconds", [0.5, 2.0, 8.0])])
def test_quality_figure_has_a_curve_and_a_band_per_method(over, x):
    figure = tuning.quality_figure(CURVES, NAMES, {"fidelity": "harmonic mean"}, over)
    (ax,) = figure.axes
    ours, theirs = ax.get_lines()[:2]
    assert list(ours.get_xdata()) == x and list(theirs.get_ydata()) == [0.2, 0.6, 0.3]
    assert len(ax.collections) == 2
    assert ours.get_marker() != theirs.get_marker(), "more than colour must differ"
    assert legend(figure) == list(NAMES.values())


def test_guide_figure_follows_the_means_over_concepts():
    points = [
        {"concept": concept, "steps": steps, "loss": loss + shift, "fidelity": quality}
        for concept, shift in (("cat", -0.1), ("dog", 0.1))
        for steps, loss, quality in ((0, 0.5, 0.2), (12, 0.3, 0.6), (50, 0.2, 0.4))
    ]
    (ax,) = tuning.guide_figure(points, "fidelity", {"loss": "the loss"}).axes
    (line,) = ax.get_lines()
    assert np.allclose(line.get_xdata(), [0.5, 0.3, 0.2])
    assert np.allclose(line.get_ydata(), [0.2, 0.6, 0.4])
    assert [t.get_text() for t in ax.texts] == ["0", "12", "50"]
    left, right = ax.get_xlim()
    assert left > right, "the loss falls to the right"


def test_least_figure_sets_apart_what_never_satisfies():
    least = {
        "food": {
            "level": 0.5, "n": 4,
            "methods": {
                "dte": {"steps": 4, "low": 2, "high": 12},
                "ti": {"steps": None, "low": 50, "high": None},
            },
        }
    }  # fmt: skip
    figure = tuning.least_figure(least, NAMES)
    (ax,) = figure.axes
    ours, ours_at, theirs, theirs_at = ax.get_lines()[:4]
    assert list(ours.get_xdata()) == [2, 12] and list(ours_at.get_xdata()) == [4]
    (never,) = theirs_at.get_xdata()
    assert never > 50 and list(theirs.get_xdata()) == [50, never]
    assert theirs_at.get_markerfacecolor() == "white" != ours_at.get_markerfacecolor()
    labels = dict(zip(ax.get_xticks(), (t.get_text() for t in ax.get_xticklabels()), strict=True))
    assert labels[never] == "never"
    assert ax.get_yticklabels()[0].get_text() == "food\nlevel 0.50, n = 4"
    assert legend(figure) == list(NAMES.values())


def test_memory_figures_do_without_measurements():
    (ax,) = tuning.memory_figure([1, 2], [10, 20], None).axes
    assert len(ax.get_lines()) == 1
    (ax,) = tuning.memory_figure([1, 2], [10, 20], [12, 25]).axes
    assert list(ax.get_lines()[1].get_ydata()) == [12, 25]

    (ax,) = tuning.card_figure(["a", "b"], [9.0, 16.0], [None, None], 15).axes
    assert [bar.get_width() for bar in ax.patches] == [9.0, 16.0]
    assert not ax.figure.legends and ax.get_xlim()[1] > 16
    (ax,) = tuning.card_figure(["a", "b"], [9.0, 16.0], [None, 15.5], 15).axes
    assert list(ax.get_lines()[0].get_xdata()) == [15.5]
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    (legend,) = ax.figure.legends
    assert len(boxes) == 2 and not any(legend.get_window_extent().overlaps(b) for b in boxes)


def test_timestep_figure_draws_the_bins():
    (ax,) = tuning.timestep_figure([0, 50, 99], [0.9, 0.5, 0.2], bins=4).axes
    bins = [line.get_xdata()[0] for line in ax.get_lines()[:-1]]
    assert bins == [0, 25, 50, 75, 100]


def test_captioned_grid_puts_each_line_under_its_picture(pictures):
    a, b = list(pictures.values())[:2]
    figure = tuning.captioned_grid([[(a, "2 s"), (b, "3 s")]], ["first", "second"], ["row"])
    assert [ax.get_xlabel() for ax in figure.axes] == ["2 s", "3 s"]
    assert [ax.get_title() for ax in figure.axes] == ["first", "second"]
    assert figure.axes[0].get_ylabel() == "row"
    assert np.array_equal(figure.axes[1].get_images()[0].get_array(), np.asarray(b))


def test_panel_follows_its_widgets(pictures, shown_picture):
    panel = tuning.steps_panel(pictures)
    assert panel.view in panel.children
    for steps, scene in pictures:
        panel.steps.value = steps
        panel.scene.value = scene
        assert f'alt="The concept after {steps} steps: {scene}"' in panel.view.value
        shown = shown_picture(panel)
        middle = shown.getpixel((shown.width // 2, shown.height // 2))
        assert middle == pictures[steps, scene].getpixel((0, 0))
