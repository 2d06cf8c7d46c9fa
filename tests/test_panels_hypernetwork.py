"""Figures of 03_lora_hypernetwork show what they are given, and the panel's widgets redraw it."""

import numpy as np
import pytest
import torch
from PIL import Image

from dte_lab.hypernetwork import LoRAHypernetwork
from dte_lab.lora import PROJECTIONS, inner_products
from dte_lab.panels import hypernetwork, ranks

BLOCKS = ("down_blocks.0", "mid_block")
LAYERS = [f"{block}.{attn}" for block in BLOCKS for attn in ("attn1", "attn2")]
KEYS = [f"{layer}.{projection}" for layer in LAYERS for projection in PROJECTIONS]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_fit_figure_has_the_bound_as_a_line_and_the_result_as_points():
    (ax,) = hypernetwork.fit_figure([1, 2, 4], [0.6, 0.3, 0.2], [0.5, 0.25, 0.1]).axes
    bound, left = ax.get_lines()
    assert list(bound.get_ydata()) == [0.5, 0.25, 0.1] and bound.get_linestyle() == "-"
    assert list(left.get_ydata()) == [0.6, 0.3, 0.2] and left.get_linestyle() == "None"


def test_counts_figure_tells_whole_matrices_apart_by_shape():
    counts = {"a": {1: 10, "full": 2e6}, "b": {1: 2500, "full": 6e9}}
    figure = hypernetwork.counts_figure(counts, {"a": 1e6, "b": 1e7})
    for ax, values, line in zip(figure.axes, counts.values(), (1e6, 1e7), strict=True):
        reference, low, full = ax.get_lines()
        assert set(reference.get_xdata()) == {line}
        assert [low.get_xdata()[0], full.get_xdata()[0]] == list(values.values())
        assert low.get_marker() != full.get_marker() and ax.get_xscale() == "log"
    assert texts(figure.axes[1]) == ["2.5 k", "6 G"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["rank 1", "whole matrices"]


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (999, "999"), (1000, "1 k"), (12_345_678, "12.3 M")]
)
def test_short_number(number, text):
    assert hypernetwork.short_number(number) == text


def test_heads_figure_names_every_head_and_what_it_makes():
    shapes = {"x.to_q": (8, 8), "y.to_k": (16, 8), "z.to_k": (16, 8)}
    net = LoRAHypernetwork(shapes, rank=2, width=4, num_heads=1, depth=3, offset_scale=1)
    said = "\n".join(texts(hypernetwork.heads_figure(net, num_tokens=9).axes[0]))
    for part in ("9 × 4", "6 × 4", "3 blocks", "head A8: 4 → 16", "head A16: 4 → 32"):
        assert part in said
    assert "1 matrices A,\neach 8 × 2" in said
    assert "2 matrices A,\neach 16 × 2" in said and "3 matrices B,\neach 2 × 8" in said


def test_spectra_are_means_over_layers_and_spread_between_concepts():
    rng = np.random.default_rng(0)
    values = {key: rng.random((5, 3)) for key in KEYS}
    figure = hypernetwork.spectra_figure({"predicted": values, "tuned": values})
    assert len(figure.axes) == 8
    ax = figure.axes[4 + PROJECTIONS.index("to_v")]
    assert ax.get_title() == "cross to_v"
    before, after = ax.containers
    concept = np.mean([values[f"{layer}.to_v"] for layer in LAYERS[1::2]], axis=0)  # (5, 3)
    for container in (before, after):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_ydata(), concept.mean(axis=0))
        half = [np.ptp(segment[:, 1]) / 2 for segment in bars.get_segments()]
        np.testing.assert_allclose(half, concept.std(axis=0, ddof=1))
    assert before[0].get_marker() != after[0].get_marker()


def test_effective_rank_figure_puts_each_value_in_its_cell():
    values = {key: 1 + i / 8 for i, key in enumerate(KEYS)}
    ax = hypernetwork.effective_rank_figure({"one": values}, rank=4).axes[0]
    shown = ax.get_images()[0].get_array()
    key = f"{LAYERS[2]}.{PROJECTIONS[3]}"
    assert shown[2, 3] == values[key] and texts(ax)[2 * 4 + 3] == f"{values[key]:.2f}"
    assert [label.get_text() for label in ax.get_yticklabels()][2] == "mid  self"


def test_centred_cosines_are_those_of_the_vectors_without_their_mean(tiny_offsets):
    offsets = tiny_offsets(4)
    vectors = torch.cat([(a @ b).flatten(1) for a, b in offsets.values()], dim=1)  # (4, entries)
    gram = inner_products(offsets).double().numpy()
    moved = (vectors - vectors.mean(dim=0)).double().numpy()
    norm = np.linalg.norm(moved, axis=1)
    expected = moved @ moved.T / norm / norm[:, None]
    np.testing.assert_allclose(
        hypernetwork.cosines(hypernetwork.centred(gram)), expected, atol=1e-4
    )
    np.testing.assert_allclose(np.diag(hypernetwork.cosines(gram)), 1)


