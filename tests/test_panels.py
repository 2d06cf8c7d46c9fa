"""Figures show what they are given, and the panel's widgets redraw it."""

import base64
import io
import math
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dte_lab import panels
from dte_lab.common.plots import save_figure
from dte_lab.lora import PROJECTIONS, attention_layers
from dte_lab.panels import quickstart, shared


@pytest.fixture(scope="module")
def pictures():
    """{(alpha, seed): picture of one colour}."""
    return {
        (alpha, seed): Image.new("RGB", (8, 8), (int(255 * alpha), 100 * seed, 0))
        for alpha in (0, 0.5, 1)
        for seed in (0, 1)
    }


def image_in(ax):
    return ax.get_images()[0].get_array()


def test_words_figure_has_one_bar_per_word_and_embedding(pictures):
    cosines = {"predicted": [0.2, -0.1, 0.9], "tuned": [0.3, 0.1, 0.8]}
    figure = quickstart.words_figure(cosines, ["cat", "dog", "car"])
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "car"]
    for bars, values in zip(ax.containers, cosines.values(), strict=True):
        assert [bar.get_width() for bar in bars] == values
    low, high = ax.get_xlim()
    assert low <= -0.1 and high > 0.9
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(cosines)
    hatches = [bars[0].get_hatch() for bars in ax.containers]
    assert len(set(hatches)) == 2, "the two must differ by more than colour"

    figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    drawn = [*ax.texts, *(bar for bars in ax.containers for bar in bars)]
    assert not any(legend.overlaps(part.get_window_extent()) for part in drawn)
    assert legend.y1 <= figure.bbox.y1

    with_picture = quickstart.words_figure({"guess": [0.5]}, ["cat"], pictures[0, 0])
    assert len(with_picture.axes) == 2 and with_picture.axes[1].get_legend() is None


def test_steps_figure_puts_each_picture_over_its_step(pictures):
    strip = list(pictures.values())[:4]
    figure = quickstart.steps_figure(strip, [3.0, 1.0, 2.0], [2.5, 2.0, 1.5, 1.0])
    *thumbnails, curve = figure.axes
    assert len(thumbnails) == 4
    to_figure = curve.transData + figure.transFigure.inverted()
    for step, ax in enumerate(thumbnails):
        box = ax.get_position()
        assert to_figure.transform((step, 0))[0] == pytest.approx((box.x0 + box.x1) / 2)
    noisy, fixed = curve.get_lines()
    assert list(noisy.get_ydata()) == [3.0, 1.0, 2.0] and len(fixed.get_ydata()) == 4


def test_offset_sizes_are_relative_norms(tiny_backbone, tiny_offsets):
    offsets = tiny_offsets()
    layers, sizes = quickstart.offset_sizes(tiny_backbone.unet, offsets)
    assert sizes.shape == (len(layers), 4)
    assert layers == list(attention_layers(tiny_backbone.unet))
    name, column = layers[1], PROJECTIONS.index("to_out")
    a, b = offsets[f"{name}.to_out"]
    weight = tiny_backbone.unet.get_submodule(f"{name}.to_out.0").weight
    change = torch.einsum("ir,ro->oi", a[0], b[0])
    expected = change.square().sum().sqrt() / weight.square().sum().sqrt()
    assert sizes[1, column] == pytest.approx(expected.item(), rel=1e-5)

    figure = quickstart.offsets_figure(layers, {"predicted": 0 * sizes, "tuned": sizes})
    left, right = figure.axes[:2]
    assert np.allclose(image_in(right), 100 * sizes)
    assert left.get_images()[0].get_clim() == right.get_images()[0].get_clim()
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert len(set(labels)) == len(layers), "every layer needs a label of its own"


def test_no_offsets_at_all_can_be_drawn(tiny_backbone, tiny_offsets):
    layers, sizes = quickstart.offset_sizes(tiny_backbone.unet, tiny_offsets(scale=0))
    assert not sizes.any()
    quickstart.offsets_figure(layers, {"predicted": sizes}).savefig(io.BytesIO())


