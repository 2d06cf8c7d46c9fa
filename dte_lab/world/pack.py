"""Gather the trained parts into one backbone folder, in half precision, as it ships.

dte world pack --out DIR [--autoencoder RUN] [--text RUN] [--unet RUN] [--towers RUN] ...

The folder is also what the next part is trained with, `--parts`: pack each run when it has ended.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.world.painter import PAINTER
from dte_lab.world.word_space import PICTURE_WORDS
from dte_lab.world.words import WORDS_FILE

# run -> the folders and files that it made, in the order of training: the last text_encoder stays
MADE_BY = {
    "autoencoder": ("vae",),
    "text": ("tokenizer", "text_encoder", PAINTER, PICTURE_WORDS, WORDS_FILE),
    "unet": ("unet", "scheduler", "text_encoder", PAINTER),
    "decoder": ("vae",),
    "towers": ("text_encoder", "image_encoder", "feature_extractor"),
    "encoder": ("encoder",),
}


def main(runs: dict[str, Path], out: Path) -> None:
    """Copy the parts of each run to `out`; floating-point weights become float16.

    Raises DTEError when a run has not finished a part.
    """
    for run, parts in MADE_BY.items():
        for part in parts if run in runs else ():
            source = Path(runs[run]) / part
            if not source.exists():
                raise DTEError(f"{source} is missing: let the run of {run} end first.")
            files = sorted(source.iterdir()) if source.is_dir() else [source]
            for file in files:
                copy(file, Path(out) / part / file.name if source.is_dir() else Path(out) / part)


def copy(file: Path, target: Path) -> None:
    """Weights in half precision, a config.json without where it lay, other files as they are.

    Raises DTEError for weights that do not fit into half precision.
    """
    if file.suffix == ".safetensors":
        weights = {
            k: v.half().contiguous() if v.is_floating_point() else v
            for k, v in load_file(file).items()
        }
        if any(not torch.isfinite(v).all() for v in weights.values()):
            raise DTEError(f"{file} does not fit into half precision.")
        write_atomically(target, save(weights, metadata={"format": "pt"}))
    elif file.name == "config.json":
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        write_atomically(target, json.dumps(config, indent=2).encode())
    else:
        write_atomically(target, file.read_bytes())
