"""Checks of the exercises in 05_tuning."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dte_lab.checks.compare import call, compare, exercise


@exercise
def velocity_target(answer: Callable[..., object]) -> None:
    """05, exercise 1: (latents and noise (B, C, h, w), alpha_bar (B,)) -> velocity, same shape."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4, 3, 3, generator=g), torch.randn(2, 4, 3, 3, generator=g)
    alpha_bar = torch.tensor([0.9, 0.3])
    a = alpha_bar[:, None, None, None]
    signal, spread = a.sqrt(), (1 - a).sqrt()
    compare(
        call(answer, x, noise, alpha_bar),
        signal * noise - spread * x,
        {
            "This is the noisy latent, what the UNet is given. The target is turned against it: "
            "sqrt(alpha_bar) belongs to the noise, and the picture is subtracted.": signal * x
            + spread * noise,
            "The sign is wrong: the velocity points from the picture to the noise.": spread * x
            - signal * noise,
            "The picture is subtracted, not added.": signal * noise + spread * x,
            "Noise and picture are swapped: sqrt(alpha_bar) belongs to the noise.": signal * x
            - spread * noise,
            "The square roots are missing: alpha_bar is a variance.": a * noise - (1 - a) * x,
            "This is the target of a model that predicts the noise; ours predicts the velocity.": (
                noise
            ),
            "The square roots are swapped: at alpha_bar = 1 there is no noise in the picture, and "
            "the target is the noise alone.": spread * noise - signal * x,
            "alpha_bar is one number per picture: not their mean for all.": a.mean().sqrt() * noise
            - (1 - a.mean()).sqrt() * x,
        },
        "The target is sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents, with one alpha_bar per "
        "picture: give it three more axes of length 1 before you multiply.",
    )
    print("velocity_target: right. At alpha_bar = 1 it is the noise, at 0 minus the picture.")


class Case(NamedTuple):
    """A question for `steps_needed`, its answer, and what known mistakes answer."""

    what: str
    curve: dict[int, float]
    level: float
    patience: int
    expected: int | None
    mistakes: dict[str, int | None]


LUCKY = {0: 0.2, 2: 0.35, 4: 0.62, 8: 0.55, 12: 0.7, 25: 0.8, 50: 0.65}
UNEVEN = {
    0: 0.7, 1: 0.3, 4: 0.65, 8: 0.3, 12: 0.7, 25: 0.75, 50: 0.5, 100: 0.8, 200: 0.9, 400: 0.85,
}  # fmt: skip
LOOK = "This is the first point that is good, and the next one is not: look ahead as well."
CASES = (
    Case(
        "patience 2 asks for two more measured points, and 12 and 25 are followed by 50",
        UNEVEN, 0.6, 2, 100,
        {
            LOOK: 0,
            "Patience counts measured points, not steps: the next two after 4 are 8 and 12.": 4,
            "Only one more point was looked at: `patience` says how many.": 12,
            "This is where the curve is highest: good enough is asked for, not the best.": 200,
            "This is the last good point of a row: return the first.": 400,
            "This is the position in the curve: return the number of steps.": 7,
        },
    ),
    Case(
        "a lucky point at 4 steps must not count, and 12 and 25 are both good",
        LUCKY, 0.6, 1, 12, {LOOK: 4},
    ),
    Case(
        "the dictionary is not sorted", {12: 0.7, 8: 0.65, 0: 0.2, 4: 0.1}, 0.6, 1, 8,
        {
            "The points are not in order in this curve: sort the numbers of steps.": 12,
            "This is the position in the sorted curve: return the number of steps.": 2,
        },
    ),
    Case(
        "with patience 0", LUCKY, 0.6, 0, 4,
        {"With patience 0 no other point is asked: the first good one counts.": 12},
    ),
    Case(
        "the last point has no next one", {0: 0.1, 4: 0.3, 12: 0.65}, 0.6, 1, 12,
        {"Where the curve ends, what is left of it decides: the last point is good.": None},
    ),
    Case(
        "a value that equals the level is good", {0: 0.1, 4: 0.6, 12: 0.7}, 0.6, 1, 4,
        {"The level itself is good enough: compare with >=.": 12},
    ),
    Case(
        "no point is good", {0: 0.1, 4: 0.3, 12: 0.4}, 0.6, 1, None,
        {
            "This curve never satisfies: return None, not its last number of steps.": 12,
            "This curve never satisfies: return None; 0 would say that no tuning is needed.": 0,
        },
    ),
)  # fmt: skip


@exercise
def steps_needed(answer: Callable[..., object]) -> None:
    """05, exercise 2: (curve {steps: value}, level, patience) -> the least steps, or None."""
    for case in CASES:
        compare(
            call(answer, dict(case.curve), case.level, case.patience),
            case.expected,
            case.mistakes,
            f"For {case.curve}, level {case.level} and patience {case.patience} it is "
            f"{case.expected}: {case.what}.",
        )
    print("steps_needed: right. One lucky point is not enough to stop at.")


@exercise
def tuning_bytes(answer: Callable[..., object]) -> None:
    """05, exercise 3: (trained, frozen, frozen_bytes) -> bytes, with gradients and averages."""
    for trained, frozen, each in ((300, 5000, 2), (300, 5000, 4), (1000, 0, 2)):
        got = call(answer, trained, frozen, each)
        if isinstance(got, float) and got.is_integer():
            got = int(got)
        value, rest = 4 * trained, each * frozen
        compare(
            got,
            3 * value + rest,
            {
                "Four numbers per trained one, as AdamW has them: Muon keeps no average of the "
                "gradient's square.": 4 * value + rest,
                "A number is missing, or they are not in fp32: value, gradient and Muon's average "
                "have 4 bytes each, whatever the frozen weights have.": 2 * value + rest,
                "Only the values are counted: a trained number has a gradient and an average as "
                "well.": value + rest,
                "The frozen weights are missing: they need no gradient, but they are there.": 3
                * value,
                "A frozen weight has no gradient and no average: it counts once.": 3 * value
                + 3 * rest,
                "This is how many numbers there are: each has 4 bytes, or frozen_bytes.": 3
                * trained
                + frozen,
                "Bytes are asked for, not megabytes or gigabytes.": (3 * value + rest) / 1e9,
            },
            f"With {trained} trained and {frozen} frozen weights of {each} bytes it should be "
            f"{3 * value + rest}: 3 numbers of 4 bytes per trained one, {each} bytes per frozen "
            "one.",
        )
    print("tuning_bytes: right. What is frozen costs its own size and no more.")
