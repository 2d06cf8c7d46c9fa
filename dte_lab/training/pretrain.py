"""Pre-training of the tuning encoder over many concepts.

One step: features of the concept picture and of a noisy latent -> v*, A, B -> the objective on a
target picture of the same concept. In the paper both pictures are one; a dataset may also give
another scene of the concept as the target, with its caption ("ours").

Every random number of step s comes from a generator seeded by (seed, s), and the dataset's items
are pure functions of their index. So weights, optimizer, EMA and s are the whole state, and a run
that was cut off goes on exactly as it would have. Several processes share a batch and see each
other's v* as negatives, so that the same settings give the same losses whatever their number:

    accelerate launch --multi_gpu --num_processes 2 -m dte_lab pretrain --out runs/encoder ...
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dte_lab.backbone import add_noise
from dte_lab.common.attention import short_attention
from dte_lab.common.checkpoint import (
    ema_weights,
    read_state,
    restore_optimizer,
    trapezoid,
    write_state,
)
from dte_lab.common.files import write_atomically
from dte_lab.common.images import to_pil
from dte_lab.objective import Batch, objective
from dte_lab.pipeline import DTEPipeline
from dte_lab.tokens import PromptEncoder
from dte_lab.training.predictions import Predictions

LOG, PREDICTIONS, CHECKPOINT = "log.jsonl", "predictions.jsonl", "checkpoint.safetensors"
FREE_TO_CHANGE = {  # between two pieces of one run
    "steps", "num_workers", "log_every", "checkpoint_every", "sample_every", "predict_every",
    "max_minutes",
}  # fmt: skip


@dataclass
class PretrainConfig:
    """Values are ours, not the paper's.

    The learning rate rises over `warmup_steps`, stays, and falls linearly to zero over the last
    `decay_fraction` of `steps`. `batch_size` is that of all processes together. With
    `shared_timestep_probability` the UNet features of a sample come from the noisy target at the
    loss's timestep, as in the paper; otherwise from the noisy concept picture at a timestep of its
    own, which is what `personalize` does. `max_minutes` ends this call, with a checkpoint, to be
    continued by the next. `optimizer_8bit` takes AdamW8bit of bitsandbytes.
    """

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.2
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    shared_timestep_probability: float = 0.5
    seed: int = 0
    mixed_precision: str = "no"
    optimizer_8bit: bool = False
    num_workers: int = 0
    log_every: int = 20
    checkpoint_every: int = 250
    sample_every: int = 500
    predict_every: int = 20
    max_minutes: float | None = None


def pretrain(
    backbone, encoder, dataset, config=None, out_dir="runs/encoder",
    eval_images=(), eval_prompts=("a picture of S*",), watched_images=(), callback=None,
    progress=True, start=None,
):  # fmt: skip
    """Train `encoder` in place; continues from `out_dir` when that holds a checkpoint.

    dataset: map-style torch Dataset; item i is a pure function of i, a dict of image (3, H, W) and
    target (3, H, W) in [-1, 1], prompt (str with "S*") and concept (int id).
    Writes to out_dir: log.jsonl, checkpoint.safetensors (the whole state), encoder/ (EMA weights,
    for `load_encoder`), samples/ (grids of eval_images with their predictions) and, of
    watched_images, predictions.jsonl (see predictions.py).
    callback: called with a dict of each log line, and with {"step", "grid"} for each sample grid.
    start: called with the fresh encoder, which it may change, where out_dir holds no checkpoint.
    Returns the encoder with its EMA weights loaded. Once all steps are done a call only does that.

    Raises ValueError when out_dir holds a run with other settings, the batch cannot be shared out
    evenly or bitsandbytes is missing, RuntimeError when the loss stops being finite (the last
    checkpoint stays).
    """
    config = config or PretrainConfig()
    started = time.monotonic()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=backbone.device.type == "cpu"
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "The encoder is small enough for every process to hold it whole: launch without "
            "--use_fsdp or --use_deepspeed."
        )
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"A batch of {config.batch_size} cannot be shared out evenly to "
            f"{accelerator.num_processes} processes."
        )
    is_main = accelerator.is_main_process
    backbone.to(accelerator.device)
    encoder.to(accelerator.device).train().requires_grad_(True)
    if start is not None and not (Path(out_dir) / CHECKPOINT).is_file():
        start(encoder)
    prompt_encoder = PromptEncoder(backbone)
    feature_prompt = prompt_encoder.plain([encoder.settings.feature_prompt])
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    parameters = list(encoder.parameters())
    optimizer = build_optimizer(parameters, config)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    ema.to(accelerator.device)
    first = load_checkpoint(out_dir, encoder, optimizer, ema, config)
    model, optimizer = accelerator.prepare(encoder, optimizer)
    share = accelerator.process_index, accelerator.num_processes
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(len(dataset), config, first, *share),
        num_workers=config.num_workers,
    )
    bar = tqdm(
        total=config.steps, initial=first, desc="pretrain", disable=not (progress and is_main)
    )

    predictions = None
    if is_main and len(watched_images):
        watched = DTEPipeline(backbone, encoder).pixels(watched_images)
        predictions = Predictions(out_dir / PREDICTIONS, backbone, encoder, watched, prompt_encoder)
        if first == 0:
            predictions.write(encoder, 0)

    step = first
    for batch in loader:
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sample = prepare(backbone, batch, config, step, *share)
        with short_attention(backbone.device):
            losses, prediction, grad_norm = train_step(
                accelerator, model, optimizer, backbone, prompt_encoder, feature_prompt, sample,
                config.max_grad_norm,
            )  # fmt: skip
        scaled = accelerator.scaler is not None  # in fp16 a gradient may overflow: step is skipped
        if not (losses["loss"].isfinite() and (scaled or grad_norm.isfinite())):
            raise RuntimeError(
                f"The loss or its gradient at step {step} is not finite; the last checkpoint in "
                f"{out_dir} is good: lower learning_rate and start again."
            )
        ema.step(parameters)
        step += 1
        bar.update()

        out_of_time = config.max_minutes is not None and any_process(
            accelerator, time.monotonic() - started > 60 * config.max_minutes
        )
        last = step == config.steps or out_of_time
        if step % config.log_every == 0 or last:
            line = {name: value.item() for name, value in losses.items()}
            line |= statistics(prediction, prompt_encoder.table)
            line = mean_over_processes(accelerator, line)
            line |= {"grad_norm": float(grad_norm), "learning_rate": lr}
            line = {"step": step, **line, "seconds": time.monotonic() - started}
            if is_main:
                with open(out_dir / LOG, "a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix(loss=f"{line['diffusion']:.4f}")
                if callback is not None:
                    callback(line)
        if is_main and (step % config.checkpoint_every == 0 or last):
            save_checkpoint(out_dir, encoder, optimizer, ema, config, step)
        if predictions is not None and (step % config.predict_every == 0 or last):
            with ema_weights(ema, encoder):
                predictions.write(encoder, step)
        if is_main and len(eval_images) and (step % config.sample_every == 0 or last):
            with ema_weights(ema, encoder):
                grid = sample_grid(DTEPipeline(backbone, encoder), eval_images, eval_prompts)
            encoder.train()
            (out_dir / "samples").mkdir(exist_ok=True)
            grid.save(out_dir / "samples" / f"{step:07d}.png")
            if callback is not None:
                callback({"step": step, "grid": grid})
        if out_of_time:
            break
    bar.close()
    accelerator.wait_for_everyone()
    ema.copy_to(parameters)
    return encoder.eval().requires_grad_(False)


def build_optimizer(parameters, config):
    """AdamW, or with `optimizer_8bit` that of bitsandbytes; ValueError when that is missing."""
    adam = adamw_8bit() if config.optimizer_8bit else torch.optim.AdamW
    return adam(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=config.weight_decay)


def adamw_8bit():
    """AdamW8bit of bitsandbytes, whose state goes through `write_state` and `restore_optimizer`."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "The 8-bit optimizer is that of bitsandbytes, which is missing: "
            "pip install bitsandbytes, or leave the option out."
        ) from None

    class CheckpointedAdamW8bit(AdamW8bit):
        state_dict = torch.optim.Optimizer.state_dict  # one level; theirs nests it, for FSDP

        def load_state_dict(self, *args, **kwargs):
            super().load_state_dict(*args, **kwargs)
            for state in self.state.values():
                state["step"] = int(state["step"])
                for name in ("state1", "state2") if "qmap1" in state else ():
                    state[name] = state[name].to(torch.uint8)  # restored as the parameter's dtype

    return CheckpointedAdamW8bit


