"""Checks of the exercises in 04_dual_path."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dte_lab.checks.compare import WrongAnswer, call, compare, exercise


@exercise
def soft_attention(answer: Callable[..., object]) -> None:
    """04, exercise 1: (x (T, C), text (L, d), W, offsets) -> (T, D), one head of the soft path.

    W and offsets are dicts with the keys "q", "k" and "v": weights (D, Din), and pairs A (Din, r),
    B (r, D).
    """
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 6, generator=g), torch.randn(5, 4, generator=g)
    widths = {"q": 6, "k": 4, "v": 4}  # C and D are equal, so that a forgotten transpose runs
    W = {name: 0.5 * torch.randn(6, d, generator=g) for name, d in widths.items()}
    offsets = {
        name: (torch.randn(d, 2, generator=g), 0.5 * torch.randn(2, 6, generator=g))
        for name, d in widths.items()
    }

    def result(
        changed: str = "qkv", axis: int = -1, scale: float = 6**-0.5, turned: bool = False
    ) -> Tensor:
        z = {}
        for name, source in (("q", x), ("k", text), ("v", text)):
            a, b = offsets[name]
            change = (a @ b).T if turned and name == "q" else a @ b
            z[name] = source @ (W[name].T + change * (name in changed))
        return (scale * z["q"] @ z["k"].T).softmax(axis) @ z["v"]

    got = call(answer, x, text, dict(W), dict(offsets))
    compare(
        got,
        result(),
        {
            "The offsets are missing: each of q, k and v gets its own A B on top.": result(""),
            "Only q has its offset: k and v have theirs, too.": result("q"),
            "v lacks its offset.": result("qk"),
            "k lacks its offset.": result("qv"),
            "q lacks its offset.": result("kv"),
            "The scores are not scaled: divide q k^T by the square root of the number of entries "
            "of q, here 6.": result(scale=1),
            "The scores are divided by the size itself; it is its square root.": result(
                scale=1 / 6
            ),
            "The scores are scaled by the width of the text; it is that of q and k.": result(
                scale=4**-0.5
            ),
            "The softmax runs over the wrong axis: each position of the picture shares out its "
            "attention among the tokens, so every row of (T, L) adds up to 1.": result(axis=0),
            "PyTorch keeps weights as (D, Din), the offset A B is (Din, D): add its transpose to "
            "W, or use x @ A @ B.": result(turned=True),
        },
        "Form q = x W^T + x A B, and likewise k and v from the text; then softmax(q k^T / sqrt) v.",
    )
    print("soft_attention: right. Three thin products changed what the layer looks at and says.")


@exercise
def dual_output(answer: Callable[..., object]) -> None:
    """04, exercise 2: (soft (T, D), hard (T, D), alpha, project, A (D, r), B (r, C)) -> (T, C).

    `project` is the output projection; it may see T rows, not 2 T.
    """
    g = torch.Generator().manual_seed(0)
    soft, hard = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    weight, bias = torch.randn(5, 6, generator=g), torch.randn(5, generator=g)
    a, b = torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)
    seen = []

    def project(z: Tensor) -> Tensor:
        if isinstance(z, torch.Tensor) and z.ndim == 2:
            seen.append(len(z))
        return F.linear(z, weight, bias)

    for alpha in (0.7, 0.0, 1.0):
        seen.clear()
        got = call(answer, soft, hard, alpha, project, a, b)
        mixed = alpha * soft + (1 - alpha) * hard
        base, extra = F.linear(mixed, weight, bias), soft @ a @ b
        summed = F.linear(soft + hard, weight)
        swapped = F.linear((1 - alpha) * soft + alpha * hard, weight, bias)
        compare(
            got,
            base + alpha * extra,
            {
                "The offset A B is missing: the soft path's projection has one.": base,
                "The offset counts in full: it belongs to the soft path, so alpha weighs it, "
                "too.": base + extra,
                "The offset was applied to the blend, and so to the hard path as well: it is of "
                "the soft result alone.": base + mixed @ a @ b,
                "The bias is counted twice: blend first, then project.": base
                + alpha * extra
                + bias,
                "Both paths count in full: weigh them with alpha and 1 - alpha.": summed
                + 2 * bias
                + extra,
                "The paths are swapped: alpha = 1 is the soft path alone.": swapped
                + (1 - alpha) * extra,
            },
            f"With alpha = {alpha} it should equal {alpha:g} * (project(soft) + soft A B) + "
            f"{1 - alpha:g} * project(hard).",
        )
        if sum(seen) > len(soft):
            raise WrongAnswer(
                f"The numbers are right, but project has seen {sum(seen)} rows where {len(soft)} "
                "are enough: blend soft and hard before you project."
            )
    print("dual_output: right. The coefficients add up to 1, so one projection serves both paths.")


@exercise
def alpha_schedule(answer: Callable[..., object]) -> None:
    """04, exercise 3: (t (B,), T, first, last) -> (B,), from first at t = T to last at t = 0."""
    t, T, first, last = torch.tensor([1000.0, 750.0, 250.0, 0.0]), 1000, 0.9, 0.3
    share = t / T
    right = last + (first - last) * share
    compare(
        call(answer, t, T, first, last),
        right,
        {
            "The ends are swapped: sampling starts at t = T, where alpha is `first`.": first
            + (last - first) * share,
            "`last` is missing: at t = 0 alpha is `last`, not 0.": first * share,
            "Divide t by T: the share of the way is between 0 and 1.": last + (first - last) * t,
            "Divide by T itself, not by T - 1: alpha is `first` at t = T.": last
            + (first - last) * t / (T - 1),
            "This is a step; between the ends alpha lies on a straight line.": torch.where(
                share > 0.5, first, last
            ),
            "This is the mean of the ends for every t: let alpha follow t.": torch.full_like(
                t, (first + last) / 2
            ),
            "The line is bent: alpha changes by the same amount for each step of t.": last
            + (first - last) * share**2,
        },
        "A straight line in t: `first` at t = T, `last` at t = 0.",
    )
    print("alpha_schedule: right. t runs from T down to 0 while the picture takes shape.")
