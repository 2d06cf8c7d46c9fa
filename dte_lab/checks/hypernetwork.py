"""Checks of the exercises in 03_lora_hypernetwork."""

from collections.abc import Callable

import torch
from torch import Tensor

from dte_lab.checks.compare import WrongAnswer, call, call_thin, compare, exercise, refuse_whole

THIN = "Reorder the products so that only r x r matrices appear."


def scalar(got: object) -> Tensor:
    """A number or a tensor with one entry as a tensor of shape (); else WrongAnswer."""
    if isinstance(got, int | float):
        return torch.tensor(float(got))
    if not isinstance(got, torch.Tensor) or got.numel() != 1:
        shape = f" of shape {tuple(got.shape)}" if isinstance(got, torch.Tensor) else ""
        raise WrongAnswer(f"Return one number; got {type(got).__name__}{shape}.")
    return got.reshape(())


@exercise
def largest_useful_rank(answer: Callable[..., object]) -> None:
    """03, exercise 1: (d_in, d_out) -> the largest rank at which A and B are smaller than W."""
    for d_in, d_out in ((768, 320), (192, 192), (12, 6), (96, 192), (2, 3)):
        full = d_in * d_out
        expected = (full - 1) // (d_in + d_out)
        got = call(answer, d_in, d_out)
        if isinstance(got, float) and not got.is_integer():
            raise WrongAnswer(f"A rank is a whole number: got {got}, round it down.")
        if not isinstance(got, int | float):
            raise WrongAnswer(f"Return a whole number; got {type(got).__name__}.")
        compare(
            int(got),
            expected,
            {
                "At this rank A and B have exactly as many numbers as W, not fewer.": full
                // (d_in + d_out),
                "This is the largest rank that A B can have at all. Ask instead when A and B "
                "together, r (Din + Dout) numbers, stay below Din Dout.": min(d_in, d_out),
                "Only one of the two matrices is counted: A has Din r numbers, B has r Dout.": (
                    full - 1
                )
                // d_in,
                "Only one of the two matrices is counted: B has r Dout numbers, A has Din r.": (
                    full - 1
                )
                // d_out,
                "This is one too many: with it A and B are no longer smaller than W.": expected + 1,
            },
            f"For Din = {d_in} and Dout = {d_out}, W has {full} numbers and each unit of rank "
            f"costs {d_in + d_out}.",
        )
    print("largest_useful_rank: right. For a square W it is just below half the width.")


@exercise
def low_rank_norm(answer: Callable[..., object]) -> None:
    """03, exercise 2: (A (Din, r), B (r, Dout)) -> Frobenius norm of A B, without forming it."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 3, generator=g), torch.randn(3, 40, generator=g)
    a[:, 1] += 2 * a[:, 0]  # columns that are not orthogonal
    left, right = a.T @ a, b @ b.T  # (r, r)
    square = (left * right).sum()
    got, numel = call_thin(answer, a, b)
    compare(
        scalar(got),
        square.sqrt(),
        {
            "This is the square of the norm: take the root.": square,
            "This is the product of the two norms. It is only an upper bound: A and B can partly "
            "miss each other.": a.norm() * b.norm(),
            "This takes only the diagonals of A^T A and B B^T, as if the columns of A were "
            "orthogonal.": (left.diagonal() * right.diagonal()).sum().sqrt(),
            "This is the norm of (A^T A)(B B^T), a matrix product: multiply A^T A and B B^T entry "
            "by entry, and add up.": (left @ right).norm(),
            "This adds up the norms of A and B, but the change is their product.": a.norm()
            + b.norm(),
            "This is the sum of all entries of A B, without their squares.": (a @ b).sum(),
        },
        "The square of the norm is tr(B^T A^T A B), and the trace does not change when factors "
        "are moved round in a circle: tr((A^T A)(B B^T)).",
    )
    refuse_whole(numel, a, b, THIN)
    print("low_rank_norm: right. Two r x r matrices were enough.")


@exercise
def offset_cosine(answer: Callable[..., object]) -> None:
    """03, exercise 3: (A1, B1, A2, B2) -> cosine of A1 B1 and A2 B2 as vectors of entries."""
    g = torch.Generator().manual_seed(1)
    a1, b1 = torch.randn(50, 3, generator=g), torch.randn(3, 40, generator=g)
    mix = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, -2.0]])  # not symmetric
    a2 = a1 @ mix + 0.5 * torch.randn(50, 3, generator=g)
    b2 = b1.flip(0) - 0.5 * torch.randn(3, 40, generator=g)
    # Opposed rather than alike, and rescaled by s and 1/s, which leaves the change as it is.
    a2, b2 = -4 * a2, b2 / 4

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((a.T @ c) * (b @ d.T)).sum()

    both = inner(a1, b1, a2, b2)
    norms = (inner(a1, b1, a1, b1) * inner(a2, b2, a2, b2)).sqrt()
    got, numel = call_thin(answer, a1, b1, a2, b2)

    def flat(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)

    compare(
        scalar(got),
        both / norms,
        {
            "This is the inner product: divide it by the two norms.": both,
            "The norms are squared: divide by the root of <1, 1> <2, 2>.": both / norms**2,
            "The sign is lost: two changes can be opposed.": (both / norms).abs(),
            "The products of the norms of A and B are not the norm of A B: see exercise 2.": both
            / (a1.norm() * b1.norm() * a2.norm() * b2.norm()),
            "The rows and columns of the two r x r matrices do not match: where A1 gives the rows "
            "of one, B1 must give the rows of the other.": ((a1.T @ a2) * (b2 @ b1.T)).sum()
            / norms,
            "This compares A1 with A2 alone. The same change can be written with many A.": flat(
                a1, a2
            ),
            "This compares B1 with B2 alone. The same change can be written with many B.": flat(
                b1, b2
            ),
            "This averages the cosines of the A and of the B. The same change can be written with "
            "many pairs; only the products say how alike they are.": (flat(a1, a2) + flat(b1, b2))
            / 2,
        },
        "<A1 B1, A2 B2> = tr(B1^T A1^T A2 B2) = sum of (A1^T A2) * (B1 B2^T) over all entries; "
        "divide by the root of <A1 B1, A1 B1> <A2 B2, A2 B2>.",
    )
    refuse_whole(numel, a1, b1, THIN)
    print("offset_cosine: right. Two changes compared, and neither was formed.")
