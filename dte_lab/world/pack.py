"""Gather the trained parts into one backbone folder, in half precision, as it ships.

dte world pack --autoencoder RUN --clip RUN --unet RUN [--encoder RUN] --out DIR
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.world.words import caption_words

FOLDERS = {  # run -> the folders that it made
    "autoencoder": ("vae",),
    "clip": ("text_encoder", "image_encoder", "tokenizer", "feature_extractor"),
    "unet": ("unet", "scheduler"),
    "encoder": ("encoder",),
}


def main(runs: dict[str, Path], out: Path) -> None:
    """Copy the parts of each run to `out`; floating-point weights become float16.

    With the run of clip goes `words.json`, the words that it knows well.

    Raises FileNotFoundError when a run has not finished a part.
    """
    for run, folder in runs.items():
        for part in FOLDERS[run]:
            source = Path(folder) / part
            if not source.is_dir():
                raise FileNotFoundError(f"{source} is missing: let the run of {run} end first.")
            target = Path(out) / part
            target.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                if file.suffix == ".safetensors":
                    weights = {
                        k: v.half().contiguous() if v.is_floating_point() else v
                        for k, v in load_file(file).items()
                    }
                    if any(not torch.isfinite(v).all() for v in weights.values()):
                        raise DTEError(f"{file} does not fit into half precision.")
                    write_atomically(target / file.name, save(weights, metadata={"format": "pt"}))
                elif file.name == "config.json":  # not where it lay on the machine that trained it
                    config = json.loads(file.read_text())
                    config.pop("_name_or_path", None)
                    write_atomically(target / file.name, json.dumps(config, indent=2).encode())
                else:
                    shutil.copyfile(file, target / file.name)
    if "clip" in runs:
        write_atomically(Path(out) / "words.json", json.dumps(caption_words()).encode())
