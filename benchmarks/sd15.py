"""Memory and speed of Stable Diffusion 1.5 at full size on a GPU, with the predictions beside them.

    python benchmarks/sd15.py --out results/

Random weights: neither time nor memory depends on what they say, and nothing is downloaded. Writes
sd15_card_NAME.json, anew after every setting, so that what is measured is kept; a setting for which
the card is too small is noted as such. Every setting is measured after a warm-up. Peak memory is
that of torch's allocator (`max_memory_allocated`), which is what `dte memory` predicts; CUDA's own
context is not in it.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from dte_lab import Backbone, DTEPipeline, TuneConfig, TuningEncoder, load_backbone, tune
from dte_lab.backbone import DTYPES
from dte_lab.common.command import run_command
from dte_lab.common.errors import DTEError, is_out_of_memory
from dte_lab.common.files import write_atomically
from dte_lab.config import EncoderConfig
from dte_lab.hardware.memory import ACHIEVED, Need, Setting, needs
from dte_lab.training.batches import prepare
from dte_lab.training.config import PretrainConfig
from dte_lab.training.optimizer import build_optimizer
from dte_lab.training.pretrain import train_step
from dte_lab.training.step import Frozen

SETTINGS = [
    Setting(batch=batch, gradient_checkpointing=options, offload=options)
    for batch in (1, 4, 8)
    for options in (False, True)
] + [Setting(batch=4, dtype="bf16")]
GOAL = 0.10  # of prediction over measurement, both ways
STEPS = (2, 6)  # of tuning: what comes before the first step is in both, and falls out


def timed(call: Callable[[], object], repeat: int = 3) -> tuple[float, int]:
    """(seconds per call: the median, peak bytes) of a function, after one warm-up call."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeat // 2], torch.cuda.max_memory_allocated()


def measure(backbone: Backbone, setting: Setting) -> dict[str, dict[str, float]]:
    """{what: {"seconds", "bytes"}} of a step of tuning and pre-training, and of sampling a picture.

    Besides: tuning and sampling with the soft path alone, and the prediction before tuning. With
    `offload` there is no pre-training: it needs every part in each step.
    """
    settings = EncoderConfig.of(backbone.recommended, rank=setting.rank)
    pipe = DTEPipeline(backbone, TuningEncoder.from_backbone(backbone, settings))
    found = measure_tuning(pipe, setting)
    found |= measure_sampling(pipe, setting)
    if not setting.offload:
        found["pre-training"] = measure_pretraining(pipe, setting)
    return found


def measure_tuning(pipe: DTEPipeline, setting: Setting) -> dict[str, dict[str, float]]:
    """Of a step; and of the prediction before the first."""
    backbone, encoder, encode = pipe.backbone, pipe.encoder, pipe.prompt_encoder
    picture = torch.zeros(1, 3, backbone.resolution, backbone.resolution)
    found = {}

    def predict():
        return encoder.predict(backbone, picture, 0, encode)

    for name, alpha in (("tuning", 0.7), ("tuning, soft path alone", 1.0)):
        method, few_and_many = replace(encoder.method, alpha_blend=alpha), []
        for steps in STEPS:
            config = TuneConfig(num_steps=steps, batch_size=setting.batch)

            def steps_of(config=config, method=method):
                prediction = predict()
                tune(backbone, encode, prediction, picture, method, config, progress=False)

            few_and_many.append(timed(steps_of))
        (few, _), (many, peak) = few_and_many
        found[name] = {"seconds": (many - few) / (STEPS[1] - STEPS[0]), "bytes": peak}
    seconds, peak = timed(predict)
    return found | {"prediction": {"seconds": seconds, "bytes": peak}}


def measure_sampling(pipe: DTEPipeline, setting: Setting) -> dict[str, dict[str, float]]:
    """Of a picture in 25 steps with guidance."""
    picture = Image.new("RGB", (pipe.backbone.resolution,) * 2, "red")
    concept = pipe.personalize(picture, num_steps=0, progress=False)
    prompts, found = ["S* on the beach"] * setting.batch, {}
    for name, alpha in (("sampling", 0.7), ("sampling, soft path alone", 1.0)):

        def draw(alpha=alpha):
            pipe.generate(
                concept, prompts, alpha_blend=alpha, batch_size=setting.batch, progress=False
            )

        seconds, peak = timed(draw)
        found[name] = {"seconds": seconds / setting.batch, "bytes": peak}
    return found


def measure_pretraining(pipe: DTEPipeline, setting: Setting) -> dict[str, float]:
    """Of a step."""
    backbone, encoder, batch = pipe.backbone, pipe.encoder, setting.batch
    accelerator = Accelerator(cpu=backbone.device.type == "cpu")
    parameters = list(encoder.train().requires_grad_(True).parameters())
    optimizer = build_optimizer(parameters, PretrainConfig().weight_decay)
    frozen = Frozen.of(backbone, encoder, pipe.prompt_encoder)
    pictures = torch.zeros(batch, 3, backbone.resolution, backbone.resolution)
    items = {
        "image": pictures,
        "prompt": ["a picture of S*"] * batch,
        "concept": torch.arange(batch),
    }

    def step():
        sampled = prepare(backbone, items, PretrainConfig(batch_size=batch), 0)
        train_step(accelerator, encoder, optimizer, frozen, sampled)

    seconds, peak = timed(step)
    return {"seconds": seconds, "bytes": peak}


def row(setting: Setting, predicted: dict[str, Need]) -> dict:
    """What is measured with a setting beside what is predicted; or why it could not be."""
    backbone = None
    try:
        backbone = load_backbone(
            "sd15", "cuda", DTYPES[setting.dtype], random=True, offload=setting.offload,
            gradient_checkpointing=setting.gradient_checkpointing,
        )  # fmt: skip
        measured = measure(backbone, setting)
    except (DTEError, RuntimeError) as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        tqdm.write(f"{setting}: the card is too small")
        return {"setting": asdict(setting), "too small": " ".join(str(error).split())}
    finally:
        del backbone
        gc.collect()
        torch.cuda.empty_cache()
    for name, need in predicted.items():
        if name not in measured:
            continue
        measured[name] |= {"predicted bytes": need.bytes, "flops": need.flops}
        off = need.bytes / measured[name]["bytes"] - 1
        within = "within" if abs(off) <= GOAL else "OUTSIDE"
        speed = need.flops / measured[name]["seconds"] / 1e12
        tqdm.write(
            f"{setting}: {name} {off:+.1%}, {within} the goal of {GOAL:.0%}; "
            f"{measured[name]['seconds']:.2f} s, {speed:.0f} TFLOP/s"
        )
    return {"setting": asdict(setting), "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("error: this measures a GPU, and torch finds none.")
    card = torch.cuda.get_device_name()
    path = out / f"sd15_card_{card.replace(' ', '_')}.json"
    predicted = [needs(setting) for setting in tqdm(SETTINGS, desc="predicting")]
    result = {
        "card": card,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "assumed FLOP/s": ACHIEVED,
        "rows": [],
    }
    for setting, need in zip(tqdm(SETTINGS, desc="measuring"), predicted, strict=True):
        result["rows"].append(row(setting, need))
        write_atomically(path, json.dumps(result, indent=1).encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
