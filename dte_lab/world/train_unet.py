"""Train the denoiser of the small backbone on a bank of latents rendered beforehand.

dte world train unet --out DIR --parts DIR

`parts` holds what was trained before: vae, text_encoder, tokenizer. All stay frozen.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.align import align
from dte_lab.world.captions import caption
from dte_lab.world.clip import tokenize
from dte_lab.world.data import (
    Item,
    caption_bank,
    latent_bank,
    one_caption,
    picture_grid,
    random_batch,
    random_items,
    random_rows,
)
from dte_lab.world.sampling import draw
from dte_lab.world.training import TrainConfig, train

CAPTION_DROPOUT = 0.1  # the share of empty captions, for classifier-free guidance
TIMESTEP_POWER = 2.0  # t / 1000 = u ** (1 / 2): more steps where the caption decides the picture
CAPTIONS = 2  # ways to say what a picture of the bank shows
SAMPLE_EVERY = (
    500  # steps, and twice, four, eight times as many: pictures, and weights for curve.py
)

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",  # ends in pure noise: colours come out right
    "prediction_type": "v_prediction",
}


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler; the lower clip on lambda is what diffusers asks for with a cosine schedule."""
    return DPMSolverMultistepScheduler(
        **SCHEDULER, lambda_min_clipped=-5.1, timestep_spacing="trailing"
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
    out, parts = Path(out), Path(parts)
    out.mkdir(parents=True, exist_ok=True)
    vae = PatchAutoencoder.from_pretrained(parts / "vae").eval().to(device)
    text = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder").eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    torch.manual_seed(seed)
    unet = build_unet()
    noise_scheduler = DDPMScheduler(**SCHEDULER)
    rng = np.random.default_rng((seed, 77))
    items = random_items(rng, bank_size)
    bank = latent_bank(vae, items)  # (N, 96, 4, 4)

    def noised(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the velocity that is to be predicted."""
        noise = torch.randn_like(z)
        return noise_scheduler.add_noise(z, noise, t), noise_scheduler.get_velocity(z, noise, t)

    @torch.no_grad()
    def states(ids: Tensor) -> Tensor:
        """Of captions (B, T): (B, T, 192), in half precision."""
        parts = ids.to(device).split(1024)
        return torch.cat([text(part).last_hidden_state.half() for part in parts])

    def full(items: list[Item]) -> Tensor:
        return tokenize(tokenizer, [caption(*item[:3]) for item in items])

    captions = caption_bank(tokenizer, items, rng, CAPTIONS)  # (N, CAPTIONS, T)
    told = states(captions.flatten(0, 1)).unflatten(0, captions.shape[:2])
    nothing = states(tokenize(tokenizer, [""]))

    def random_t(count: int) -> Tensor:
        return (torch.rand(count, device=device) ** (1 / TIMESTEP_POWER) * 1000).long()

    if not (out / "checkpoint.safetensors").exists():
        z = bank[:512].float()
        t = random_t(len(z))
        align(unet.to(device), noised(z, t)[0], t, states(full(items[:512])).float(), z)

    def loss(unet: UNet2DConditionModel) -> tuple[Tensor, dict]:
        rows, t = random_rows(bank, batch_size), random_t(batch_size)
        x_t, v = noised(bank[rows].float(), t)  # (B, 96, 4, 4)
        dropped = torch.rand(batch_size, 1, 1, device=device) < CAPTION_DROPOUT
        context = torch.where(dropped, nothing, one_caption(told, rows)).float()
        return nn.functional.mse_loss(unet(x_t, t, context).sample, v), {}

    x_true, _, shown = random_batch(np.random.default_rng(10_000), 24)
    shown_texts = [caption(*item[:3]) for item in shown]
    z_test, test_states = bank[:256].float(), states(full(items[:256])).float()

    def sample(unet: UNet2DConditionModel, step: int) -> dict[str, float]:
        pictures = draw(vae, text, tokenizer, unet, build_scheduler(), shown_texts, seed=0)
        grid = torch.stack([x_true, pictures], 1).flatten(0, 1)
        Image.fromarray(picture_grid(grid, 12)).save(out / f"samples-{step:06d}.png")
        if step < steps:
            unet.save_pretrained(out / f"unet-{step:06d}")  # for curve.py
        # The same pictures, noise and timesteps every time: a loss curve without sampling noise.
        torch.manual_seed(0)
        t = torch.arange(0, 1000, 1000 / len(z_test)).long().to(device)
        x_t, v = noised(z_test, t)
        measures = {"test_loss": nn.functional.mse_loss(unet(x_t, t, test_states).sample, v)}
        # From pure noise, -v is the picture that the caption alone tells.
        noise, t = torch.randn_like(z_test), torch.full_like(t, 999)
        told = -unet(noise, t, test_states).sample
        measures["test_told_error"] = nn.functional.mse_loss(told, z_test)
        return {name: value.item() for name, value in measures.items()}

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
    unet = train(out, unet, config, loss, sample, minutes, device)
    unet.save_pretrained(out / "unet")
    build_scheduler().save_pretrained(out / "scheduler")
