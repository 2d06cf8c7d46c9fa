"""Silence what the libraries say about themselves."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

from dte_lab.common.errors import one_line

LOUD_LIBRARIES = ("diffusers", "transformers", "torch", "huggingface_hub", "accelerate")


def quiet_libraries() -> ExitStack:
    """Silence what the libraries say about themselves; our own warnings become one line each.

    This changes the whole process, and so belongs into a command, a script or a notebook: the
    filters of `warnings` and how it shows one, the format of the root logger where it has none,
    TOKENIZERS_PARALLELISM, and what diffusers and transformers log. All of it is as before after
    `close()` of what is returned, or at the end of `with quiet_libraries():`.
    """
    undo = ExitStack()
    undo.enter_context(warnings.catch_warnings())
    for module in LOUD_LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.showwarning = _say
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("warning: %(message)s"))
        root.addHandler(handler)
        undo.callback(root.removeHandler, handler)
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        undo.callback(os.environ.pop, "TOKENIZERS_PARALLELISM", None)
    for library in ("diffusers", "transformers"):
        log = import_module(f"{library}.utils.logging")
        undo.callback(log.set_verbosity, log.get_verbosity())
        log.set_verbosity_error()
        if log.is_progress_bar_enabled():
            undo.callback(log.enable_progress_bar)
            log.disable_progress_bar()
    return undo


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """A warning inside is one line, before `quiet_libraries` can load the libraries, too."""
    with warnings.catch_warnings():
        warnings.showwarning = _say
        yield


def _say(message: Warning | str, *where: object) -> None:
    print(one_line(f"warning: {message}"), file=sys.stderr)


def close_bars() -> None:
    """End the progress bars that an exception left open, so that a message starts a line."""
    bars = sys.modules.get("tqdm.std")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars else ():
        bar.close()
