"""Silence what the libraries say about themselves."""

import logging
import os
import sys
import warnings
from contextlib import ExitStack
from importlib import import_module

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
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
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


def close_bars() -> None:
    """End the progress bars that an exception left open, so that a message starts a line."""
    bars = sys.modules.get("tqdm.std")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars else ():
        bar.close()
