"""Checks of the exercises in 07_your_own_encoder."""

import math
from collections.abc import Callable

from dte_lab.checks.compare import WrongAnswer, call, check_letters, compare, exercise


@exercise
def guess_breadth(answer: Callable[..., object]) -> None:
    """07, exercise 2: () -> a guess, from 0 to 2. No guess that is a number is wrong."""
    got = call(answer)
    if isinstance(got, bool) or not isinstance(got, int | float) or not math.isfinite(got):
        raise WrongAnswer(f"Return one number, such as 0.9, not {got!r}.")
    if got < 0:
        raise WrongAnswer("A share of what is unexplained cannot be negative.")
    if got > 2:
        raise WrongAnswer(
            f"{got:g} would be {got:g} times as bad as with ten drawings: give a factor, not per "
            "cent. Below 1 is better, above 1 is worse."
        )
    print(f"guess_breadth: right, any number is; {got:g} is noted. Run the next cell.")


@exercise
def training_pair(answer: Callable[..., object]) -> None:
    """07, exercise 1: (draw, say, first, second) -> {"image", "target", "prompt"}."""

    def draw(scene: str) -> str:
        return f"the thing, {scene}"

    def say(scene: str | None) -> str:
        return f"a picture of S*, {scene}" if scene else "a picture of S*"

    first, second = "in the snow", "at night"
    got = call(answer, draw, say, first, second)
    if not isinstance(got, dict) or set(got) != {"image", "target", "prompt"}:
        raise WrongAnswer('Return a dictionary with "image", "target" and "prompt", as it was.')

    def pair(image: str, target: str, asked: str | None) -> dict:
        return {"image": draw(image), "target": draw(target), "prompt": say(asked)}

    compare(
        got,
        pair(first, second, second),
        {
            "This is the function as it was: what is the target, and what is asked for?": (
                pair(first, first, first)
            ),
            "One mistake is left: the prompt asks for the scene of the input, and the target shows "
            "the other.": pair(first, second, first),
            "One mistake is left: the prompt asks for the second scene, and the target does not "
            "show it.": pair(first, first, second),
            "The input is the target: nothing is left to learn but to copy.": pair(
                second, second, second
            ),
            "Input and target have changed places: the prompt is about the target.": pair(
                second, first, second
            ),
            "The prompt must say the scene of the target, or S* has to.": pair(first, second, None),
        },
        "The input shows the first scene, the target the second, and the prompt says the second.",
    )
    print("training_pair: right. What the prompt says, S* need not say.")


REASONS = {
    "a": (True, "Each step sees other drawings, and some are harder."),
    "b": (True, "Each step draws other noise levels, and some noise is harder to take out."),
    "c": (False, "If the rate were too high, the loss of unseen things would go up and down too."),
    "d": (False, "That they are other things explains another level, and no ups and downs."),
}


@exercise
def why_jumpy(answer: Callable[..., object]) -> None:
    """07, exercise 3: () -> the letters of the reasons that hold."""
    check_letters(call(answer), REASONS)
    print("why_jumpy: right. Fixed drawings and fixed noise make losses that can be compared.")


@exercise
def training_hours(answer: Callable[..., object]) -> None:
    """07, exercise 4: (steps, batch_size, tflop, speed) -> hours."""
    for steps, batch_size, tflop, speed in ((100_000, 16, 4.5, 100.0), (7200, 2, 0.5, 1.0)):
        got, work = call(answer, steps, batch_size, tflop, speed), steps * batch_size * tflop
        seconds = work / speed
        expected = seconds / 3600
        mistakes = {
            "These are seconds: an hour has 3,600.": seconds,
            "These are minutes: an hour has 60 of them.": seconds / 60,
            "A step has batch_size pictures, and each costs `tflop`.": expected / batch_size,
            "This is the work: divide it by the speed.": work,
            "The work is divided by the speed, not multiplied by it.": work * speed / 3600,
        }
        if isinstance(got, bool) or not isinstance(got, int | float):
            raise WrongAnswer(f"Return a number of hours, not {got!r}.")
        if math.isclose(got, expected, rel_tol=1e-6):
            continue
        for sentence, wrong in mistakes.items():
            if math.isclose(got, wrong, rel_tol=1e-6):
                raise WrongAnswer(sentence)
        raise WrongAnswer(
            f"{steps:,} steps of {batch_size} pictures with {tflop} TFLOP each are {work:,.0f} "
            f"TFLOP; at {speed:g} TFLOP a second that is {expected:g} hours."
        )
    print("training_hours: right. The price of an hour times this is the bill.")
