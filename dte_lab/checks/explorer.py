"""Checks of the exercises in 06_ablation_explorer."""

from collections.abc import Callable, Mapping

from dte_lab.checks.compare import WrongAnswer, call, check_letters, exercise


@exercise
def guess_stop(answer: Callable[..., object]) -> None:
    """06, exercise 1: () -> 1, 2 or 3. No guess that is one of them is wrong."""
    got = call(answer)
    if isinstance(got, bool) or got not in (1, 2, 3):
        raise WrongAnswer(f"Return the number of a stop, 1, 2 or 3, not {got!r}.")
    print(f"guess_stop: right, any stop is; {got} is noted. Run the next cells.")


LOW, HIGH = 0.03, 1.0
READ_BY = "contrastive"
USUAL = {
    "regulariser": READ_BY, "temperature": 0.07, "contrastive_weight": 0.01, "steps": 12, "seed": 0,
}  # fmt: skip


@exercise
def fair_pair(answer: Callable[..., object]) -> None:
    """06, exercise 2: (usual {switch: value}) -> two such settings that test the temperature."""
    usual = dict(USUAL)
    got = call(answer, usual)
    if not (isinstance(got, tuple | list) and len(got) == 2):
        raise WrongAnswer("Return two settings, A and B, as it was.")
    if not all(isinstance(side, Mapping) and set(side) == set(USUAL) for side in got):
        raise WrongAnswer("A and B have all switches of `usual`: usual | {...} adds none.")
    if usual != USUAL:
        raise WrongAnswer("`usual` was changed on the way: usual | {...} makes a new dictionary.")
    a, b = got
    if (a["temperature"], b["temperature"]) == (HIGH, LOW):
        raise WrongAnswer(f"A has the temperature {LOW:g} and B {HIGH:g}, as it was.")
    if (a["temperature"], b["temperature"]) != (LOW, HIGH):
        raise WrongAnswer(f"The temperatures to compare are {LOW:g} in A and {HIGH:g} in B.")
    others = [name for name in USUAL if name != "temperature" and a[name] != b[name]]
    if len(others) == 1:
        raise WrongAnswer(
            f"Two switches differ, the temperature and {others[0]}: which of them did it?"
        )
    if others:
        raise WrongAnswer(f"More than the temperature differs: {', '.join(others)}.")
    if a["steps"] == 0:
        raise WrongAnswer("In 0 steps nothing is tuned, and the temperature acts in tuning only.")
    if a["regulariser"] != READ_BY:
        raise WrongAnswer(
            f"The regulariser {a['regulariser']!r} does not read the temperature: both sides would "
            "be the same."
        )
    if not a["contrastive_weight"]:
        raise WrongAnswer("With a weight of 0 the term is not in the loss: both would be the same.")
    print("fair_pair: right. One switch differs, and it is one that something reads.")


FOLLOWS = {
    "a": (True, "These seeds and this thing are what was run, and the true rendering is known."),
    "b": (False, "One thing is no sample: with another thing, or seed, it may be the other way."),
    "c": (True, "All else was equal, seeds and steps too, and the same run repeats exactly."),
    "d": (False, "CLIP compares with the input, background and all, and does not know the truth."),
}


@exercise
def what_follows(answer: Callable[..., object]) -> None:
    """06, exercise 3: () -> the letters of what a run shows."""
    check_letters(call(answer), FOLLOWS)
    print("what_follows: right. A run makes a hypothesis; many things with intervals test it.")
