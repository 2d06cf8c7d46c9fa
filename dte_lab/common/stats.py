"""Numbers about numbers: intervals, distances between samples, how they are written."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def interval(hits: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of hits (or other values) with its bootstrap 95 % interval (2,000 resamples) and n."""
    rng = np.random.default_rng(seed)
    hits = np.asarray(hits, float)
    means = rng.choice(hits, (2000, len(hits))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(hits.mean()), "low": float(low), "high": float(high), "n": len(hits)}


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel Inception distance (arXiv 1801.01401) of features x (n, d) and y (m, d): unbiased
    squared maximum mean discrepancy of the kernel (x.y / d + 1)**3."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def percent(value: dict) -> str:
    """A mean with its interval, of shares from 0 to 1."""
    mean, low, high = (100 * value[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def bracketed(value: Mapping[str, float], digits: int = 3, sign: str = "") -> str:
    """A mean with its interval; sign: "+" for differences, whose direction is to be seen."""
    mean, low, high = (f"{value[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def verdict(
    difference: Mapping[str, float], higher: str = "higher", lower: str = "lower",
    neither: str = "not told apart",
) -> str:  # fmt: skip
    """What an interval says of a difference."""
    if difference["low"] > 0:
        return higher
    return lower if difference["high"] < 0 else neither


def mean_and_error(
    intervals: Iterable[Mapping[str, float]],
) -> tuple[np.ndarray, np.ndarray]:
    """Means (n,) of intervals {mean, low, high}, and how far the ends lie below and above (2, n).

    That is what matplotlib's `errorbar` draws.
    """
    table = np.array([[r["mean"], r["low"], r["high"]] for r in intervals])
    mean, low, high = table.reshape(-1, 3).T
    return mean, np.array([mean - low, high - mean])


def psnr(
    x: Float[Tensor, "pictures 3 height width"], y: Float[Tensor, "pictures 3 height width"]
) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; pictures in [-1, 1]."""
    error = (x.clamp(-1, 1) - y).pow(2).flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())
