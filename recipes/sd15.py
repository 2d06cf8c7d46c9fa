"""An encoder for Stable Diffusion 1.5: its price, then pictures, cache, training, evaluation.

    python recipes/sd15.py --data PICTURES --out runs/sd15 --plan    # hours, GB and prices alone
    python recipes/sd15.py --data PICTURES --out runs/sd15           # the same, and then the work

Called again it goes on where it stopped, also with --minutes. See sd15.md beside this file.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dte_lab.common.command import run_command
from dte_lab.hardware.memory import ACHIEVED
from dte_lab.training.config import VALIDATION

# TFLOP of one picture at 512 pixels: counted by `dte memory`'s trace, attention included.
ENCODE, CLIP, WHOLE_STEP = 1.117, 0.162, 4.871
ITEM = 2 * (2 * 4 * 64 * 64 + 1024 * 16 * 16) + 4 * 768  # bytes: see bytes_each of the cache
WEIGHTS, CHECKPOINTS = 3.6, 0.2  # GB
PRICES = {"T4": (0.2, 0.6), "L4": (0.5, 1.0), "A100": (1.3, 3.5)}  # dollars an hour: assumed
EIGHT = 0.9  # of the speed of eight that eight together have: assumed


class Plan(NamedTuple):
    """What is to be done; `items` pairs of crops in the cache."""

    items: int
    steps: int
    batch_size: int

    @property
    def caching(self) -> float:
        """TFLOP of latents of both crops and CLIP features."""
        return self.items * (2 * ENCODE + CLIP)

    @property
    def training(self) -> float:
        """TFLOP of all steps on them."""
        return self.steps * self.batch_size * (WHOLE_STEP - 2 * ENCODE - CLIP)

    @property
    def gigabytes(self) -> float:
        """On the disk, without the pictures."""
        return self.items * ITEM / 1e9 + WEIGHTS + CHECKPOINTS

    def __str__(self) -> str:
        speeds = {name: (speed / 1e12, PRICES[name]) for name, speed in ACHIEVED.items()}
        low, high = PRICES["A100"]
        speeds["8 x A100"] = 8 * EIGHT * speeds["A100"][0], (8 * low, 8 * high)
        lines = [
            f"{self.items:,} cached items and {self.steps:,} steps of {self.batch_size}: "
            f"{self.gigabytes:.0f} GB of disk beside the pictures; calculated, not measured:",
            f"{'':10}{'TFLOP/s':>9}{'cache':>9}{'training':>10}{'hours':>8}  {'dollars':12}"
            "(hours without a cache)",
        ]
        for name, (speed, (low, high)) in speeds.items():
            work = self.caching, self.training, self.steps * self.batch_size * WHOLE_STEP
            caching, training, whole = (x / speed / 3600 for x in work)
            hours = caching + training
            price = f"{low * hours:.0f} to {high * hours:.0f}"
            lines.append(
                f"{name:10}{speed:9.0f}{caching:9.1f}{training:10.1f}{hours:8.1f}  {price:12}"
                f"({whole:.1f})"
            )
        return "\n".join([*lines, "TFLOP/s and prices an hour are assumed: see recipes/sd15.md."])


def main(
    data: Annotated[str, typer.Option(help="As of dte pretrain.")],
    out: Annotated[Path, typer.Option(help="For cache, logs, and encoder.")],
    pictures: Annotated[int, typer.Option(min=1, help="Of the data set.")] = 100_000,
    crops: Annotated[int, typer.Option(min=1, help="Pairs of crops of each picture.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 100_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Of all GPUs together.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, help="The highest.")] = 1e-3,
    processes: Annotated[int, typer.Option(min=1, help="GPUs.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="End this call after so long.")] = None,
    precision: Annotated[str, typer.Option(help="bf16; fp16 on a T4; no on a CPU.")] = "bf16",
    backbone: Annotated[str, typer.Option()] = "sd15",
    device: Annotated[str, typer.Option()] = "cuda",
    stream: Annotated[bool, typer.Option("--stream", help="Store no picture.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it costs, and no more.")] = False,
) -> None:
    typer.echo(Plan(pictures * (1 if stream else crops), steps, batch_size))
    if plan:
        return
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no"]
    options = {
        "data": data, "out": out, "cache": out / "cache", "crops": crops, "steps": steps,
        "batch-size": batch_size, "warmup": min(1000, steps // 10), "backbone": backbone,
        "device": device, "mixed-precision": precision, "validate-every": max(1, steps // 50),
        "pictures": pictures, "learning-rate": learning_rate,
    } | ({} if minutes is None else {"minutes": minutes})  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [*(launch if processes > 1 else []), "-m", "dte_lab", "pretrain", *given]
    command += ["--stream"] if stream else []
    if code := subprocess.run([sys.executable, *command]).returncode:  # which has said why
        raise typer.Exit(code)
    typer.echo(report(out, steps))


def report(out: Path, steps: int) -> str:
    """What the validation loss says, and how to use the encoder."""
    path = out / VALIDATION
    if not (out / "encoder").is_dir():
        return "Not finished: the same command goes on."
    used = f"dte personalize PICTURE --prompt ... --out OUT --encoder {out / 'encoder'}"
    if not path.is_file():
        return f"No class was held out, since there are fewer than twenty. Use it: {used}"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return (
        f"loss on classes never seen: {first['validation']:.4f} at the start (a mixture of words), "
        f"{last['validation']:.4f} after {last['step']:,} of {steps:,} steps. "
        f"{'Use it' if last['step'] == steps else 'The same command goes on; meanwhile'}: {used}"
    )


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
