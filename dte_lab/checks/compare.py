"""What all checks share: call the answer on copies, compare, and name the known mistake."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Said:
    """An exception of which a notebook shows its sentence alone, and not the check's source."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [str(self)]


class WrongAnswer(Said, AssertionError):
    """The answer is not right; the message says where to look."""


class NotWritten(Said, NotImplementedError):
    """The skeleton is as it was."""


_accepted = {}  # name of the exercise: the answer that its check called right


def exercise(check: Callable[..., None]) -> Callable[..., None]:
    """The check, after which `yours` knows the answer that it called right."""

    @wraps(check)
    def checked(answer: Callable[..., object]) -> None:
        _accepted.pop(check.__name__, None)
        check(answer)
        _accepted[check.__name__] = answer

    return checked


def yours(name: str, otherwise: Callable[..., object]) -> Callable[..., object]:
    """The reader's answer to an exercise where it was right, else `otherwise`; says which."""
    whose = "your own" if name in _accepted else "the notebook's"
    print(f"computed with {whose} {name}")
    return _accepted.get(name, otherwise)


def call(answer: Callable[..., object], *arguments: object) -> object:
    """The answer's result; WrongAnswer says how it stopped, if it did, NotWritten that it is none.

    It gets copies of tensors.
    """
    return _call(answer, _copies(arguments))


def call_thin(answer: Callable[..., object], *arguments: object) -> tuple[object, int]:
    """`call`, and the number of entries of the largest tensor that it made on the way."""
    given = _copies(arguments)
    with LargestTensor() as largest:
        got = _call(answer, given)
    return got, largest.numel


def _copies(arguments: Sequence[object]) -> list[object]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def _call(answer: Callable[..., object], given: Sequence[object]) -> object:
    try:
        return answer(*given)
    except NotImplementedError as error:
        raise NotWritten(str(error) or "Write this part, then run the cell.") from None
    except Exception as error:
        shapes = [str(tuple(a.shape)) for a in given if isinstance(a, torch.Tensor)]
        said = f" It was given tensors of shapes {', '.join(shapes)}." if shapes else ""
        raise WrongAnswer(
            f"Your function stopped with {type(error).__name__}: {error}.{said}"
        ) from error


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor made inside the block; views are none."""

    numel = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        there = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        out = function(*args, **kwargs)
        made = (x.numel() for x in _tensors(out) if x.untyped_storage().data_ptr() not in there)
        self.numel = max([self.numel, *made])
        return out


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def refuse_whole(numel: int, a: Tensor, b: Tensor, advice: str) -> None:
    """Raise WrongAnswer when a tensor as large as A B was made."""
    if numel >= (whole := len(a) * b.shape[1]):
        raise WrongAnswer(
            f"The number is right, but a tensor with {numel} numbers was made on the way; A B has "
            f"{whole}. {advice}"
        )


def compare(got: object, expected: object, mistakes: Mapping[str, object], advice: str) -> None:
    """Raise WrongAnswer with the mistake whose result `got` is, else with general advice."""
    if same(got, expected):
        return
    if isinstance(expected, torch.Tensor) and not isinstance(got, torch.Tensor):
        raise WrongAnswer(f"Return a tensor; got {type(got).__name__}.")
    for sentence, wrong in mistakes.items():
        if not same(wrong, expected) and same(got, wrong):
            raise WrongAnswer(sentence)
    if isinstance(expected, torch.Tensor) and got.shape != expected.shape:
        raise WrongAnswer(
            f"The result has shape {tuple(got.shape)}, expected {tuple(expected.shape)}. {advice}"
        )
    raise WrongAnswer(f"The result is not right yet. {advice}")


def check_letters(got: object, reasons: Mapping[str, tuple[bool, str]]) -> None:
    """Raise WrongAnswer unless the letters are those of the reasons that hold.

    reasons: {letter: (whether it holds, why)}. got: a string of letters, or a set or list of them.
    """
    if not isinstance(got, str | set | list | tuple) or not got or not set(got) <= set(reasons):
        raise WrongAnswer(f'Return letters of {", ".join(reasons)}, such as "ad", not {got!r}.')
    for letter, (holds, why) in reasons.items():
        if letter in got and not holds:
            raise WrongAnswer(f"{letter} does not hold. {why}")
    for letter, (holds, why) in reasons.items():
        if letter not in got and holds:
            raise WrongAnswer(f"What is there holds, and one more does. Think of this: {why}")


def same(a: object, b: object) -> bool:
    """Whether two results are equal: tensors in shape and within 1e-5, others in type and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5)
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b
