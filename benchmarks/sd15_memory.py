"""Predicted memory of tuning Stable Diffusion 1.5, for the choices that notebook 05 compares.

    python benchmarks/sd15_memory.py --out results/sd15_memory.json

Needs no GPU and no weights; a minute or two on one core.
"""

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from dte_lab.common.files import write_atomically
from dte_lab.hardware.memory import Setting, predict

CHOICES = [
    Setting(batch=4, dtype="fp32"),
    Setting(batch=16),
    Setting(batch=16, resolution=384),
    Setting(batch=16, gradient_checkpointing=True),
    Setting(batch=4),
    Setting(batch=1, gradient_checkpointing=True, offload=True),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/sd15_memory.json"))
    out = parser.parse_args().out
    peaks = [predict(choice, ("tuning",))["tuning"] for choice in tqdm(CHOICES)]
    rows = [{"setting": asdict(c), "bytes": n} for c, n in zip(CHOICES, peaks, strict=True)]
    document = {name: version(name) for name in ("torch", "diffusers")} | {"rows": rows}
    write_atomically(out, json.dumps(document, indent=1).encode())
