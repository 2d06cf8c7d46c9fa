"""Figures of 03_lora_hypernetwork: counts, heads, spectra, and which changes are alike.

The rank sweep's figures and its panel are in ranks.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dte_lab.common.plots import HAIRLINE, INK, MUTED
from dte_lab.hypernetwork import LoRAHypernetwork
from dte_lab.lora import PROJECTIONS
from dte_lab.panels.shared import AFTER, BEFORE, plain, projection_maps

KINDS = [(branch, p) for branch in ("attn1", "attn2") for p in PROJECTIONS]


def fit_figure(ranks: Sequence[int], left: Sequence[float], bound: Sequence[float]) -> Figure:
    """Share of a weight change that A B misses, by rank: as trained, and the best possible."""
    figure = Figure(figsize=(5.2, 3), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(ranks, bound, "-", color=BEFORE, label="the best possible at this rank")
    ax.plot(ranks, left, "o", color=AFTER, markersize=6, label="A and B trained")
    ax.set_xticks(ranks)
    ax.set_xlabel("rank r")
    ax.set_ylabel("part that is missed\n(share of the norm)")
    ax.set_ylim(0, 1.05)
    ax.legend(frameon=False)
    plain(ax)
    return figure


def counts_figure(counts: Mapping[str, Mapping[str, int]], reference: Mapping[str, int]) -> Figure:
    """Parameters of hypernetworks as points on a log scale, one column per backbone.

    counts: {backbone: {rank: parameters}}. reference: {backbone: parameters of its UNet}, a line.
    """
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for ax, (name, values) in zip(axes, counts.items(), strict=True):
        ax.axvline(reference[name], color=INK, linestyle="--", linewidth=1, zorder=1)
        for y, (rank, value) in enumerate(values.items()):
            colour, marker = (BEFORE, "s") if rank == "full" else (AFTER, "o")
            ax.plot(value, y, marker, color=colour, markersize=8)
            ax.annotate(
                short_number(value), (value, y), (-8, 0), textcoords="offset points",
                ha="right", va="center", fontsize=8,
            )  # fmt: skip
        ax.set_xscale("log")
        every = [*values.values(), reference[name]]
        ax.set_xlim(min(every) / 12, 3 * max(every))
        ax.set_yticks(
            range(len(values)), ["whole matrices" if r == "full" else f"rank {r}" for r in values]
        )
        ax.set_ylim(len(values) - 0.5, -0.5)
        ax.set_title(
            f"{name}  (dashed: its whole UNet, {short_number(reference[name])})",
            fontsize=10, color=INK,
        )  # fmt: skip
        ax.set_xlabel("parameters of the hypernetwork")
        ax.grid(axis="y", color=HAIRLINE)
        plain(ax)
    return figure


def short_number(n: float) -> str:
    """12345678 -> '12.3 M'."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def heads_figure(net: LoRAHypernetwork, num_tokens: int) -> Figure:
    """How a LoRAHypernetwork makes its matrices: tokens, queries, and one head per shape."""
    heads, width = list(net.groups.items()), net.queries.shape[1]
    figure = Figure(figsize=(9, 0.9 + 0.62 * max(4, len(heads))), layout="constrained")
    ax = figure.add_subplot()
    top = len(heads)
    middle = top / 2

    def box(
        x: float, y: float, w: float, h: float, text: str, colour: str, hatch: str = ""
    ) -> None:
        ax.add_patch(
            FancyBboxPatch(
                (x, y - h / 2), w, h, boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor="white", edgecolor=colour, linewidth=2, hatch=hatch,
            )
        )  # fmt: skip
        ax.text(
            x + w / 2, y, text, ha="center", va="center", fontsize=9, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip

    def arrow(start: tuple[float, float], end: tuple[float, float], weight: float = 1.5) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": MUTED, "lw": weight})

    number = len(net.queries)
    box(0, middle + 0.9, 2.2, 1.1, f"picture's tokens\n{num_tokens} × {width}", MUTED)
    box(0, middle - 0.9, 2.2, 1.1, f"learned queries\n{number} × {width}", MUTED)
    box(3, middle, 2.2, 2.0, f"queries read tokens\n{len(net.blocks)} blocks\n\nanswers\n"
        f"{number} × {width}", INK)  # fmt: skip
    arrow((2.25, middle + 0.9), (2.95, middle + 0.5))
    arrow((2.25, middle - 0.9), (2.95, middle - 0.5))
    for i, (name, group) in enumerate(heads):
        y, (rows, columns) = top - 0.5 - i, group.shape
        colour, hatch = (AFTER, "") if group.side == "A" else (BEFORE, "///")
        arrow((5.25, middle), (6.55, y))
        box(6.6, y, 2.2, 0.66, f"head {name}: {width} → {rows * columns}", colour, hatch)
        arrow((8.85, y), (9.35, y))
        made = f"{len(group.numbers)} matrices {group.side},\neach {rows} × {columns}"
        ax.text(9.45, y, made, va="center", fontsize=9)
    ax.set_xlim(-0.1, 11.4)
    ax.set_ylim(min(0, middle - 1.6), max(top, middle + 1.6))
    ax.axis("off")
    return figure


def by_kind(values: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """{"layer.projection": (n, ...)} -> {("attn1" or "attn2", projection): (layers, n, ...)}."""
    grouped = {}
    for branch, projection in KINDS:
        chosen = [v for key, v in values.items() if key.endswith(f"{branch}.{projection}")]
        grouped[branch, projection] = np.stack(chosen)
    return grouped


def spectra_figure(spectra: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Singular values by their number, one small chart for each kind of projection.

    spectra: {name: {"layer.projection": (n concepts, r)}}. Markers: means over layers and concepts;
    bars: standard deviation between concepts, each the mean over its layers.
    """
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots(2, len(PROJECTIONS), sharex=True, sharey=True)
    styles = zip((BEFORE, AFTER), ("s", "o"), ("--", "-"), (-0.06, 0.06), strict=True)
    for (name, values), (colour, marker, line, shift) in zip(spectra.items(), styles, strict=False):
        for ax, (kind, array) in zip(axes.flat, by_kind(values).items(), strict=True):
            concept = array.mean(axis=0)  # (n, r)
            x = np.arange(1, concept.shape[1] + 1)
            ax.errorbar(
                x + shift, concept.mean(axis=0), concept.std(axis=0, ddof=1), color=colour,
                marker=marker, linestyle=line, markersize=4, capsize=2, label=name,
            )  # fmt: skip
            branch = "self" if kind[0] == "attn1" else "cross"
            ax.set_title(f"{branch} {kind[1]}", fontsize=10, color=INK)
            ax.set_xticks(x if len(x) <= 8 else [1, *x[3::4]])
            plain(ax)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend(frameon=False, fontsize=9)
    figure.supxlabel("number of the singular value", fontsize=10)
    figure.supylabel("size, % of the weight's largest", fontsize=10)
    return figure


def effective_rank_figure(ranks: Mapping[str, Mapping[str, float]], rank: int) -> Figure:
    """Heat maps of the effective rank, layers by projections, one per named set of offsets."""
    layers = sorted({key.rsplit(".", 1)[0] for key in next(iter(ranks.values()))})
    maps = {
        name: np.array([[values[f"{layer}.{p}"] for p in PROJECTIONS] for layer in layers])
        for name, values in ranks.items()
    }
    label = f"effective rank (1 to {rank})"
    return projection_maps(layers, maps, (1, rank), "{:.2f}".format, label)


def centred(gram: np.ndarray) -> np.ndarray:
    """Inner products (n, n) of vectors -> those after their mean is taken off each."""
    return gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()


def cosines(gram: np.ndarray) -> np.ndarray:
    """Inner products (n, n) -> cosines (n, n)."""
    norm = np.sqrt(np.diag(gram))
    return gram / norm / norm[:, None]


def cosine_figure(matrices: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Cosines (n, n) as maps with one scale; the n rows are equal runs, one per name."""
    n = len(next(iter(matrices.values())))
    run = n // len(names)
    figure = Figure(figsize=(1.9 + 3.2 * len(matrices), 4.3), layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    centres = np.arange(len(names)) * run + (run - 1) / 2
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix, cmap="viridis", vmin=-1, vmax=1)
        for edge in np.arange(1, len(names)) * run - 0.5:
            ax.axhline(edge, color="white", linewidth=0.6)
            ax.axvline(edge, color="white", linewidth=0.6)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xticks(centres, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(centres, names, fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.02, shrink=0.8)
    bar.set_label("cosine of the weight changes")
    bar.outline.set_visible(False)
    return figure
