"""Train the denoiser of the small backbone, and with it the text tower that it reads.

dte world train unet --out DIR --parts DIR --wide CACHE

`parts` holds what was trained before: vae, tokenizer, text_encoder with its reader, and the map of
pictures to words; the denoiser starts from its unet, if there is one. Where that was trained with
another text tower (see `tower_digest`), its cross-attentions are aligned anew. Half of a batch says
words of the dictionary, half words that pictures made.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from dte_lab.backbone import stock_pipeline
from dte_lab.common.checkpoint import CHECKPOINT, save_folder
from dte_lab.common.files import write_atomically
from dte_lab.common.weights import load_weights
from dte_lab.world.align import align, cell_blocks
from dte_lab.world.clip import WIDTH, tokenize
from dte_lab.world.data import save_pairs
from dte_lab.world.latents import pictures_of
from dte_lab.world.options import PartOptions
from dte_lab.world.painter import TextPainter
from dte_lab.world.sampling import draw_states
from dte_lab.world.spoken import Mixture, Spoken, SpokenBatches
from dte_lab.world.training import WORD_TABLE, TrainConfig, train

DRAWN = Mixture(captions=0.5, wide_names=0.3)
NOISES = 2  # levels of noise on each picture: its text is read once
PAINTING = 0.25  # weight of the text tower's own error
CAPTION_DROPOUT = 0.1  # the share of empty captions, for classifier-free guidance
TIMESTEP_POWER = 2.0  # t / 1000 = u ** (1 / 2): more steps where the caption decides the picture
RATE_FACTORS = {"painter.": 0.15, f"painter.text.text_model.embeddings.{WORD_TABLE}": 2.0}
ALIGNED_ON = 512  # samples
SHOWN = 12  # of captions, and of words of unseen things, in a picture
READ = "text_encoder.sha256"  # in the unet's folder: `tower_digest` of the tower that it has read
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
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )


def load_unet(parts: Path) -> UNet2DConditionModel:
    """Of a folder of parts, in single precision. Raises DTEError without one."""
    load = UNet2DConditionModel.from_pretrained
    return load_weights(load, parts / "unet", torch_dtype=torch.float32)


class TextToImage(nn.Module):
    """What is trained together: the denoiser, and the text tower with its reader."""

    def __init__(self, unet: UNet2DConditionModel, painter: TextPainter) -> None:
        super().__init__()
        self.unet, self.painter = unet, painter


class NoiseLevels:
    """Noise for scaled latents, and what is to be predicted of it; all on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device, self.scheduler = device, DDPMScheduler(**NOISE_SCHEDULE)
        # a captured step cannot fetch it from the host
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)

    def random(self, count: int) -> Int[Tensor, " count"]:
        """Of 0 to 999, with density proportional to t ** (TIMESTEP_POWER - 1)."""
        return (torch.rand(count, device=self.device) ** (1 / TIMESTEP_POWER) * 1000).long()

    def noised(
        self, z: Float[Tensor, "batch channels height width"], t: Int[Tensor, " batch"]
    ) -> tuple[
        Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]
    ]:
        """Noisy latents, and the velocity that is to be predicted."""
        noise = torch.randn_like(z)
        return self.scheduler.add_noise(z, noise, t), self.scheduler.get_velocity(z, noise, t)


