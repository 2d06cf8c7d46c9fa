"""Pre-training of the tuning encoder over many concepts.

One step: features of the concept picture and of a noisy latent -> v*, A, B -> the objective on a
target picture of the same concept. In the paper both pictures are one; a dataset may also give
another scene of the concept as the target, with its caption ("ours").

Every random number of step s comes from a generator seeded by (seed, s), and the dataset's items
are pure functions of their index. So weights, optimizer, EMA and s are the whole state, and a run
that was cut off goes on exactly as it would have.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dte_lab.backbone import add_noise
from dte_lab.checkpoint import ema_weights, load_checkpoint, save_checkpoint
from dte_lab.features import image_features, unet_features
from dte_lab.objective import objective
from dte_lab.pipeline import DTEPipeline, to_pil
from dte_lab.tokens import PromptEncoder


@dataclass
class PretrainConfig:
    """Values are ours, not the paper's.

    The learning rate rises over `warmup_steps`, stays, and falls linearly to zero over the last
    `decay_fraction` of `steps`. `batch_size` is per process. With `shared_timestep_probability` the
    UNet features of a sample come from the noisy target at the loss's timestep, as in the paper;
    otherwise from the noisy concept picture at a timestep of its own, which is what `personalize`
    does. `max_minutes` ends this call, with a checkpoint, to be continued by the next.
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
    num_workers: int = 0
    log_every: int = 20
    checkpoint_every: int = 250
    sample_every: int = 500
    max_minutes: float | None = None


def pretrain(
    backbone, encoder, dataset, config=None, out_dir="runs/encoder",
    eval_images=(), eval_prompts=("a picture of S*",), callback=None, progress=True,
):  # fmt: skip
    """Train `encoder` in place; continues from `out_dir` when that holds a checkpoint.

    dataset: map-style torch Dataset; item i is a pure function of i, a dict of image (3, H, W) and
    target (3, H, W) in [-1, 1], prompt (str with "S*") and concept (int id).
    Writes to out_dir: log.jsonl, checkpoint.safetensors (the whole state), encoder/ (EMA weights,
    for `load_encoder`) and samples/ (grids of eval_images with their predictions).
    callback: called with a dict of each log line, and with {"step", "grid"} for each sample grid.
    Returns the encoder with its EMA weights loaded. Once all steps are done a call only does that.

    Raises ValueError when out_dir holds a run with other settings, RuntimeError when the loss stops
    being finite (the last checkpoint stays).
    """
    config = config or PretrainConfig()
    started = time.monotonic()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=backbone.device.type == "cpu"
    )
    device, rank, is_main = (
        accelerator.device,
        accelerator.process_index,
        accelerator.is_main_process,
    )
    backbone.to(device)
    encoder.to(device).train().requires_grad_(True)
    prompt_encoder = PromptEncoder(backbone)
    empty_prompt = prompt_encoder.plain([""])
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    parameters = list(encoder.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    ema.to(device)
    first = load_checkpoint(out_dir, encoder, optimizer, ema, config)
    model, optimizer = accelerator.prepare(encoder, optimizer)
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(len(dataset), config, first, rank),
        num_workers=config.num_workers,
    )
    bar = tqdm(
        total=config.steps, initial=first, desc="pretrain", disable=not (progress and is_main)
    )

    step = first
    for batch in loader:
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sample = prepare(backbone, batch, config, step, rank)
        unet = unet_features(
            backbone, sample["feature_latents"], sample["feature_timesteps"], empty_prompt,
            grid=encoder.dte.grid,
        )  # fmt: skip
        clip = image_features(backbone, sample["images"])
        with accelerator.autocast():
            prediction = model(clip, unet, sample["feature_timesteps"])
            with objective(
                backbone, prompt_encoder, prediction, batch["prompt"], sample["latents"],
                sample["noise"], sample["timesteps"], encoder.dte, sample["concepts"],
                (encoder.bank.clone(), encoder.bank_concepts),
            ) as losses:  # fmt: skip
                accelerator.backward(losses["loss"])
        grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        scaled = accelerator.scaler is not None  # in fp16 a gradient may overflow: step is skipped
        if not (losses["loss"].isfinite() and (scaled or grad_norm.isfinite())):
            raise RuntimeError(
                f"The loss or its gradient at step {step} is not finite; the last checkpoint in "
                f"{out_dir} is good: lower learning_rate and start again."
            )
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        encoder.remember(
            accelerator.gather(prediction.v_star.detach()), accelerator.gather(sample["concepts"])
        )
        step += 1
        bar.update()

        out_of_time = (
            config.max_minutes is not None and time.monotonic() - started > 60 * config.max_minutes
        )
        last = step == config.steps or out_of_time
        if is_main and (step % config.log_every == 0 or last):
            line = {name: value.item() for name, value in losses.items()}
            line |= statistics(prediction, prompt_encoder.table)
            line |= {"grad_norm": float(grad_norm), "learning_rate": lr}
            line = {"step": step, **line, "seconds": time.monotonic() - started}
            with open(out_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{line['diffusion']:.4f}")
            if callback is not None:
                callback(line)
        if is_main and (step % config.checkpoint_every == 0 or last):
            save_checkpoint(out_dir, encoder, optimizer, ema, config, step)
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


def learning_rate(step, config):
    """Trapezoid: linear warm-up, constant, linear decay to zero at `steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = (config.steps - step) / max(1.0, config.decay_fraction * config.steps)
    return config.learning_rate * min(warm, decay, 1.0)


def step_generator(seed, step, rank, stream):
    """A CPU generator for one purpose (`stream`) at one step of one process."""
    state = np.random.SeedSequence([seed, step, rank, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class StepBatches:
    """Indices of each step's batch, drawn with replacement from the step's own generator."""

    def __init__(self, size, config, first, rank):
        self.size, self.config, self.first, self.rank = size, config, first, rank

    def __len__(self):
        return max(0, self.config.steps - self.first)

    def __iter__(self):
        for step in range(self.first, self.config.steps):
            generator = step_generator(self.config.seed, step, self.rank, stream=0)
            yield torch.randint(self.size, (self.config.batch_size,), generator=generator).tolist()


def prepare(backbone, batch, config, step, rank):
    """Latents, noise and timesteps of one step, and the noisy latents that the features see."""
    generator = step_generator(config.seed, step, rank, stream=1)
    device, B, T = backbone.device, len(batch["prompt"]), len(backbone.alphas_cumprod)
    both = backbone.encode_images(torch.cat([batch["target"], batch["image"]])).float()
    latents, image_latents = both.chunk(2)  # (B, C, h, w)

    def timesteps():
        return torch.randint(T, (B,), generator=generator).to(device)

    def normal():
        return torch.randn(latents.shape, generator=generator).to(device)

    t, noise, own_t, own_noise = timesteps(), normal(), timesteps(), normal()
    shared = torch.rand(B, generator=generator) < config.shared_timestep_probability
    shared = shared.to(device)
    feature_latents = torch.where(
        shared[:, None, None, None],
        add_noise(backbone, latents, noise, t),
        add_noise(backbone, image_latents, own_noise, own_t),
    )
    return {
        "images": batch["image"],
        "latents": latents,
        "noise": noise,
        "timesteps": t,
        "feature_latents": feature_latents,
        "feature_timesteps": torch.where(shared, t, own_t),
        "concepts": batch["concept"].to(device),
    }


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
