"""Checks of the exercises in 02_contrastive_regularization."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dte_lab.checks.compare import WrongAnswer, call, compare, exercise


@exercise
def contrastive_loss(answer: Callable[..., object]) -> None:
    """02, exercise 1: (v (d,), positives (N, d), negatives (M, d), temperature) -> scalar."""
    g = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(6, generator=g)
    positives = v + 2 * torch.randn(3, 6, generator=g)
    negatives = 0.5 * torch.randn(4, 6, generator=g)
    near, far = (F.cosine_similarity(x, v[None], dim=-1) for x in (positives, negatives))

    def loss(near: Tensor, far: Tensor) -> Tensor:
        return torch.cat([near, far]).logsumexp(0) - near.logsumexp(0)

    for tau in (0.5, 0.1, 0.002):
        a, b = near / tau, far / tau
        each = torch.cat([a, b]).logsumexp(0) - a  # (N,)
        got = call(answer, v, positives, negatives, tau)
        if tau == 0.002 and isinstance(got, torch.Tensor) and not got.isfinite().all():
            raise WrongAnswer(
                f"Right, but at temperature {tau} the result is {got.tolist()}: the exponentials "
                "overflow. torch.logsumexp does log and sum of exponentials in one, safely."
            )
        compare(
            got,
            loss(a, b),
            {
                "The temperature is always 0.1 here: use the argument.": loss(
                    near / 0.1, far / 0.1
                ),
                "The temperature is not used: divide each cosine by it.": loss(near, far),
                "The cosines were multiplied by the temperature: divide by it.": loss(
                    near * tau, far * tau
                ),
                "These are dot products, in which length counts: make v, positives and negatives "
                "unit vectors along dim=-1.": loss(positives @ v / tau, negatives @ v / tau),
                "The sign is wrong: the loss is minus the logarithm.": -loss(a, b),
                "The denominator lacks the positives: it is the sum over both.": b.logsumexp(0)
                - a.logsumexp(0),
                "This is the probability itself: take minus its logarithm.": (-loss(a, b)).exp(),
                "Here each positive has a loss of its own. In the paper's formula the positives "
                "are summed inside the logarithm.": torch.stack([loss(x[None], b) for x in a])
                .mean(),
                "This is the mean over the positives of a logarithm each. In the paper's formula "
                "they are summed inside the logarithm.": each.mean(),
                "This is the sum over the positives of a logarithm each. In the paper's formula "
                "they are summed inside the logarithm.": each.sum(),
                "Positives and negatives are swapped: v* shall be near its words.": loss(b, a),
            },
            f"At temperature {tau} with {len(a)} positives and {len(b)} negatives it should be "
            f"{loss(a, b).item():.4f}: logsumexp over all, minus logsumexp over the positives.",
        )  # fmt: skip
    print("contrastive_loss: right, and safe at small temperatures.")


@exercise
def negatives_mask(answer: Callable[..., object]) -> None:
    """02, exercise 2: (concepts (B,), bank_concepts (M,)) -> bool (B, B + M)."""
    concepts, bank = torch.tensor([3, 1, 3, 7]), torch.tensor([1, -1, 3, 5, -1])
    ids = torch.cat([concepts, bank])
    other = ids != concepts[:, None]  # (4, 9)
    expected = other & (ids != -1)
    got = call(answer, concepts, bank)
    if isinstance(got, torch.Tensor) and got.dtype != torch.bool:
        raise WrongAnswer(f"Return booleans, as a comparison gives them; got {got.dtype}.")
    diagonal = torch.arange(len(ids)) != torch.arange(len(concepts))[:, None]
    compare(
        got,
        expected,
        {
            "Empty rows of the bank, marked with -1, are no concepts: leave them out.": other,
            "The mask is upside down: it is true where a negative counts.": ~expected,
            "Only the sample itself is left out. Other pictures of the same concept are no "
            "negatives either.": diagonal & (ids != -1),
            "The batch is missing: its other samples are negatives as well as the bank's.":
            expected[:, len(concepts) :],
            "The bank is missing: append its columns to those of the batch.":
            expected[:, : len(concepts)],
            "Rows and columns are swapped: one row per sample of the batch.": expected.T,
            "This is true for the same concept; a negative is another one.": ~other,
            "The bank comes first here; the order is batch, then bank.": expected.roll(
                len(bank), dims=1
            ),
        },
        "Compare each sample's concept (as a column, concepts[:, None]) with the ids of batch and "
        "bank in one row.",
    )  # fmt: skip
    print("negatives_mask: right. The same thing in another picture is not pushed away.")


@exercise
def cosine_gradient(answer: Callable[..., object]) -> None:
    """02, exercise 3: (v (d,), u (d,)) -> gradient of their cosine with respect to v, (d,)."""
    g = torch.Generator().manual_seed(1)
    for length in (3.0, 0.5):
        v = length * F.normalize(torch.randn(5, generator=g), dim=0)
        u = 2 * torch.randn(5, generator=g)
        unit, target = F.normalize(v, dim=0), F.normalize(u, dim=0)
        cosine = unit @ target
        across = target - cosine * unit
        compare(
            call(answer, v, u),
            across / length,
            {
                "A long v turns more slowly: divide by the norm of v.": across,
                "The norm of v divides once: the unit vectors are divided already.": across
                / length**2,
                "The norm of v divides, it does not multiply.": across * length,
                "This points at u, but the part along v changes the length alone, which a cosine "
                "does not see: subtract cos(v, u) times the unit vector of v.": target / length,
                "This points at u, whole and unscaled; see the formula above.": u,
                "This is the unit vector towards u; the part along v has to go, and the norm of v "
                "divides.": target,
                "The sign is wrong: moving along the gradient makes the cosine larger.": -across
                / length,
                "Subtract cos(v, u) times the unit vector of v, not the whole unit vector.": (
                    target - unit
                )
                / length,
                "u is not a unit vector here: divide it by its norm first.": (u - cosine * unit)
                / length,
            },
            "It should be (u/||u|| - cos(v, u) v/||v||) / ||v||. Is your result perpendicular to "
            "v? It must be.",
        )
    print("cosine_gradient: right. It is perpendicular to v, and shorter for a longer v.")
