"""Train the denoiser of the small backbone on a bank of latents rendered beforehand.

dte world train unet --out DIR --parts DIR

`parts` holds what was trained before: vae, text_encoder, tokenizer. All stay frozen.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dte_lab.files import write_atomically
from dte_lab.world.align import align
from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.captions import caption, random_caption
from dte_lab.world.clip import tokenize
from dte_lab.world.data import picture_grid, random_batch, random_item, rendered_latents
from dte_lab.world.sampling import draw
from dte_lab.world.sprites import concepts, split_names
from dte_lab.world.training import TrainConfig, rank, train, wait

CAPTION_DROPOUT = 0.1  # the share of empty captions, for classifier-free guidance
TIMESTEP_POWER = 2.0  # t / 1000 = u ** (1 / 2): more steps where the caption decides the picture
SAMPLE_EVERY = 500  # steps between two pictures of the samples

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
    """4x4x64 latents, one level, four cross-attentions, 9.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=64,
        out_channels=64,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(192,),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )


@torch.no_grad()
def build_bank(
    path: Path, vae: PatchAutoencoder, size: int, seed: int
) -> tuple[Tensor, list[tuple[str, str, str, int]]]:
    """`size` random renderings as scaled latents (size, 64, 4, 4) in half precision, cached."""
    items_path = path.with_suffix(".json")
    if rank() == 0 and not items_path.exists():
        rng = np.random.default_rng((seed, 77))
        items = [random_item(rng, split_names("train")) for _ in range(size)]
        starts = tqdm(range(0, size, 64), desc="bank", mininterval=5)
        latents = [rendered_latents(vae, items[start : start + 64]) for start in starts]
        write_atomically(path, save({"latents": torch.cat(latents).contiguous()}))
        write_atomically(items_path, json.dumps(items).encode())
    wait()
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents"), json.loads(items_path.read_text())


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
    bank, items = build_bank(out / "bank.safetensors", vae, bank_size, seed)

    def noised(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the velocity that is to be predicted."""
        noise = torch.randn_like(z)
        return noise_scheduler.add_noise(z, noise, t), noise_scheduler.get_velocity(z, noise, t)

    @torch.no_grad()
    def states(texts: list[str]) -> Tensor:
        return text(tokenize(tokenizer, texts).to(device)).last_hidden_state

    def random_t(count: int) -> Tensor:
        return (torch.rand(count) ** (1 / TIMESTEP_POWER) * 1000).long().to(device)

    if not (out / "checkpoint.safetensors").exists():
        z = bank[:512].float().to(device)
        t, told = random_t(len(z)), states([caption(*i[:3]) for i in items[:512]])
        align(unet.to(device), noised(z, t)[0], t, told, z)

    def loss(unet: UNet2DConditionModel, rng: np.random.Generator) -> tuple[Tensor, dict]:
        chosen = rng.integers(len(bank), size=batch_size)
        z = bank[torch.from_numpy(chosen)].float().to(device)  # (B, 64, 4, 4)
        texts = [
            ""
            if rng.random() < CAPTION_DROPOUT
            else random_caption(*items[i][:3], rng, concepts()[items[i][0]].tags)
            for i in chosen
        ]
        t = random_t(batch_size)
        x_t, v = noised(z, t)
        return nn.functional.mse_loss(unet(x_t, t, states(texts)).sample, v), {}

    x_true, _, shown = random_batch(np.random.default_rng(10_000), 24)
    captions = [caption(*item[:3]) for item in shown]
    chosen = np.random.default_rng(10_001).integers(len(bank), size=256)
    z_test = bank[torch.from_numpy(chosen)].float().to(device)
    test_texts = [caption(*items[i][:3]) for i in chosen]

    def sample(unet: UNet2DConditionModel, step: int) -> dict[str, float]:
        pictures = draw(vae, text, tokenizer, unet, build_scheduler(), captions, seed=0)
        grid = torch.stack([x_true, pictures], 1).flatten(0, 1)
        Image.fromarray(picture_grid(grid, 12)).save(out / f"samples-{step:06d}.png")
        if (step // SAMPLE_EVERY).bit_count() == 1:  # 500, 1,000, 2,000, ...: for the curve
            unet.save_pretrained(out / f"unet-{step:06d}")
        # The same pictures, noise and timesteps every time: a loss curve without sampling noise.
        torch.manual_seed(0)
        t = torch.arange(0, 1000, 1000 / len(z_test)).long().to(device)
        x_t, v = noised(z_test, t)
        measures = {"test_loss": nn.functional.mse_loss(unet(x_t, t, states(test_texts)).sample, v)}
        # From pure noise, -v is the picture that the caption alone tells.
        noise, t = torch.randn_like(z_test), torch.full_like(t, 999)
        told = -unet(noise, t, states(test_texts)).sample
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
    if rank() > 0:
        return
    unet.save_pretrained(out / "unet")
    build_scheduler().save_pretrained(out / "scheduler")
