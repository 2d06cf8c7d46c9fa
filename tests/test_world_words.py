"""Words made from pictures: the start of the tower, batches, noise for the decoder, measures."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dte_lab.evaluation.nearest import NearestDrawing, rendered_drawings
from dte_lab.world.train_decoder import border_ratio, denoiser_noise
from dte_lab.world.train_words import nearest_loss
from dte_lab.world.wide_batches import Composer, small_rgba
from dte_lab.world.word_space import CODE, ENTRY, PictureWords, low_rank, open_gates


def test_words_of_pictures_are_linear_and_as_loud_as_words():
    torch.manual_seed(0)
    z = torch.randn(400, 96, 4, 4) * torch.linspace(2, 0.1, 96)[:, None, None]
    words = PictureWords.fit(z)
    v = words(z)
    assert v.shape == (400, 192) and torch.all(v[:, CODE:-1] == 0)
    assert v[:, :CODE].square().mean().sqrt() == pytest.approx(ENTRY, rel=1e-4)
    between = words((z[:1] + z[1:2]) / 2)
    assert torch.allclose(between, (v[:1] + v[1:2]) / 2, atol=1e-5)


def test_regression_of_full_rank_is_least_squares():
    torch.manual_seed(0)
    x, y = torch.randn(200, 6), torch.randn(200, 3)
    a, b = low_rank(x, y, 3, torch.zeros(6, 6))
    assert torch.allclose(a @ b, torch.linalg.lstsq(x, y).solution, atol=1e-4)


def test_each_position_gets_a_map_of_its_own():
    torch.manual_seed(0)
    d, c, n = 48, 8, 400
    position, code = 3 * torch.randn(16, d), torch.randn(n, 1, d)
    seen = position + code * (torch.arange(d) >= 20)
    position[:, 20:] = 0
    maps = torch.randn(16, d, c) / 8
    residual = torch.einsum("nkd,kdc->nkc", code.expand(-1, 16, -1) * (torch.arange(d) >= 20), maps)
    residual = residual + torch.randn(16, c)  # a constant for each position, too
    layer = nn.Module()
    layer.mlp = SimpleNamespace(fc1=nn.Linear(d, 16 * 6), fc2=nn.Linear(16 * 6, d))
    write = torch.linalg.qr(torch.randn(d, c))[0]
    open_gates(layer, seen, residual, write, shyness=1e-3)
    hidden = layer.mlp.fc1(seen)
    hidden = hidden * torch.sigmoid(1.702 * hidden)  # the activation of CLIP
    added = layer.mlp.fc2(hidden) @ write
    assert (added - residual).square().mean() < 0.1 * residual.var()


def test_a_batch_without_a_known_word_costs_nothing():
    v, names = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    loss = nearest_loss(v, torch.full((3,), -1), names)
    loss.backward()
    assert loss == 0 and torch.all(v.grad == 0)
    own = nearest_loss(names[[2]], torch.tensor([2]), names)
    assert own < nearest_loss(names[[1]], torch.tensor([2]), names)


def test_seams_and_variants_of_things():
    rgba = torch.zeros(2, 48, 48, 4, dtype=torch.uint8)
    rgba[0], rgba[1] = 255, 51
    compose = Composer(rgba)
    left, right = torch.tensor([0]), torch.tensor([1])
    thing = compose.thing(left, right, torch.tensor([12]), torch.tensor([0]))
    assert torch.all(thing[0, :, :12] == 1) and torch.allclose(thing[0, :, 12:], torch.tensor(0.2))
    mirrored = compose.thing(left, right, torch.tensor([12]), torch.tensor([24]))
    assert torch.equal(mirrored, thing.flip(2))


def test_noise_is_shared_within_a_cell_and_borders_are_seen():
    torch.manual_seed(0)
    noise = denoiser_noise(torch.zeros(2000, 96, 4, 4)).unflatten(1, (24, 4))
    patches = noise.transpose(1, 2).flatten(2)  # (B, 4 patches, ...)
    alike = torch.corrcoef(patches.transpose(0, 1).flatten(1))[0, 1]
    assert 0.4 < alike < 0.6
    x = torch.zeros(2, 3, 64, 64)
    x[0, :, :, 32:] = 1  # a border of cells
    x[1, :, :, 28:] = 1
    x += 0.01 * torch.rand(1, 1, 64, 64)
    assert border_ratio(x)[0] > 5 and border_ratio(x)[1] < 0.9


def test_a_drawing_is_nearest_to_its_own_rendering(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    rgba = small_rgba(["cat", "anchor"])[::3]
    nearest = NearestDrawing(rgba, "beach", tmp_path)
    true = rendered_drawings(rgba, "beach")
    measures = nearest.measures(true)
    assert measures["own"].all() and measures["identity"].min() > 0.999
    swapped = NearestDrawing(rgba, "beach", tmp_path).measures(true.flip(0))  # from the cache
    assert not swapped["own"].any()
