"""Checks of settings: each raises DTEError with one sentence that names the setting."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from dte_lab.common.errors import DTEError

WHOLE_BELOW = 2**64  # of whole numbers


def check_whole(
    name: str, value: object, low: int | None = None, high: int | None = None, instead: str = ""
) -> None:
    """`value` must be a whole number in [low, high]; `instead`: what else would do."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        least = "" if low is None else f" from {low}"
        least += "" if high is None else f" to {high}"
        other = f" or {instead}" if instead else ""
        raise DTEError(f"{name} is a whole number{least}{other}, not {cited(value)}.")
    if abs(int(value)) >= WHOLE_BELOW:  # neither torch nor a file's name takes it
        raise DTEError(f"{name} is a whole number of at most 64 bits, not {cited(value)}.")


def check_number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> None:
    """`value` must be finite, in [low, high], and greater than `above`."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if (
        not number
        or not _is_finite(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    ):
        bounds = "" if low is None else f" from {low}"
        bounds += "" if high is None else f" to {high}"
        bounds += "" if above is None else f" above {above}"
        raise DTEError(f"{name} is a number{bounds}, not {cited(value)}.")


def check_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """`value` must be one of the `known` words."""
    if not isinstance(value, str) or value not in known:
        raise DTEError(f"{name} is one of {', '.join(known)}, not {cited(value)}.")


def check_kind(name: str, value: object, kind: type, optional: bool = False) -> None:
    """`value` must be a `kind`, or None where it is optional."""
    if not isinstance(value, kind) and not (optional and value is None):
        raise DTEError(f"{name} is a {kind.__name__}, not {cited(value)}.")


def check_text(name: str, text: object) -> None:
    """`text` must be a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise DTEError(f"{name} is a text, not {cited(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DTEError(f"{name} {text!r} has bytes that are not UTF-8.") from error


def cited(value: object) -> str:
    """The value as a message cites it."""
    try:
        return repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
