"""Train the denoiser on, on dictionary words and on words made from pictures.

    dte world train unet --words RUN --out DIR --parts DIR --wide CACHE

`parts` is a backbone of the small world whose denoiser goes on learning; RUN is what
`dte world train words` wrote, whose text tower and maker of words stay as they are.
"""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from dte_lab.checkpoint import read_state
from dte_lab.sampling import stock_pipeline
from dte_lab.world.clip import tokenize
from dte_lab.world.data import picture_grid
from dte_lab.world.sampling import GUIDANCE_SCALE, STEPS
from dte_lab.world.train_unet import CAPTION_DROPOUT, SCHEDULER, TIMESTEP_POWER, build_scheduler
from dte_lab.world.train_words import Words, load_parts, scaled_latents, word_norm
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide_batches import Shares, WideBatches

NOISES = 2  # noise levels for each picture of a batch: states and latents cost half of a step


def load_words(run: Path, text, tokenizer) -> Words:
    """The EMA weights of a run of train_words, frozen."""
    parts, _ = read_state(Path(run) / "checkpoint.safetensors")
    norm = word_norm(text, tokenizer)
    words = Words(text, norm, len(parts["ema"]["cell.bias"]))
    words.load_state_dict(parts["ema"])
    return words.eval().requires_grad_(False)


@torch.no_grad()
def draw_states(vae, words: Words, tokenizer, unet, states: Tensor, seed: int) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1] of text states (B, T, d), with diffusers' pipeline."""
    pipe = stock_pipeline(vae, words.text, tokenizer, unet, build_scheduler())
    nothing = words.text(tokenize(tokenizer, [""])).last_hidden_state
    generator, pictures = torch.Generator().manual_seed(seed), []
    for part in states.split(64):
        pictures.append(
            pipe(
                prompt_embeds=part,
                negative_prompt_embeds=nothing.expand(len(part), -1, -1),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                output_type="pt",
            ).images
        )
    return torch.cat(pictures) * 2 - 1


def main(
    out: Path,
    parts: Path,
    words_run: Path,
    wide=None,
    steps: int = 4000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 128,
    shares: Shares | None = None,
    learning_rate: float = 5e-4,
    muon_learning_rate: float = 1.5e-3,
    unet: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """Train and save the EMA weights to `out/unet`. unet: another than that of `parts`."""
    out, parts = Path(out), Path(parts)
    out.mkdir(parents=True, exist_ok=True)
    vae, text, tokenizer = load_parts(parts)
    words = load_words(words_run, text, tokenizer).to(memory_format=torch.channels_last)
    vae = vae.to(memory_format=torch.channels_last)
    batches = WideBatches(tokenizer, wide, shares)
    if unet is None:
        unet = UNet2DConditionModel.from_pretrained(parts / "unet", torch_dtype=torch.float32)
    noise_scheduler = DDPMScheduler(**SCHEDULER)
    with torch.no_grad():
        nothing = words.text(tokenize(tokenizer, [""])).last_hidden_state

    def random_t(count: int) -> Tensor:
        return (torch.rand(count) ** (1 / TIMESTEP_POWER) * 1000).long()

    def loss(unet: UNet2DConditionModel) -> tuple[Tensor, dict]:
        batch = batches(batch_size // NOISES)
        with torch.no_grad():
            z = scaled_latents(vae, batch.target).repeat(NOISES, 1, 1, 1)
            states = words.said(batch)[0].repeat(NOISES, 1, 1)
        dropped = torch.rand(len(z), 1, 1) < CAPTION_DROPOUT
        states = torch.where(dropped, nothing, states)
        t, noise = random_t(len(z)), torch.randn_like(z)
        x_t = noise_scheduler.add_noise(z, noise, t)
        v = noise_scheduler.get_velocity(z, noise, t)
        error = (unet(x_t, t, states).sample - v).pow(2).mean((1, 2, 3))
        made = torch.arange(len(z)) % (batch_size // NOISES) >= batch_size // NOISES - len(
            batch.image
        )
        return error.mean(), {"dictionary": error[~made].mean(), "made": error[made].mean()}

    torch.manual_seed(1)
    shown = batches(48)

    def sample(unet: UNet2DConditionModel, step: int) -> dict[str, float]:
        drawn = draw_states(vae, words, tokenizer, unet, words.said(shown)[0], seed=0)
        both = torch.stack([shown.target, drawn], 1).flatten(0, 1)
        Image.fromarray(picture_grid(both, 12)).save(out / "samples.png")
        return {}

    config = TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate,
        muon_learning_rate=muon_learning_rate, warmup_steps=50, decay_fraction=0.3, seed=seed,
        ema_decay=0.995, log_every=20, sample_every=100, checkpoint_minutes=5,
    )  # fmt: skip
    unet = train(out, unet, config, loss, sample, minutes)
    unet.save_pretrained(out / "unet")
    return unet
