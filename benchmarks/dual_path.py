"""What the dual path costs: one UNet call with two paths over one with a single path.

    python benchmarks/dual_path.py --out results/dual_path.json

The UNet has the small backbone's configuration and random weights, since time does not depend on
them; batch 8, a text length and offsets as in sampling. Every round times all ways once, in turn,
so that a machine that slows down slows all of them; the overhead is the median over the rounds of
the ratio within a round. On a CPU it is processor time of one thread that counts, which other
programs disturb less than the clock on the wall.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig

from dte_lab.backbone import WEIGHTS
from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from dte_lab.dual_path import dual_path
from dte_lab.lora import projection_shapes

GOAL = 1.25  # dual over single path, granularity "attention"


def ways(batch_size: int, rank: int, device: str) -> dict:
    """{name: function that calls the UNet once}."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(WEIGHTS / "small" / "unet")
    unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False).to(device)
    text = CLIPTextConfig.from_pretrained(WEIGHTS / "small" / "text_encoder")
    shape = (batch_size, text.max_position_embeddings, config["cross_attention_dim"])  # (B, L, d)
    soft, hard = torch.randn(2, *shape, device=device)
    size = config["sample_size"]
    x = torch.randn(batch_size, config["in_channels"], size, size, device=device)
    offsets = {
        key: (
            torch.randn(1, d_in, rank, device=device) * d_in**-0.5,
            torch.randn(1, rank, d_out, device=device) * 0.1,
        )
        for key, (d_in, d_out) in projection_shapes(unet).items()
    }

    def call(**paths):
        def run():
            if not paths:
                return unet(x, 500, soft)
            with dual_path(unet, offsets, **paths):
                return unet(x, 500, soft)

        return run

    dual = {"hard_hidden_states": hard, "alpha_blend": 0.7}
    return {
        "vanilla": call(),
        "single": call(alpha_blend=1.0),
        "dual attention figure": call(**dual),
        "dual attention text": call(**dual, offsets_on="hard"),
        "dual block figure": call(**dual, granularity="block"),
    }


@torch.no_grad()
def measure(rounds: int, batch_size: int = 8, rank: int = 4, device: str = "cpu") -> dict:
    """Milliseconds of each way, and its time over the single path's: median and quartiles."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    calls = ways(batch_size, rank, device)
    times = {name: [] for name in calls}
    for i in tqdm(range(rounds + 2), desc="rounds"):
        for name, run in calls.items():
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:  # the first calls allocate
                times[name].append(clock() - start)
    rows = {}
    for name, seconds in times.items():
        ratios = [t / s for t, s in zip(seconds, times["single"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": round(1e3 * statistics.median(seconds), 2),
            "fastest_milliseconds": round(1e3 * min(seconds), 2),
            "over_single": round(median, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return {
        "rounds": rounds, "batch_size": batch_size, "rank": rank, "device": device,
        "machine": platform.machine(),
        "torch": version("torch"), "diffusers": version("diffusers"), "seed": 0, "goal": GOAL,
        "ways": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds, arguments.batch_size, device=arguments.device)
    for name, row in result["ways"].items():
        low, high = row["quartiles"]
        print(
            f"{name:<24}{row['milliseconds']:>8.1f} ms{row['over_single']:>8.2f} x single "
            f"({low:.2f} to {high:.2f})"
        )
    if arguments.out:
        write_atomically(arguments.out, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    run_command(main)
