"""Memory and speed of Stable Diffusion 1.5 at full size on a GPU, with the predictions beside them.

    python benchmarks/sd15.py --out results/

Random weights: neither time nor memory depends on what they say, and nothing is downloaded. Writes
sd15_card_NAME.json. Every setting is measured after a warm-up. Peak memory is that of torch's
allocator (`max_memory_allocated`), which is what `dte memory` predicts; CUDA's own context is not
in it.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from dte_lab import DTEPipeline, TuneConfig, TuningEncoder, load_backbone, tune
from dte_lab.common.files import write_atomically
from dte_lab.config import EncoderConfig
from dte_lab.hardware.memory import DTYPES, Setting, predict
from dte_lab.training.batches import prepare
from dte_lab.training.config import PretrainConfig
from dte_lab.training.optimizer import build_optimizer
from dte_lab.training.pretrain import train_step
from dte_lab.training.step import Frozen

SETTINGS = [
    Setting(batch=batch, gradient_checkpointing=options, offload=options)
    for batch in (1, 4)
    for options in (False, True)
]
GOAL = 0.10  # of prediction over measurement, both ways


def timed(call, device, repeat=3):
    """(seconds per call: the median, peak bytes) of a function, after one warm-up call."""
    gpu = torch.device(device).type == "cuda"
    call()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeat // 2], torch.cuda.max_memory_allocated() if gpu else None


def measure(backbone, setting, steps=3):
    """{what: {"seconds", "bytes"}} of tuning (per step), pre-training (per step) and sampling.

    Besides: tuning and sampling with the soft path alone, and the encoder's share of a step.
    """
    settings, device, batch = EncoderConfig(rank=setting.rank), backbone.device, setting.batch
    pipe = DTEPipeline(backbone, TuningEncoder.from_backbone(backbone, settings))
    encode, encoder = pipe.prompt_encoder, pipe.encoder
    size = backbone.resolution
    pictures = torch.zeros(batch, 3, size, size)
    found = {}

    def note(name, call, per=1):
        seconds, peak = timed(call, device)
        found[name] = {"seconds": seconds / per, "bytes": peak}

    def tuning(alpha):
        prediction = encoder.predict(backbone, pictures[:1], 0, encode)
        method = replace(encoder.method, alpha_blend=alpha)
        tune(
            backbone, encode, prediction, pictures[:1], method,
            TuneConfig(num_steps=steps, batch_size=batch), progress=False,
        )  # fmt: skip

    concept = pipe.personalize(_picture(size), num_steps=0, progress=False)
    prompts = ["S* on the beach"] * batch

    def sampling(alpha):
        pipe.generate(
            concept, prompts, alpha_blend=alpha, batch_size=batch, progress=False,
            num_inference_steps=25,
        )  # fmt: skip

    note("tuning", lambda: tuning(0.7), steps)
    note("tuning, soft path alone", lambda: tuning(1.0), steps)
    note("sampling", lambda: sampling(0.7), batch)
    note("sampling, soft path alone", lambda: sampling(1.0), batch)

    accelerator = Accelerator(cpu=device.type == "cpu")
    parameters = list(encoder.train().requires_grad_(True).parameters())
    optimizer = build_optimizer(parameters, PretrainConfig().weight_decay)
    frozen = Frozen.of(backbone, encoder, encode)
    items = {
        "image": pictures,
        "target": pictures,
        "prompt": ["a picture of S*"] * batch,
        "concept": torch.arange(batch),
    }
    sampled = prepare(backbone, items, PretrainConfig(batch_size=batch), 0)

    def step():
        train_step(accelerator, encoder, optimizer, frozen, sampled)

    note("pre-training", step)
    features = encoder.static_features(backbone, pictures[:1], 0, encode)

    def hypernetwork():
        with torch.no_grad():
            encoder(*features)

    note("encoder alone", hypernetwork)
    return found


def _picture(size):
    from PIL import Image

    return Image.new("RGB", (size, size), "red")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("error: this measures a GPU, and torch finds none.")
    rows = []
    for setting in tqdm(SETTINGS):
        backbone = load_backbone(
            "sd15", "cuda", DTYPES[setting.dtype], random=True, offload=setting.offload,
            gradient_checkpointing=setting.gradient_checkpointing,
        )  # fmt: skip
        measured, predicted = measure(backbone, setting), predict(setting)
        for name, peak in predicted.items():
            measured[name]["predicted bytes"] = peak
            off = peak / measured[name]["bytes"] - 1
            within = "within" if abs(off) <= GOAL else "OUTSIDE"
            tqdm.write(f"{setting}: {name} {off:+.1%}, {within} the goal of {GOAL:.0%}")
        rows.append({"setting": asdict(setting), "measured": measured})
        del backbone
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_name()
    result = {
        "card": card,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "rows": rows,
    }
    path = out / f"sd15_card_{card.replace(' ', '_')}.json"
    write_atomically(path, json.dumps(result, indent=1).encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
