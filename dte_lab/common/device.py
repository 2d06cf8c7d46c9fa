"""Which device is meant by a word, and whether it is there."""

import os
import re

import torch

from dte_lab.common.errors import DTEError

DEVICE_WORDS = re.compile(r"(cpu|mps)(:0)?|cuda(:(0|[1-9]\d*))?")


def checked_device(device: torch.device | str | None) -> str:
    """The device to use; None and auto: cuda where there is one. Several processes have a GPU each.

    Raises DTEError for what is no device, and for one that is not there.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    word = str(device) if isinstance(device, torch.device) else device
    if not isinstance(word, str) or not DEVICE_WORDS.fullmatch(word):
        raise DTEError(f"a device is auto, cpu, cuda, cuda:N or mps, not {word!r}.")
    if word.startswith("cuda") and not torch.cuda.is_available():
        raise DTEError(
            "torch finds no CUDA device: use --device cpu, or ask dte doctor what is there."
        )
    if word.startswith("mps") and not torch.backends.mps.is_available():
        raise DTEError("torch finds no MPS device: use --device cpu.")
    if word == "cuda":
        word = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if word.startswith("cuda") and int(word.removeprefix("cuda:")) >= torch.cuda.device_count():
        raise DTEError(
            f"{word} is not there: torch finds {torch.cuda.device_count()} CUDA device(s), "
            "counted from cuda:0."
        )
    return word
