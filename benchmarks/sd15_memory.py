"""Predicted memory of Stable Diffusion 1.5: what the package ships, and what notebook 05 compares.

    python benchmarks/sd15_memory.py

Writes dte_lab/sd15_memory.json, from which the commands say what fits a GPU (memory_needs.py), and
results/sd15_memory.json. Needs no GPU and no weights; some minutes on one core.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from dte_lab.hardware.memory import Setting, predict
from dte_lab.memory_needs import BATCHES, NEEDS, WORKLOADS

CHOICES = [
    Setting(batch=4, dtype="fp32"),
    Setting(batch=16),
    Setting(batch=16, resolution=384),
    Setting(batch=16, gradient_checkpointing=True),
    Setting(batch=4),
    Setting(batch=1, gradient_checkpointing=True, offload=True),
]
SHIPPED = [
    Setting(batch=batch, dtype=dtype, gradient_checkpointing=checkpointing, offload=offload)
    for batch, dtype, checkpointing, offload in product(
        BATCHES, ("fp16", "fp32"), (False, True), (False, True)
    )
]


def write(path: Path, settings: Sequence[Setting], parts: tuple[str, ...]) -> None:
    """Predict and write {"rows": [{"setting", "bytes"}, ...]}; bytes of each part, or of one."""
    rows = []
    for setting in tqdm(settings, desc=path.name):
        peaks = predict(setting, parts)
        rows.append(
            {"setting": asdict(setting), "bytes": peaks if len(parts) > 1 else peaks[parts[0]]}
        )
    document = {name: version(name) for name in ("torch", "diffusers")} | {"rows": rows}
    write_atomically(path, json.dumps(document, indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/sd15_memory.json"))
    out = parser.parse_args().out
    write(NEEDS, SHIPPED, WORKLOADS)
    write(out, CHOICES, ("tuning",))


if __name__ == "__main__":
    run_command(main)
