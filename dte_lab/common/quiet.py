"""Silence what the libraries say about themselves."""

import logging
import os
import warnings

import typer


def quiet_libraries() -> None:
    """Silence what the libraries say about themselves; our own warnings become one line each."""
    for module in ("diffusers", "transformers", "torch", "huggingface_hub", "accelerate"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
