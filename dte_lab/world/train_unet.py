"""Train the denoiser of the small backbone on a bank of latents rendered beforehand.

dte world train unet --out DIR --parts DIR

`parts` holds what was trained before: vae, text_encoder, tokenizer. All stay frozen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dte_lab.common.checkpoint import CHECKPOINT, save_folder
from dte_lab.common.images import save_png
from dte_lab.common.weights import load_weights
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.align import align
from dte_lab.world.captions import caption
from dte_lab.world.clip import tokenize
from dte_lab.world.data import (
    caption_bank,
    latent_bank,
    one_caption,
    pixel_grid,
    random_batch,
    random_items,
    random_rows,
)
from dte_lab.world.sampling import draw
from dte_lab.world.training import PartOptions, TrainConfig, train

CAPTION_DROPOUT = 0.1  # the share of empty captions, for classifier-free guidance
TIMESTEP_POWER = 2.0  # t / 1000 = u ** (1 / 2): more steps where the caption decides the picture
CAPTIONS_PER_PICTURE = 2  # ways to say what a picture of the bank shows
SAMPLE_EVERY = 500  # steps, and twice, four, ... times as many: pictures, and weights to judge

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",  # ends in pure noise: colours come out right
    "prediction_type": "v_prediction",
}


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler; the lower clip on lambda is what diffusers asks for with a cosine schedule."""
    return DPMSolverMultistepScheduler(
        **NOISE_SCHEDULE, lambda_min_clipped=-5.1, timestep_spacing="trailing"
    )


def build_unet() -> UNet2DConditionModel:
    """4x4x96 latents, one level, four cross-attentions, 9.2 M parameters."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=96,
        out_channels=96,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(192,),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )


@dataclass
class DenoiserTraining:
    """What batches are drawn from, in half precision: latents of items, states of captions."""

    latents: Float[Tensor, "items channels height width"]
    text_states: Float[Tensor, "items captions tokens dim"]
    empty_state: Float[Tensor, "1 tokens dim"]
    batch_size: int

    @contextmanager
    def loss(self, unet: UNet2DConditionModel) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        device, rows = self.latents.device, random_rows(self.latents, self.batch_size)
        t = random_timesteps(self.batch_size, device)
        x_t, v = noised(self.latents[rows].float(), t)  # (B, 96, 4, 4)
        dropped = torch.rand(self.batch_size, 1, 1, device=device) < CAPTION_DROPOUT
        states = torch.where(dropped, self.empty_state, one_caption(self.text_states, rows)).float()
        yield nn.functional.mse_loss(unet(x_t, t, states).sample, v), {}


def random_timesteps(count: int, device: torch.device | str) -> Int[Tensor, " count"]:
    """Of 0 to 999, with density proportional to t ** (TIMESTEP_POWER - 1)."""
    return (torch.rand(count, device=device) ** (1 / TIMESTEP_POWER) * 1000).long()


def noised(
    z: Float[Tensor, "batch channels height width"], t: Int[Tensor, " batch"]
) -> tuple[
    Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]
]:
    """Noisy latents, and the velocity that is to be predicted."""
    scheduler, noise = DDPMScheduler(**NOISE_SCHEDULE), torch.randn_like(z)
    return scheduler.add_noise(z, noise, t), scheduler.get_velocity(z, noise, t)


@torch.no_grad()
def caption_states(
    text: CLIPTextModelWithProjection, ids: Int[Tensor, "captions tokens"]
) -> Float[Tensor, "captions tokens dim"]:
    """Last hidden states, in half precision."""
    parts = ids.to(text.device).split(1024)
    return torch.cat([text(part).last_hidden_state.half() for part in parts])


@dataclass
class DenoiserSamples:
    """Pictures of captions, weights for base_model_curve.py, and the loss on fixed noise.

    latents and states: of the items that are measured.
    """

    vae: PatchAutoencoder
    text: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    latents: Float[Tensor, "items channels height width"]
    states: Float[Tensor, "items tokens dim"]
    out: Path
    steps: int

    def __post_init__(self) -> None:
        self.x_true, _, items = random_batch(np.random.default_rng(10_000), 24)
        self.captions = [caption(*item[:3]) for item in items]

    def __call__(self, unet: UNet2DConditionModel, step: int) -> dict[str, float]:
        pictures = draw(
            self.vae, self.text, self.tokenizer, unet, build_scheduler(), self.captions, seed=0
        )
        grid = pixel_grid(torch.stack([self.x_true, pictures], 1).flatten(0, 1), 12)
        save_png(Image.fromarray(grid), self.out / f"samples-{step:06d}.png")
        if step < self.steps:
            save_folder(unet, self.out / f"unet-{step:06d}")
        # The same pictures, noise and timesteps every time: a loss curve without sampling noise.
        torch.manual_seed(0)
        t = torch.arange(0, 1000, 1000 / len(self.latents)).long().to(self.latents.device)
        x_t, v = noised(self.latents, t)
        measures = {"test_loss": nn.functional.mse_loss(unet(x_t, t, self.states).sample, v)}
        # From pure noise, -v is the picture that the caption alone tells.
        noise, t = torch.randn_like(self.latents), torch.full_like(t, 999)
        guess = -unet(noise, t, self.states).sample
        measures["test_told_error"] = nn.functional.mse_loss(guess, self.latents)
        return {name: value.item() for name, value in measures.items()}


def main(
    out: Path,
    parts: Path,
    steps: int = 20_000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    bank_size: int = 40_000,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train and save the EMA weights to `out/unet`, the sampler's settings to `out/scheduler`."""
    options = PartOptions(steps, minutes, seed, batch_size, bank_size, device, mixed_precision)
    out, parts = Path(out), Path(parts)
    vae = load_weights(PatchAutoencoder.from_pretrained, parts / "vae").eval().to(device)
    text = load_weights(CLIPTextModelWithProjection.from_pretrained, parts / "text_encoder")
    text, tokenizer = text.eval().to(device), CLIPTokenizer.from_pretrained(parts / "tokenizer")
    torch.manual_seed(seed)
    unet = build_unet()
    rng = np.random.default_rng((seed, 77))
    items = random_items(rng, bank_size)
    bank = latent_bank(vae, items)  # (N, 96, 4, 4)
    captions = caption_bank(tokenizer, items, rng, CAPTIONS_PER_PICTURE)  # (N, C, T)
    text_states = caption_states(text, captions.flatten(0, 1)).unflatten(0, captions.shape[:2])
    empty_state = caption_states(text, tokenize(tokenizer, [""]))
    full = caption_states(text, tokenize(tokenizer, [caption(*i[:3]) for i in items[:512]])).float()
    if not (out / CHECKPOINT).exists():
        z = bank[:512].float()
        t = random_timesteps(len(z), device)
        align(unet.to(device), noised(z, t)[0], t, full, z)
    training = DenoiserTraining(bank, text_states, empty_state, batch_size)
    samples = DenoiserSamples(vae, text, tokenizer, bank[:256].float(), full[:256], out, steps)
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        mixed_precision=mixed_precision,
        ema_decay=0.998,
        seed=seed,
        sample_every=SAMPLE_EVERY,
    )
    settings = options.settings("unet")
    unet = train(out, unet, config, training.loss, samples, minutes, device, settings)
    save_folder(unet, out / "unet")
    build_scheduler().save_pretrained(out / "scheduler")
