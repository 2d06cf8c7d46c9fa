"""Pre-training of the tuning encoder for the small world, in the loop that trains the base model.

What `dte pretrain` does with any pictures, with the small world's own: they are composed on the
device, so that a GPU takes a whole step at once. The shipped encoder was trained here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab.backbone import load_backbone
from dte_lab.common.checkpoint import CHECKPOINT, save_folder
from dte_lab.common.device import checked_device
from dte_lab.common.files import prepare_folder, write_atomically
from dte_lab.common.settings import check_number, check_whole
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.e4t import E4TEncoder, e4t_config
from dte_lab.encoder import TuningEncoder
from dte_lab.pipeline import DTEPipeline
from dte_lab.training.config import PREDICTIONS, PretrainConfig
from dte_lab.training.first_words import fit_token_head
from dte_lab.training.pair_batches import PairBatches
from dte_lab.training.predictions import Predictions
from dte_lab.training.step import Frozen, Noise, make_batch, training_step
from dte_lab.world.pairs import ConceptPairs
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import SAMPLE_CONCEPTS, split_names
from dte_lab.world.training import TrainConfig, train

UNSEEN = 256  # pairs of val concepts, for the log
UNSEEN_EACH = 16  # pairs of each val concept, at the end
BY_CONCEPT = "unseen.json"


class EncoderTraining:
    """What `train` calls: the loss of a batch, and measures of the averaged encoder."""

    def __init__(
        self,
        frozen: Frozen,
        batches: PairBatches,
        val: PairBatches,
        batch_size: int,
        predictions: Predictions,
    ) -> None:
        self.frozen, self.batches, self.val = frozen, batches, val
        self.batch_size, self.predictions = batch_size, predictions
        torch.manual_seed(0)
        self.unseen = val(UNSEEN)

    def draw(self, both: Float[Tensor, "both channels height width"]) -> Noise:
        """The `Noise` of a step, from the device's own random numbers."""
        noise, own_noise = torch.randn_like(both).chunk(2)
        T = len(self.frozen.backbone.alphas_cumprod)
        t, own_t = torch.randint(T, (len(both),), device=both.device).chunk(2)
        probability = PretrainConfig.shared_timestep_probability
        shared = torch.rand(len(t), device=both.device) < probability
        return Noise(noise, t, own_noise, own_t, shared)

    @contextmanager
    def loss(self, encoder: TuningEncoder) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        batch = make_batch(self.frozen.backbone, self.batches(self.batch_size), self.draw)
        with training_step(encoder, self.frozen, batch) as (losses, _):
            yield losses.pop("loss"), losses

    def sample(self, average: TuningEncoder, step: int) -> dict[str, float]:
        self.predictions.write(average, step)
        torch.manual_seed(0)
        return {"unseen_diffusion": self.error(average, self.unseen)}

    def error(self, encoder: TuningEncoder, pictures: dict) -> float:
        """The diffusion loss on pairs, with torch's random numbers."""
        batch = make_batch(self.frozen.backbone, pictures, self.draw)
        with training_step(encoder, self.frozen, batch, enqueue=False) as (losses, _):
            return losses["diffusion"].item()

    @torch.no_grad()
    def errors_by_concept(self, encoder: TuningEncoder) -> dict[str, float]:
        """{val concept: diffusion loss on UNSEEN_EACH of its pairs}."""
        torch.manual_seed(0)
        return {
            name: self.error(encoder, self.val.only(name)(UNSEEN_EACH)) for name in self.val.names
        }


def encoder_configs(e4t: bool, options: dict) -> tuple[EncoderConfig, MethodConfig]:
    """Of options of both. Raises DTEError for a value that means nothing."""
    known = EncoderConfig.__dataclass_fields__
    settings = EncoderConfig(**{k: v for k, v in options.items() if k in known})
    method = e4t_config() if e4t else MethodConfig()
    return settings, replace(method, **{k: v for k, v in options.items() if k not in known})


def check_lengths(steps: int, minutes: float | None, concepts: int | None) -> None:
    """Raise DTEError for numbers of these that mean nothing."""
    check_whole("steps", steps, 1)
    if minutes is not None:
        check_number("minutes", minutes, 0)
    if concepts is not None:
        check_whole("concepts", concepts, 2, len(ConceptPairs().names))


def main(
    out: Path,
    backbone: str = "small",
    steps: int = 10_000,
    minutes: float | None = None,
    batch_size: int = 32,
    concepts: int | None = None,
    e4t: bool = False,
    seed: int = 0,
    device: str = "cpu",
    mixed_precision: str = "no",
    **options: object,
) -> Path:
    """Train and save the EMA weights to `out/encoder`, which is returned.

    concepts: how many to learn from, None for all. e4t: the E4T-style baseline instead. seed: of
    the first weights and of all that training draws. options: of EncoderConfig and MethodConfig.
    The log's `unseen_diffusion` is the loss on UNSEEN pairs of val concepts, and `out/unseen.json`
    that of the saved weights by concept, UNSEEN_EACH pairs each, with the same pairs and noise for
    every run; predictions.jsonl is that of `dte pretrain`.
    Raises DTEError, before any slow work, for a value with which nothing can be trained.
    """
    out, device, configs = Path(out), checked_device(device), encoder_configs(e4t, options)
    check_lengths(steps, minutes, concepts)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TensorFloat-32
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        warmup_steps=min(TrainConfig.warmup_steps, steps // 5),
        mixed_precision=mixed_precision,
        seed=seed,
        log_every=20,
        sample_every=4,
    )
    prepare_folder(out)
    backbone = load_backbone(backbone, device)
    backbone.scheduler.alphas_cumprod = backbone.alphas_cumprod  # on the device once and for all
    encoder = (E4TEncoder if e4t else TuningEncoder).from_backbone(backbone, *configs, seed=seed)
    frozen, pipe = Frozen.of(backbone, encoder), DTEPipeline(backbone, encoder)
    pixels = pipe.pixels([render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS])
    predictions = Predictions(out / PREDICTIONS, pipe, pixels)
    if not (out / CHECKPOINT).exists():
        seen = set(ConceptPairs(count=concepts).names) & set(split_names("train"))
        fit_token_head(encoder, backbone, sorted(seen), seed=seed)
        predictions.write(encoder, 0)
    batches = PairBatches(frozen.prompt_encoder, count=concepts)
    val = PairBatches(frozen.prompt_encoder, ("val",), varied=0, mixed=0)
    training = EncoderTraining(frozen, batches, val, batch_size, predictions)
    settings = {
        "encoder": encoder.settings, "method": encoder.method, "model": type(encoder).__name__,
        "concepts": concepts,
    }  # fmt: skip
    average = train(out, encoder, config, training.loss, training.sample, minutes, device, settings)
    save_folder(average, out / "encoder")
    errors = training.errors_by_concept(average)
    write_atomically(out / BY_CONCEPT, json.dumps(errors, indent=1).encode())
    return out / "encoder"