def mean_by_sample(error: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    return error.float().square().flatten(1).mean(1)


@dataclass
class DenoiserTraining:
    """What `train` calls: the loss of random batches.

    empty: ids of the empty caption. batch_size: noisy latents, NOISES of each picture.
    """

    batches: SpokenBatches
    levels: NoiseLevels
    empty: Int[Tensor, "1 tokens"]
    batch_size: int

    @contextmanager
    def loss(self, model: TextToImage) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        size = self.batch_size // NOISES
        batch, told = self.batches(size), self.batches.told(size)
        painter = model.painter
        states = painter.states(batch.ids, batch.is_slot, batch.v)
        painting = mean_by_sample(painter.paint(states) - batch.latents)
        nothing = painter.text(self.empty).last_hidden_state  # (1, T, d)
        z = batch.latents.repeat(NOISES, 1, 1, 1)
        dropped = torch.rand(len(z), 1, 1, device=z.device) < CAPTION_DROPOUT
        states = torch.where(dropped, nothing, states.repeat(NOISES, 1, 1))
        t = self.levels.random(len(z))
        x_t, velocity = self.levels.noised(z, t)
        error = mean_by_sample(model.unet(x_t, t, states).sample - velocity).view(NOISES, size)
        yield (
            error.mean() + PAINTING * painting.mean(),
            {
                "captions": error[:, :told].mean(),
                "pictures": error[:, told:].mean(),
                "painted_captions": painting[:told].mean(),
                "painted_pictures": painting[told:].mean(),
            },
        )


@dataclass
class DenoiserSamples:
    """Pictures, weights for base_model_curve.py, and the loss on fixed noise of a fixed batch.

    test: half captions, half words of things that no training sees.
    """

    batches: SpokenBatches
    levels: NoiseLevels
    test: Spoken
    out: Path
    steps: int
    half: int = field(init=False)

    def __post_init__(self) -> None:
        self.half = len(self.test.ids) // 2

    def __call__(self, model: TextToImage, step: int) -> dict[str, float]:
        test, unet, text = self.test, model.unet, model.painter.text
        vae, tokenizer = self.batches.vae, self.batches.tokenizer
        states = model.painter.states(test.ids, test.is_slot, test.v)
        nothing = text(tokenize(tokenizer, [""]).to(states.device)).last_hidden_state
        some = [*range(SHOWN), *range(self.half, self.half + SHOWN)]
        pipe = stock_pipeline(vae, text, tokenizer, unet, build_scheduler())
        drawn = draw_states(pipe, states[some], nothing, seed=0)
        true = pictures_of(vae, test.latents[some]).cpu()
        save_pairs(self.out / f"samples-{step:06d}.png", true, drawn)
        if step < self.steps:
            save_folder(unet, self.out / f"unet-{step:06d}")
            save_folder(text, self.out / f"text_encoder-{step:06d}")
        # The same pictures, noise and timesteps every time: a loss curve without sampling noise.
        torch.manual_seed(0)
        t = torch.arange(self.half, device=states.device).repeat(2) * 1000 // self.half
        x_t, velocity = self.levels.noised(test.latents, t)
        errors = {"loss": unet(x_t, t, states).sample - velocity}
        # From pure noise, -v is the picture that the caption alone tells.
        noise, t = torch.randn_like(test.latents), torch.full_like(t, 999)
        errors["told_error"] = -unet(noise, t, states).sample - test.latents
        measures = {}
        for name, error in errors.items():
            told, unseen = mean_by_sample(error).split(self.half)
            measures |= {f"test_{name}": told.mean().item(), f"unseen_{name}": unseen.mean().item()}
        return measures


def tower_digest(text: nn.Module) -> str:
    """Of a text tower in half precision, as it is packed; its projection, which CLIP's training
    moves later, does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(text.text_model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def has_read(unet: Path, text: nn.Module) -> bool:
    """Whether the unet in a folder was trained with this text tower."""
    path = unet / READ
    return path.is_file() and path.read_bytes().strip() == tower_digest(text).encode()


@torch.no_grad()
def start_reading(model: TextToImage, batch: Spoken, levels: NoiseLevels, trained: bool) -> None:
    """Align the cross-attentions with what the text tower says of a batch.

    trained: the unet has read another tower: what it makes of that is taken away.
    """
    states = model.painter.states(batch.ids, batch.is_slot, batch.v)
    t = levels.random(len(states))
    align(model.unet, levels.noised(batch.latents, t)[0], t, states, batch.latents)
    if trained:
        for block in cell_blocks(model.unet):
            nn.init.zeros_(block.attn2.to_out[0].weight)


def main(
    out: Path,
    parts: Path,
    wide: Path,
    steps: int = 2600,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    count: int | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train both, and save the EMA weights to `out/unet` and `out/text_encoder` (with its reader),
    the sampler's settings to `out/scheduler`.

    wide: cache of the wide world. count: of its and the small world's drawings, None for all.
    """
    options = PartOptions(steps, minutes, seed, batch_size, count, device, mixed_precision)
    device = options.device
    out, parts = Path(out), Path(parts)
    painter = TextPainter.load(parts)
    batches = SpokenBatches.of(parts, wide, DRAWN, count, seed, device)
    torch.manual_seed(seed)
    trained, levels = (parts / "unet").is_dir(), NoiseLevels(device)
    unet = load_unet(parts) if trained else build_unet()
    model = TextToImage(unet, painter).to(device)
    if not (out / CHECKPOINT).exists() and not has_read(parts / "unet", painter.text):
        start_reading(model, batches(ALIGNED_ON), levels, trained)
    empty = tokenize(batches.tokenizer, [""]).to(device)
    training = DenoiserTraining(batches, levels, empty, batch_size)
    samples = DenoiserSamples(batches, levels, batches.unseen(wide), out, steps)
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-4,
        muon_learning_rate=1.5e-3,
        rate_factors=RATE_FACTORS,
        warmup_steps=50,
        decay_fraction=0.3,
        ema_decay=0.995,
        mixed_precision=mixed_precision,
        seed=seed,
        sample_every=SAMPLE_EVERY,
    )
    settings = options.settings("unet")
    average = train(out, model, config, training.loss, samples, minutes, device, settings)
    save_folder(average.unet, out / "unet")
    average.painter.save(out)
    write_atomically(out / "unet" / READ, tower_digest(average.painter.text).encode())
    save_folder(build_scheduler(), out / "scheduler")
