"""The map scales UMAP's plane, and puts an embedding between its nearest words."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from dte_lab.evaluation.word_map import neighbours_kept, place, word_positions

CIRCLE = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0.8, 0.6], [0.6, 0.8]])
PLANE = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1], [0.2, 0.1], [0.5, 0.1]])


def test_positions_fill_the_unit_square_with_a_fixed_seed(monkeypatch):
    asked = []

    class UMAP:
        def __init__(self, **options):
            asked.append(options)

        def fit_transform(self, x):
            return 7 * x[:, :2] - 3

    module = ModuleType("umap")
    module.UMAP = UMAP
    monkeypatch.setitem(sys.modules, "umap", module)
    positions = word_positions(CIRCLE, seed=5)
    assert positions.min(0).tolist() == [0, 0] and positions.max(0).tolist() == [1, 1]
    np.testing.assert_allclose(positions, (CIRCLE.numpy() + 1) / 2)
    assert asked[0]["random_state"] == 5 and asked[0]["metric"] == "cosine"


def test_a_word_stands_at_its_place_whatever_its_length():
    for factor in (0.1, 10):
        at = place(factor * CIRCLE, CIRCLE, PLANE, k=3, temperature=0.005)
        np.testing.assert_allclose(at, PLANE, atol=1e-3)


def test_between_two_words_is_between_their_places():
    middle = place(CIRCLE[[0]] + CIRCLE[[1]], CIRCLE[:2], PLANE[:2])
    np.testing.assert_allclose(middle, [[0.5, 0]], atol=1e-6)
    nearer = place(2 * CIRCLE[[0]] + CIRCLE[[1]], CIRCLE[:2], PLANE[:2])
    assert nearer[0, 0] < 0.01
    assert place(CIRCLE, CIRCLE[:2], PLANE[:2], k=9).shape == (6, 2), "fewer words than neighbours"


def test_a_small_step_is_a_small_step_on_the_map():
    angle = torch.linspace(0, 1.5, 300)
    path = place(torch.stack([angle.cos(), angle.sin()], dim=1), CIRCLE, PLANE)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() < 0.05


def test_neighbours_kept_is_one_for_the_same_plane_and_less_for_a_shuffled_one():
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(60, generator=generator) * 6
    words = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert neighbours_kept(words, words, words, words, k=5) == 1
    v = words[:7] + 0.001
    assert neighbours_kept(v, v / v.norm(dim=-1, keepdim=True), words, words, k=5) == 1
    shuffled = words[torch.randperm(60, generator=generator)]
    by_chance = neighbours_kept(words, shuffled, words, shuffled, k=5)
    assert by_chance == pytest.approx(5 / 59, abs=0.06)
