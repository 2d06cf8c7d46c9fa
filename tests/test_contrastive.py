import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import MethodConfig, TokenTable
from dte_lab.config import REGULARISERS
from dte_lab.contrastive import (
    contrastive_loss,
    gaussian_loss,
    norm_loss,
    prompt_embedding,
    regularise,
)


def plain_loss(v_star, positives, negatives, mask, tau):
    """The paper's formula in numpy, sample by sample."""

    def cosine(a, b):
        return (a @ b) / np.sqrt((a @ a) * (b @ b))

    losses = []
    for v, near, keep in zip(v_star, positives, mask, strict=True):
        pull = sum(np.exp(cosine(v, p) / tau) for p in near)
        push = sum(np.exp(cosine(v, n) / tau) for n, k in zip(negatives, keep, strict=True) if k)
        losses.append(-np.log(pull / (pull + push)))
    return np.mean(losses)


rng = np.random.default_rng(0)
V, P, N = rng.normal(size=(3, 5)), rng.normal(size=(3, 4, 5)), rng.normal(size=(6, 5))
MASK = rng.random((3, 6)) < 0.6


def ours(v_star, tau=0.2):
    tensors = [torch.as_tensor(x) for x in (P, N, MASK)]
    return contrastive_loss(v_star, *tensors, temperature=tau)


def test_value_against_numpy():
    for tau in (0.07, 0.2, 1.0):
        value = ours(torch.as_tensor(V), tau).item()
        np.testing.assert_allclose(value, plain_loss(V, P, N, MASK, tau), rtol=1e-10)


def test_gradient_against_finite_differences():
    v = torch.tensor(V, requires_grad=True)
    ours(v).backward()
    numeric, step = np.zeros_like(V), 1e-6
    for i in np.ndindex(V.shape):
        e = np.zeros_like(V)
        e[i] = step
        up, down = (plain_loss(V + s * e, P, N, MASK, 0.2) for s in (1, -1))
        numeric[i] = (up - down) / (2 * step)
    np.testing.assert_allclose(v.grad.numpy(), numeric, rtol=1e-5, atol=1e-8)


def test_negatives_get_gradients_and_none_means_zero_loss():
    negatives = torch.tensor(N, requires_grad=True)
    contrastive_loss(torch.tensor(V), torch.tensor(P), negatives).backward()
    assert negatives.grad.abs().min() > 0
    v = torch.tensor(V, requires_grad=True)
    loss = contrastive_loss(v, torch.tensor(P), torch.zeros(0, 5, dtype=torch.double))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(v.grad).all()


def test_masked_batch_without_any_negative_is_finite():
    """A batch of one concept and an empty bank."""
    v = torch.tensor(V, requires_grad=True)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    loss = contrastive_loss(v, torch.tensor(P), torch.tensor(N), mask)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(v.grad).all()


def test_norm_loss():
    v = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    assert norm_loss(v, 5.0).item() == (1 + 4) / 2
    assert norm_loss(v, 5.0, free=1.5).item() == pytest.approx((0 + 0.25) / 2)


@pytest.fixture(scope="module")
def table(tiny_backbone):
    return TokenTable(tiny_backbone)


def v_stars(seed=0):
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(seed)) * 0.05


def terms(regulariser, table, v, **kwargs):
    config = MethodConfig(
        regulariser=regulariser, num_positives=3, contrastive_weight=0.1, norm_weight=0.2,
        regulariser_weight=0.3,
    )  # fmt: skip
    found = regularise(v, table, config, **kwargs)
    return {name: weight for name, (weight, _) in found.items()}, {
        name: value.item() for name, (_, value) in found.items()
    }


def test_each_regulariser_has_its_terms(table):
    expected = {
        "contrastive": {"contrastive": 0.1, "norm": 0.2}, "none": {}, "norm": {"norm": 0.2},
        "l2": {"l2": 0.3}, "nearest": {"nearest": 0.3}, "hinge": {"hinge": 0.3, "norm": 0.2},
        "gaussian": {"gaussian": 0.3},
    }  # fmt: skip
    assert set(expected) == set(REGULARISERS)
    for name, weights in expected.items():
        assert terms(name, table, v_stars())[0] == weights
    with pytest.raises(ValueError, match="regulariser"):
        MethodConfig(regulariser="l1")


def test_values_against_loops(table):
    v = v_stars()
    l2, nearest, hinge, gaussian = [], [], [], []
    class_word = v_stars(seed=1)
    mean = table.embeddings.mean(0).numpy()
    precision = np.linalg.inv(
        0.9 * np.cov(table.embeddings.T.numpy(), bias=True)
        + 0.1 * table.embeddings.var(0, correction=0).mean().item() * np.eye(24)
    )
    for x, word in zip(v, class_word, strict=True):
        cosines = [F.cosine_similarity(x, e, dim=0).item() for e in table.embeddings]
        best = sorted(range(len(table)), key=lambda i: -cosines[i])[:3]
        l2.append(((x - word) ** 2).sum().item() / table.mean_norm**2)
        near = table.embeddings[best[0]]
        nearest.append(((x - near) ** 2).sum().item() / table.mean_norm**2)
        hinge += [max(0.0, table.neighbour_cosine(3) - cosines[i]) for i in best]
        gaussian.append((x.numpy() - mean) @ precision @ (x.numpy() - mean) / 24)
    found = {name: terms(name, table, v)[1] for name in REGULARISERS}
    assert terms("l2", table, v, class_word=class_word)[1]["l2"] == pytest.approx(np.mean(l2), 1e-4)
    assert found["l2"]["l2"] == pytest.approx(np.mean(nearest), 1e-4)
    assert found["nearest"]["nearest"] == pytest.approx(np.mean(nearest), 1e-4)
    assert found["hinge"]["hinge"] == pytest.approx(np.mean(hinge), 1e-4) and np.mean(hinge) > 0
    assert found["gaussian"]["gaussian"] == pytest.approx(np.mean(gaussian), 1e-3)


def test_words_are_typical(table):
    """Words have about the Gaussian loss 1 where there are many; a word is its own nearest word."""
    many = copy.copy(table)
    many.__dict__.pop("gaussian", None)
    g = torch.Generator().manual_seed(0)
    many.embeddings = torch.randn(4000, 8, generator=g) @ torch.randn(8, 8, generator=g) + 3
    value = gaussian_loss(many.embeddings, *many.gaussian).item()
    assert 0.6 < value < 1.1  # less than 1 by the shrinkage
    assert gaussian_loss(2 * many.embeddings, *many.gaussian).item() > 3 * value
    assert terms("nearest", table, table.embeddings[:3])[1]["nearest"] == pytest.approx(0, abs=1e-9)


def test_projection_puts_the_nearest_word_in_use_and_lets_gradients_pass(table):
    v = (table.embeddings[[2, 5]] * 1.5 + 1e-3).requires_grad_()
    config = MethodConfig(regulariser="nearest")
    used = prompt_embedding(v, table, config)
    torch.testing.assert_close(used, table.embeddings[[2, 5]])
    weight = torch.randn(2, 24)
    grad = torch.autograd.grad((used * weight).sum(), v)[0]
    assert torch.equal(grad, weight)
    assert prompt_embedding(v, table, replace(config, regulariser="contrastive")) is v
