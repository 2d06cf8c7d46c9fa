"""What all checks share: call the answer on copies, compare, and name the known mistake."""

from collections.abc import Callable, Mapping

import torch


def call(answer: Callable[..., object], *arguments: object) -> object:
    """The answer's result; AssertionError says how it stopped, if it did."""
    try:
        return answer(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    except NotImplementedError:
        raise
    except Exception as error:
        shapes = [tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
        raise AssertionError(
            f"Your function stopped with {type(error).__name__}: {error}. "
            f"It was given tensors of shapes {', '.join(map(str, shapes))}."
        ) from error


def compare(got: object, expected: object, mistakes: Mapping[str, object], advice: str) -> None:
    """Raise AssertionError with the mistake whose result `got` is, else with general advice."""
    if same(got, expected):
        return
    if isinstance(expected, torch.Tensor) and not isinstance(got, torch.Tensor):
        raise AssertionError(f"Return a tensor; got {type(got).__name__}.")
    for sentence, wrong in mistakes.items():
        if not same(wrong, expected) and same(got, wrong):
            raise AssertionError(sentence)
    if isinstance(expected, torch.Tensor) and got.shape != expected.shape:
        raise AssertionError(
            f"The result has shape {tuple(got.shape)}, expected {tuple(expected.shape)}. {advice}"
        )
    raise AssertionError(f"The result is not right yet. {advice}")


def same(a: object, b: object) -> bool:
    """Whether two results are equal: tensors in shape and within 1e-5, others in type and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5)
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b