def test_panel_follows_its_widgets(pictures, shown_picture):
    panel = quickstart.blend_panel(pictures)
    assert panel.view in panel.children
    for alpha, seed in pictures:
        panel.alpha.value = alpha
        panel.seed.value = seed
        shown = shown_picture(panel)
        middle = shown.getpixel((shown.width // 2, shown.height // 2))
        assert middle == pictures[alpha, seed].getpixel((0, 0))
        assert f'alt="The concept with alpha_blend {alpha:g} and seed {seed}"' in panel.view.value


def test_show_stores_the_smaller_format_with_alt_text(monkeypatch, pictures):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    given = {
        "a chart": quickstart.words_figure({"guess": [0.5]}, ["cat"]),
        'one "colour"': pictures[1, 0],
        "noise": Image.fromarray(noise),
    }
    for alt, figure in given.items():
        panels.show(figure, alt)
    tags = [
        re.fullmatch(
            r'<img alt="(.*?)"( width="(\d+)")? src="data:(.*?);base64,(.*)">', x["text/html"]
        )
        for x in shown
    ]
    assert [tag[1] for tag in tags] == ["a chart", "one &quot;colour&quot;", "noise"]
    assert [x["text/plain"] for x in shown] == list(given)
    assert [tag[3] for tag in tags[:2]] == ["750", None], "a figure has more pixels than it takes"
    assert [tag[4] for tag in tags] == ["image/png", "image/png", "image/jpeg"]
    found = [Image.open(io.BytesIO(base64.b64decode(tag[5]))) for tag in tags]
    assert found[0].width == pytest.approx(1.44 * 750, abs=1) and found[1].size == (8, 8)


def test_few_colours_do_for_a_chart_and_not_for_a_picture():
    chart = panels.shared.encode(quickstart.words_figure({"guess": [0.5]}, ["cat"]), "png")
    smaller = panels.shared.with_palette(chart)
    assert len(smaller) < 0.6 * len(chart)
    before, after = (
        np.asarray(Image.open(io.BytesIO(x)).convert("RGB"), float) for x in (chart, smaller)
    )
    assert before.shape == after.shape and abs(before - after).mean() < 1
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = panels.shared.encode(Image.fromarray(noise), "png")
    assert panels.shared.with_palette(picture) == picture


def test_a_stored_figure_is_shown_as_large_as_it_was_meant(tmp_path, pictures):
    save_figure(quickstart.words_figure({"guess": [0.5]}, ["cat"]), tmp_path / "a.png", dpi=200)
    assert shared.shown_width(Image.open(tmp_path / "a.png")) == pytest.approx(750, abs=1)
    assert shared.shown_width(pictures[1, 0]) is None


def test_a_table_is_text_and_page(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    panels.show_table([("cat", 1), ("a < b", 22)], ["Thing", "Steps"], "n = 2")
    (data,) = shown
    assert data["text/plain"].splitlines() == ["n = 2", "Thing  Steps", "cat    1", "a < b  22"]
    page = data["text/html"]
    assert page.count("<tr>") == 3 and "a &lt; b" in page and "<caption>n = 2</caption>" in page
    with pytest.raises(ValueError):
        panels.show_table([("cat",)], ["Thing", "Steps"])
    assert shared.table_html([(1,)], ["<b>"], style="margin:0", cell_style="padding:0") == (
        '<table style="margin:0"><thead><tr><th style="padding:0">&lt;b&gt;</th></tr></thead>'
        '<tbody><tr><td style="padding:0">1</td></tr></tbody></table>'
    )


def test_differences_are_said_with_their_sign_and_verdict():
    above, below, around = (
        {"mean": m, "low": m - 0.1, "high": m + 0.1} for m in (0.25, -0.25, 0.05)
    )
    assert panels.bracketed(above, 2) == "0.25 [0.15, 0.35]"
    assert panels.bracketed(above, 2, "+") == "+0.25 [+0.15, +0.35]"
    said = [panels.verdict(d) for d in (above, below, around)]
    assert said == ["higher", "lower", "not told apart"]


def test_labels_of_points_do_not_collide():
    figure = Figure(figsize=(3, 3), dpi=100)
    ax = figure.add_subplot()
    points = [(0, 0, "one"), (0.02, 0.01, "two"), (0.9, 0.9, "three"), (1, 1, "four")]
    ax.plot([p[0] for p in points], [p[1] for p in points], "o", markersize=5)
    shared.label_points(ax, points)
    assert [text.get_text() for text in ax.texts] == ["one", "two", "three", "four"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*ax.transData.transform(p[:2])) for p in points)


def test_a_label_is_nearer_to_its_own_point():
    """Where the first place that is free would be read as the neighbour's."""
    figure = Figure(figsize=(3, 3), dpi=72)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 216), ylim=(0, 216))
    points = [(100, 100, "a"), (114, 104, "b"), (112, 92, "c"), (60, 150, "d")]
    shared.label_points(ax, points)
    figure.draw_without_rendering()
    for (*_, text), label in zip(points, ax.texts, strict=True):
        assert label.get_text() == text
        box = label.get_window_extent()
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        apart = {name: math.dist(middle, (u, v)) for u, v, name in points}
        assert min(apart, key=apart.get) == text, apart


def test_describe_machine_names_the_device():
    assert panels.describe_machine("cpu").startswith("device: cpu (")


def test_figures_leave_pyplot_alone(pictures):
    """Otherwise a notebook would show each figure twice."""
    assert isinstance(quickstart.blend_figure(pictures, 0.5, 1), Figure)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_what_was_seen_is_folded_and_escaped(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    panels.saw("1 < 2.", "So it is.")
    folded = "<details><summary>What we saw</summary><p>1 &lt; 2. So it is.</p></details>"
    panels.take_along("1 < 2.", "So it is.")
    listed = "<p>Found here:</p><ul><li>1 &lt; 2.</li><li>So it is.</li></ul>"
    assert shown == [
        {"text/html": folded, "text/plain": "What we saw: 1 < 2. So it is."},
        {"text/html": listed, "text/plain": "Found here:\n- 1 < 2.\n- So it is."},
    ]


def test_stored_numbers_say_which_model_they_are_of(monkeypatch):
    monkeypatch.setattr(shared, "WEIGHTS_SINCE", "2026-03-02")
    said = [panels.measured_with({"date": date}) for date in ("2026-03-01", "2026-03-02")]
    assert said == ["measured 2026-03-01, former model", "measured 2026-03-02"]


def test_a_panel_says_what_went_wrong_where_one_looks(pictures):
    some = dict(pictures)
    panel = quickstart.blend_panel(some)
    del some[1, 0]
    panel.alpha.value = 1
    assert "could not be drawn. KeyError: (1, 0)" in panel.view.value
    assert 'role="alert"' in panel.view.value
    panel.alpha.value = 0
    assert panel.view.value.startswith("<img alt=")
    with pytest.raises(KeyError):
        quickstart.blend_panel({(0, 0): pictures[0, 0], (1, 1): pictures[1, 1]})
