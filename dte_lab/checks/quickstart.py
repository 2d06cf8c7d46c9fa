"""Checks of the exercises in 00_quickstart."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dte_lab.checks.compare import WrongAnswer, call, call_thin, compare, exercise, refuse_whole


@exercise
def nearest_words(answer: Callable[..., object]) -> None:
    """00, exercise 1: (v (d,), embeddings (n, d), words, k) -> the k nearest words by cosine."""
    words = ["tram", "bus", "car", "kite", "moon", "soup"]
    # Lengths and angles to v are set apart, so that each wrong measure gives another order.
    length = torch.tensor([0.3, 1.0, 0.8, 6.0, 2.0, 0.5])
    angle = torch.deg2rad(45 + torch.tensor([5.0, -25.0, 40.0, 60.0, 100.0, 170.0]))
    table = length[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)  # (6, 2)
    v = F.normalize(torch.tensor([1.0, 1.0]), dim=0)
    got = call(answer, v, table, words, 3)
    listed = isinstance(got, list | tuple) and len(got) == 3
    if not listed or not all(isinstance(word, str) and word in words for word in got):
        raise WrongAnswer(f"Return a list of k words, here 3 of {words}; got {got!r}.")
    got = list(got)

    def ranked(score: Tensor) -> list[str]:
        return [words[i] for i in score.topk(3).indices.tolist()]

    cosine = F.cosine_similarity(table, v[None], dim=1)
    compare(
        got,
        ranked(cosine),
        {
            "The list is upside down: the largest cosine comes first.": ranked(cosine)[::-1],
            "These are the words that are least alike: topk, or sort with descending=True.": ranked(
                -cosine
            ),
            "These are the largest dot products, which long vectors win: divide each row of the "
            "table by its own norm (dim=-1).": ranked(table @ v),
            "These are the smallest Euclidean distances, in which length counts: normalise first, "
            "or use the dot product of unit vectors.": ranked(-(table - v).norm(dim=1)),
            "The table was normalised along the wrong axis: each word is a row, so take norms "
            "over dim=-1.": ranked(F.normalize(table, dim=0) @ v),
            "The sign of the cosine is lost: an opposite vector is far away, not near.": ranked(
                cosine.abs()
            ),
        },
        "Compare the cosine of v with every row of the table, and take the k largest.",
    )
    print("nearest_words: right. Only the direction of a vector counts, not its length.")


@exercise
def low_rank_offset(answer: Callable[..., object]) -> None:
    """00, exercise 2: (x (T, Din), W (Dout, Din), A (Din, r), B (r, Dout)) -> (T, Dout)."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, generator=g), torch.randn(4, 5, generator=g)
    a, b = torch.randn(5, 2, generator=g), torch.randn(2, 4, generator=g)
    base, extra = x @ weight.T, x @ a @ b
    got, numel = call_thin(answer, x, weight, a, b)
    compare(
        got,
        base + extra,
        {
            "The layer itself is missing: W stays, A B only comes on top.": extra,
            "The offset is missing: add x A B.": base,
            "The sign is wrong: the offset is added, W' = W + A B.": base - extra,
            "The offset is divided by the rank, as LoRA libraries do with alpha / r. Here it is "
            "A B itself.": base + extra / 2,
            "The offset was multiplied with the layer's output instead of added.": base * extra,
        },
        "The layer gives x W^T (torch keeps W as (Dout, Din)); the offset gives (x A) B, with A "
        "first: x has Din columns, and so A has Din rows.",
    )
    refuse_whole(numel, a, b, "Multiply x with A first, and the result, which is thin, with B.")
    print("low_rank_offset: right. A B was never formed: two thin products are enough.")


@exercise
def blend(answer: Callable[..., object]) -> None:
    """00, exercise 3: (soft, hard, alpha) -> alpha * soft + (1 - alpha) * hard, any shape."""
    g = torch.Generator().manual_seed(0)
    soft, hard = torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    for alpha in (0.8, 0.0, 1.0):
        compare(
            call(answer, soft, hard, alpha),
            alpha * soft + (1 - alpha) * hard,
            {
                "The two paths are swapped: alpha = 1 is the soft path alone.": (1 - alpha) * soft
                + alpha * hard,
                "The coefficients must add up to 1: the hard path gets 1 - alpha.": alpha * soft
                + hard,
                "Both paths count in full: weigh them with alpha and 1 - alpha.": soft + hard,
                "Both paths are weighed with alpha: the hard one gets 1 - alpha.": alpha * soft
                + alpha * hard,
                "alpha is not used: this is the plain mean.": (soft + hard) / 2,
                "The hard path is missing.": alpha * soft,
            },
            f"With alpha = {alpha} the result should be {alpha:g} * soft + {1 - alpha:g} * hard.",
        )
    print("blend: right. alpha = 1 is the prediction alone, alpha = 0 the model's own word.")
