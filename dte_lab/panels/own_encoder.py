"""Figures of 07_your_own_encoder."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from dte_lab.panels.shared import AFTER, BEFORE, plain


def training_figure(
    seen: Sequence[tuple[int, float]], unseen: Sequence[tuple[int, float]]
) -> Figure:
    """The loss of steps as training saw it, and that of unseen things, over the steps.

    Both are (step, loss) each, `unseen` on always the same pictures and noise; `seen` may be empty.
    """
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    ax = figure.add_subplot()
    if seen:
        ax.plot(*zip(*seen, strict=True), ":", color=BEFORE, label="each step, as training saw it")
    ax.plot(*zip(*unseen, strict=True), "s-", color=AFTER, markersize=5, label="unseen things")
    ax.set_xlabel("steps")
    ax.set_ylabel("diffusion loss")
    ax.legend(frameon=False, fontsize=9)
    plain(ax)
    return figure


def breadth_figure(drawings: Sequence[int], unexplained: Sequence[float], guess: float) -> Figure:
    """What first words leave unexplained over the number of drawings, and what was guessed."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(drawings, unexplained, "s-", color=AFTER, label="measured, on unseen things")
    ax.plot(
        [drawings[0], drawings[-1]], [unexplained[0], guess * unexplained[0]], "x:",
        color=BEFORE, label="the guess",
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xticks(drawings, [str(n) for n in drawings])
    ax.minorticks_off()
    ax.set_xlabel("drawings in the folder")
    ax.set_ylabel("unexplained share of the words")
    ax.legend(frameon=False, fontsize=9)
    plain(ax)
    return figure