def train_step(
    accelerator, model, optimizer, backbone, prompt_encoder, feature_prompt, sample,
    max_grad_norm=1.0,
):  # fmt: skip
    """One optimisation step on what `prepare` returned: (losses, prediction, gradient norm).

    feature_prompt: (1, L, d), the encoded prompt under which the UNet's features are taken.
    """
    encoder = accelerator.unwrap_model(model)
    unet = encoder.unet_features(
        backbone, sample["feature_latents"], sample["feature_timesteps"], feature_prompt
    )
    clip = encoder.image_features(backbone, sample["images"])
    with accelerator.autocast():
        prediction = model(clip, unet, sample["feature_timesteps"])
        v_star, concepts = SeenByAll.apply(prediction.v_star, accelerator), sample["concepts"]
        concepts = accelerator.gather(concepts)
        n, r = len(prediction.v_star), accelerator.process_index
        others = [i for i in range(len(v_star)) if i // n != r]
        bank = (
            torch.cat([encoder.bank.clone(), v_star[others]]),
            torch.cat([encoder.bank_concepts, concepts[others]]),
        )
        target = Batch(
            sample["latents"], sample["noise"], sample["timesteps"], sample["prompts"],
            sample["concepts"],
        )  # fmt: skip
        with objective(
            backbone, prompt_encoder, prediction, target, encoder.method, bank
        ) as losses:
            accelerator.backward(losses["loss"])
    grad_norm = accelerator.clip_grad_norm_(encoder.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    encoder.enqueue(v_star, concepts)
    return losses, prediction, grad_norm


class SeenByAll(torch.autograd.Function):
    """(B, d) of each process -> (processes * B, d) for all, in the order of the processes.

    Each process's part gets the gradients of all processes, which `Accelerator.gather` drops.
    """

    @staticmethod
    def forward(ctx, x, accelerator):
        ctx.accelerator, ctx.size = accelerator, len(x)
        return accelerator.gather(x) if accelerator.num_processes > 1 else x.clone()

    @staticmethod
    def backward(ctx, gradient):
        accelerator = ctx.accelerator
        gradient = accelerator.reduce(gradient.contiguous(), "sum")
        return gradient.split(ctx.size)[accelerator.process_index], None


def any_process(accelerator, flag):
    """Whether `flag` is true in any of the processes, so that all of them do the same."""
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.gather(flags).any())


def mean_over_processes(accelerator, line):
    """The means of {name: number} over the processes."""
    values = torch.tensor(list(line.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(line, accelerator.reduce(values, "mean").tolist(), strict=True))


def save_checkpoint(out_dir, encoder, optimizer, ema, config, step):
    """Write the whole state to one file, and the EMA encoder to out_dir/encoder; atomically."""
    parts = {
        "model": encoder.state_dict(),
        "ema": {str(i): p for i, p in enumerate(ema.shadow_params)},
    }
    metadata = {"step": str(step), "config": json.dumps(_settings(encoder, config))}
    write_state(out_dir / CHECKPOINT, parts, optimizer, metadata)

    final = out_dir / "encoder"
    final.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir) as folder, ema_weights(ema, encoder):
        encoder.save_pretrained(folder)
        for file in Path(folder).iterdir():
            os.replace(file, final / file.name)


def load_checkpoint(out_dir, encoder, optimizer, ema, config):
    """Restore the state from out_dir and return its step; 0 when there is none.

    Raises ValueError when settings other than `FREE_TO_CHANGE` have changed.
    """
    path = out_dir / CHECKPOINT
    if not path.is_file():
        return 0
    parts, metadata = read_state(path)
    step = int(metadata["step"])
    before = asdict(PretrainConfig()) | json.loads(metadata["config"])  # it may lack newer settings
    now = json.loads(json.dumps(_settings(encoder, config)))
    if changed := [k for k, v in now.items() if k not in FREE_TO_CHANGE and v != before.get(k)]:
        raise ValueError(
            f"{out_dir} holds a run with other settings ({', '.join(changed)}): "
            "use them again, or another folder."
        )
    encoder.load_state_dict(parts["model"])
    for i, value in parts["ema"].items():
        ema.shadow_params[int(i)].copy_(value)
    ema.optimization_step = step
    restore_optimizer(optimizer, parts["optimizer"])

    for log in (
        out_dir / LOG,
        out_dir / PREDICTIONS,
    ):  # forget what was logged after the checkpoint
        if log.is_file():
            lines = [x for x in log.read_text().splitlines() if _step_of(x) <= step]
            write_atomically(log, "".join(x + "\n" for x in lines).encode())
    return step


def _settings(encoder, config):
    return {**asdict(config), **asdict(encoder.settings), **asdict(encoder.method)}


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except ValueError:  # the run was killed while it wrote this line
        return float("inf")


def learning_rate(step, config):
    """Trapezoid: linear warm-up, constant, linear decay to zero at `steps`."""
    factor = trapezoid(step, config.steps, config.warmup_steps, config.decay_fraction)
    return config.learning_rate * factor


def step_generator(seed, step, stream):
    """A CPU generator for one purpose (`stream`) at one step."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class StepBatches:
    """Indices of one process's share of each step's batch.

    The batch is drawn with replacement from the step's own generator.
    """

    def __init__(self, size, config, first, rank=0, processes=1):
        self.size, self.config, self.first = size, config, first
        self.rank, self.processes = rank, processes

    def __len__(self):
        return max(0, self.config.steps - self.first)

    def __iter__(self):
        for step in range(self.first, self.config.steps):
            generator = step_generator(self.config.seed, step, stream=0)
            batch = torch.randint(self.size, (self.config.batch_size,), generator=generator)
            yield batch.chunk(self.processes)[self.rank].tolist()


def prepare(backbone, batch, config, step, rank=0, processes=1):
    """Latents, noise and timesteps of a step, and the noisy latents that the features see.

    All of it is drawn for the whole batch, of which each process takes its share.
    """
    generator = step_generator(config.seed, step, stream=1)
    device, T = backbone.device, len(backbone.alphas_cumprod)
    B = len(batch["prompt"]) * processes
    both = backbone.encode_images(torch.cat([batch["target"], batch["image"]])).float()
    latents, image_latents = both.chunk(2)  # (B / processes, C, h, w)

    def share(x):
        return x.chunk(processes)[rank].to(device)

    def timesteps():
        return share(torch.randint(T, (B,), generator=generator))

    def normal():
        return share(torch.randn((B, *latents.shape[1:]), generator=generator))

    t, noise, own_t, own_noise = timesteps(), normal(), timesteps(), normal()
    shared = share(torch.rand(B, generator=generator)) < config.shared_timestep_probability
    feature_latents, feature_t = seen_by_features(
        backbone, shared, (latents, noise, t), (image_latents, own_noise, own_t)
    )
    return {
        "images": batch["image"],
        "prompts": batch["prompt"],
        "latents": latents,
        "noise": noise,
        "timesteps": t,
        "feature_latents": feature_latents,
        "feature_timesteps": feature_t,
        "concepts": batch["concept"].to(device),
    }


def seen_by_features(backbone, shared, target, image):
    """The noisy latents (B, C, h, w) and timesteps (B,) that the UNet features are taken from.

    target, image: latents, noise and timesteps. shared: (B,) bool, the target's where true.
    """
    noisy = torch.where(
        shared[:, None, None, None], add_noise(backbone, *target), add_noise(backbone, *image)
    )
    return noisy, torch.where(shared, target[-1], image[-1])


@torch.no_grad()
def statistics(prediction, table):
    """Norm of v* relative to words, cosine to the nearest word, and size of the offsets A B."""
    v = prediction.v_star
    pairs = prediction.offsets.values()
    return {
        "v_star_norm": (v.norm(dim=-1).mean() / table.mean_norm).item(),
        "nearest_cosine": table.nearest_rows(v)[0].mean().item(),
        "offset_rms": torch.stack([(a @ b).square().mean() for a, b in pairs]).mean().sqrt().item(),
    }


def sample_grid(pipe, images, prompts):
    """One row per picture: the input, then a sample of each prompt from the prediction alone."""
    cells = []
    for image in images:
        concept = pipe.personalize(image, num_steps=0, progress=False)
        samples = pipe.generate(concept, list(prompts), progress=False)
        cells += [*to_pil(pipe.pixels([image])), *(row[0] for row in samples)]
    return make_image_grid(cells, rows=len(images), cols=1 + len(prompts))