def test_similarity_figure_labels_runs_at_their_centres():
    matrix = np.eye(6)
    figure = hypernetwork.cosine_figure({"left": matrix, "right": -matrix}, ["a", "b"])
    left, right = figure.axes[:2]
    assert np.array_equal(right.get_images()[0].get_array(), -matrix)
    assert list(left.get_xticks()) == [1, 4] and list(left.get_yticks()) == [1, 4]


def test_pairs_figure_draws_points_and_intervals():
    groups = {"raw": {"same": [0.5, 0.7], "other": [0.1, 0.3]}}
    intervals = {
        "raw": {
            "same": {"mean": 0.6, "low": 0.5, "high": 0.75},
            "other": {"mean": 0.2, "low": 0.1, "high": 0.3},
        }
    }
    (ax,) = ranks.pairs_figure(groups, intervals).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["same", "other"]
    points = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in points] == list(groups["raw"].values())
    (segment,) = ax.containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.5, 0.75])


def test_encoders_figure_shows_every_seed_the_interval_and_the_longer_run():
    cell = {"by_seed": [0.1, 0.3], "minus_base": {"mean": 0.2, "low": 0.05, "high": 0.4}}
    groups = {"rank": {1: {"once": 0.5} | cell, 2: {"once": 0.4}}, "things": {50: {"once": 0.6}}}
    left, right = ranks.encoders_figure(groups, "rank 4").axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in left.get_lines()]
    assert ([1, 2], [0.5, 0.4]) in lines and ([1.12, 1.12], [0.1, 0.3]) in lines
    (bar,) = left.containers
    np.testing.assert_allclose(bar[2][0].get_segments()[0], [[1, 0.05], [1, 0.4]])
    assert right.get_xlabel() == "things" and "rank 4" in left.get_ylabel()
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "2"]


def test_distances_figure_has_a_line_per_concept_their_mean_and_the_floor():
    distances = {"cup": {0: 0.4, 2: 0.2, 8: 0.1}, "bus": {0: 0.2, 2: 0.2, 8: 0.3}}
    (ax,) = ranks.distances_figure(distances, floor=0.05).axes
    drawn = [list(line.get_ydata()) for line in ax.get_lines()]
    assert all(list(values.values()) in drawn for values in distances.values())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0: v* alone", "2", "8"]
    np.testing.assert_allclose(ax.containers[0][0].get_ydata(), [0.3, 0.2, 0.2])
    assert [0.05, 0.05] in drawn


@pytest.fixture(scope="module")
def things():
    """What the panel shows of two concepts at ranks 0 to 2."""
    pictures = {name: Image.new("RGB", (8, 8), (0, i, 0)) for i, name in enumerate(("cup", "bus"))}
    drawn = {
        (name, rank): Image.new("RGB", (8, 8), (100 * rank, 50 * i, 0))
        for i, name in enumerate(pictures)
        for rank in range(3)
    }
    spectra = {"cup": [3.0, 1.0], "bus": [2.0, 2.0]}
    distances = {"cup": [0.4, 0.3, 0.2], "bus": [0.6, 0.5, 0.1]}
    return pictures, drawn, spectra, distances


def test_rank_figure_tells_kept_from_cut_off(things):
    pictures, drawn, spectra, _ = things
    figure = ranks.rank_figure(pictures["cup"], drawn["cup", 1], spectra["cup"], 1, 0.3)
    _, picture, bars = figure.axes
    assert np.array_equal(picture.get_images()[0].get_array(), np.asarray(drawn["cup", 1]))
    kept, cut = bars.containers
    assert [bar.get_height() for bar in kept] == [3] and [bar.get_height() for bar in cut] == [1]
    assert kept[0].get_hatch() != cut[0].get_hatch()


def test_panel_follows_its_widgets(things, shown_picture):
    pictures, drawn, *rest = things
    panel = ranks.rank_panel(pictures, drawn, *rest)

    def centre(picture):  # of the second of the three columns
        width, height = picture.size
        return picture.getpixel((round(0.47 * width), height // 2))

    for name, rank in (("cup", 2), ("bus", 0), ("bus", 1)):
        panel.concept.value, panel.rank.value = name, rank
        html = panel.view.value
        assert f"The {name}, and its drawing with rank {rank}: distance" in html
        assert f"{rest[1][name][rank]:.3f}" in html
        assert centre(shown_picture(panel)) == drawn[name, rank].getpixel((0, 0))
