import numpy as np
import torch

from dte_lab.contrastive import contrastive_loss, norm_loss


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
