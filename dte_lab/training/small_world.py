"""Pre-training of the tuning encoder for the small world, in the loop that trains the base model.

What `dte pretrain` does with any pictures, with the drawings of the small and the wide world: they
are composed on the device, so that a GPU takes a whole step at once. The shipped encoder was
trained here, in two phases. (ours, not the paper's, which has the second alone)

1. The word. v* learns to be the word of the picture (world/word_space.py), by regression. The
   denoiser knows such words, so v* says what the thing looks like.
2. The objective, with a little of that regression beside it. A part of the samples lose their
   offsets, or these would come to say everything, and the word nothing.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor

from dte_lab.backbone import Backbone, backbone_folder, load_backbone
from dte_lab.common.checkpoint import CHECKPOINT, save_folder
from dte_lab.common.device import checked_device
from dte_lab.common.files import prepare_folder, write_atomically
from dte_lab.common.settings import check_number, check_whole
from dte_lab.common.weights import read_tensors
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.e4t import E4TEncoder, e4t_config
from dte_lab.encoder import EncoderPrediction, TuningEncoder
from dte_lab.features import ImageFeatures
from dte_lab.pipeline import DTEPipeline
from dte_lab.tokens import PromptTokens
from dte_lab.training.config import PREDICTIONS, PretrainConfig
from dte_lab.training.predictions import Predictions
from dte_lab.training.step import (
    EncoderBatch,
    Frozen,
    Noise,
    encoder_inputs,
    make_batch,
    training_step,
)
from dte_lab.world.batches import PairBatch, PicturePairs, Shares
from dte_lab.world.drawings import Drawings
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import SAMPLE_CONCEPTS, STYLES, split_names
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide import Wide
from dte_lab.world.word_space import PICTURE_WORDS, PictureWords, unexplained_share

SHARES = Shares(same_scene=0.25, restyled=0.2)
PLAIN = Shares(wide=0, mixed=0, varied=0)  # of the things that are measured
UNSEEN, UNSEEN_EACH = 256, 16  # pairs of val concepts for the log, and of each at the end
BY_CONCEPT = "unseen.json"
WORD = "word.safetensors"  # what the first phase leaves: fusion and token head
WORD_BATCH = 64
WORD_WEIGHT = 0.1  # of the regression in the second phase
OFFSETS_DROPPED = 0.25  # of its samples
WORD_RATES = {"fusion.": 0.2, "token_head.": 0.2}  # factors: what is learned is not undone


def step_pictures(batch: PairBatch) -> dict:
    """What `make_batch` takes."""
    prompt = PromptTokens(batch.ids, torch.where(batch.is_slot, 0, -1))
    return {
        "image": batch.image, "target": batch.target, "prompt": prompt, "concept": batch.concept
    }  # fmt: skip


def drop_offsets(
    prediction: EncoderPrediction, dropped: Bool[Tensor, " batch"]
) -> EncoderPrediction:
    """The prediction with B = 0 in some of the samples, whose v* is then all there is."""
    kept = ~dropped[:, None, None]
    offsets = {key: (a, b * kept) for key, (a, b) in prediction.offsets.items()}
    return EncoderPrediction(prediction.v_star, offsets, prediction.class_word)


class EncoderTraining:
    """What `train` calls in both phases: losses of a batch, and measures of the average."""

    def __init__(
        self, frozen: Frozen, pairs: PicturePairs, unseen: PicturePairs, words: PictureWords,
        batch_size: int, predictions: Predictions,
    ) -> None:  # fmt: skip
        """unseen: pairs of val things."""
        self.frozen, self.pairs, self.unseen = frozen, pairs, unseen
        self.words, self.batch_size, self.predictions = words, batch_size, predictions

    @classmethod
    def of(
        cls, backbone: Backbone, encoder: TuningEncoder, drawings: Drawings, words: PictureWords,
        batch_size: int, out: Path,
    ) -> "EncoderTraining":  # fmt: skip
        """For an encoder, on drawings; predictions go to `out`."""
        pipe = DTEPipeline(backbone, encoder)
        pixels = pipe.pixels([render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS])
        val = Drawings(split_names("val"), device=backbone.device)
        return cls(
            Frozen.of(backbone, encoder),
            PicturePairs(backbone.tokenizer, drawings, SHARES),
            PicturePairs(backbone.tokenizer, val, PLAIN),
            words, batch_size, Predictions(out / PREDICTIONS, pipe, pixels),
        )  # fmt: skip

    def draw(self, both: Float[Tensor, "both channels height width"]) -> Noise:
        """The `Noise` of a step, from the device's own random numbers."""
        noise, own_noise = torch.randn_like(both).chunk(2)
        T = len(self.frozen.backbone.alphas_cumprod)
        t, own_t = torch.randint(T, (len(both),), device=both.device).chunk(2)
        probability = PretrainConfig.shared_timestep_probability
        shared = torch.rand(len(t), device=both.device) < probability
        return Noise(noise, t, own_noise, own_t, shared)

    def batch(self, pairs: PairBatch) -> EncoderBatch:
        return make_batch(self.frozen.backbone, step_pictures(pairs), self.draw)

    def word_error(
        self, v_star: Float[Tensor, "batch dim"], white: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """The share of the variance of pictures' words that v* leaves unexplained."""
        truth = self.words(self.frozen.backbone.encode_images(white).float())
        return unexplained_share(v_star.float(), truth)

    @contextmanager
    def word_loss(self, encoder: TuningEncoder) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Of the first phase."""
        pairs = self.pairs(WORD_BATCH)
        clip, unet, t = encoder_inputs(encoder, self.frozen, self.batch(pairs))
        v_star, _ = encoder.word(clip, encoder.fusion(clip, unet, t))
        yield self.word_error(v_star, pairs.white), {}

    @contextmanager
    def loss(self, encoder: TuningEncoder) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Of the second."""
        pairs = self.pairs(self.batch_size)
        dropped = torch.rand(self.batch_size, device=pairs.image.device) < OFFSETS_DROPPED

        def forward(*inputs: Tensor | ImageFeatures) -> EncoderPrediction:
            return drop_offsets(encoder(*inputs), dropped)

        with training_step(encoder, self.frozen, self.batch(pairs), forward) as (losses, found):
            losses["unexplained"] = self.word_error(found.v_star, pairs.white)
            yield losses.pop("loss") + WORD_WEIGHT * losses["unexplained"], losses

    def unseen_word(self, average: TuningEncoder, step: int) -> dict[str, float]:
        """What `train` logs in the first phase: what v* leaves unexplained of val things."""
        torch.manual_seed(0)
        pairs = self.unseen(UNSEEN)
        clip, unet, t = average.static_features(
            self.frozen.backbone, pairs.image, prompt_encoder=self.frozen.prompt_encoder
        )
        v_star, _ = average.word(clip, average.fusion(clip, unet, t))
        v_star = v_star.unflatten(0, (len(pairs.image), -1)).mean(dim=1)
        norm = v_star.norm(dim=-1).mean() / self.frozen.prompt_encoder.table.mean_norm
        error = self.word_error(v_star, pairs.white)
        return {"unseen_unexplained": error.item(), "unseen_norm": norm.item()}

    def sample(self, average: TuningEncoder, step: int) -> dict[str, float]:
        self.predictions.write(average, step)
        word = self.unseen_word(average, step)
        torch.manual_seed(0)
        return {"unseen_diffusion": self.error(average, self.unseen(UNSEEN)), **word}

    def error(self, encoder: TuningEncoder, pairs: PairBatch) -> float:
        """The diffusion loss on pairs, with torch's random numbers."""
        with training_step(encoder, self.frozen, self.batch(pairs), enqueue=False) as (losses, _):
            return losses["diffusion"].item()

    @torch.no_grad()
    def errors_by_concept(self, encoder: TuningEncoder) -> dict[str, float]:
        """{val concept: diffusion loss on UNSEEN_EACH of its pairs}."""
        torch.manual_seed(0)
        n = len(STYLES)
        return {
            name: self.error(encoder, self.unseen(UNSEEN_EACH, (n * k, n * k + n)))
            for k, name in enumerate(self.unseen.drawings.names)
        }


def encoder_configs(e4t: bool, options: dict) -> tuple[EncoderConfig, MethodConfig]:
    """Of options of both. Raises DTEError for a value that means nothing."""
    known = EncoderConfig.__dataclass_fields__
    settings = EncoderConfig(**{k: v for k, v in options.items() if k in known})
    method = e4t_config() if e4t else MethodConfig()
    return settings, replace(method, **{k: v for k, v in options.items() if k not in known})


def phase(steps: int, batch_size: int, mixed_precision: str, seed: int) -> TrainConfig:
    """The recipe of a phase. Raises DTEError for a value with which nothing can be trained."""
    check_whole("steps", steps, 1)
    return TrainConfig(
        steps, batch_size, 1e-3, 3e-3, warmup_steps=min(100, steps // 5), decay_fraction=0.4,
        ema_decay=0.995, mixed_precision=mixed_precision, seed=seed, log_every=20, sample_every=100,
    )  # fmt: skip


def word_state(encoder: TuningEncoder) -> dict[str, Tensor]:
    """The tensors that v* comes from."""
    parts = ("fusion.", "token_head.", "zero_shot_weight")
    return {key: x for key, x in encoder.state_dict().items() if key.startswith(parts)}


def train_word(
    out: Path, encoder: TuningEncoder, training: EncoderTraining, config: TrainConfig,
    minutes: float | None, device: str, settings: dict,
) -> None:  # fmt: skip
    """The first phase, in `out/word`; the weights it leaves go into the encoder and `out/WORD`."""
    own = word_state(encoder).keys()
    frozen = [p for key, p in encoder.named_parameters() if key not in own]
    for p in frozen:
        p.requires_grad_(False)
    average = train(
        out / "word", encoder, config, training.word_loss, training.unseen_word, minutes, device,
        settings,
    )  # fmt: skip
    for p in frozen:
        p.requires_grad_(True)
    found = word_state(average)
    encoder.load_state_dict(found, strict=False)
    write_atomically(out / WORD, save({key: x.contiguous().cpu() for key, x in found.items()}))


def read_word(encoder: TuningEncoder, path: Path) -> None:
    """Start from another run's first phase. Raises DTEError for that of another kind of encoder."""
    shapes = {key: x.shape for key, x in word_state(encoder).items()}
    state = read_tensors(path, shapes, f"give the {WORD} of a run with an encoder of this size")
    encoder.load_state_dict(state, strict=False)


def main(
    out: Path,
    backbone: str = "small",
    wide: Wide | None = None,
    steps: int = 4000,
    word_steps: int = 6000,
    word: Path | None = None,
    minutes: float | None = None,
    batch_size: int = 32,
    count: int | None = None,
    e4t: bool = False,
    seed: int = 0,
    device: str = "cpu",
    mixed_precision: str = "no",
    **options: object,
) -> Path:
    """Train and save the EMA weights to `out/encoder`, which is returned.

    word: the WORD of another run to start from, in place of `word_steps` of the first phase. count:
    how many drawings to learn from, None for all. e4t: the E4T-style baseline instead. minutes: of
    each phase. seed: of all that is random. options: of EncoderConfig and MethodConfig.
    The log's `unseen_diffusion` is the loss on UNSEEN pairs of val concepts, `unseen_unexplained`
    and `unseen_norm` say how well v* is the word of its picture, and how long in units of a word's,
    and `out/unseen.json` has the loss of the saved weights by concept, UNSEEN_EACH pairs each, with
    the same pairs and noise for every run; predictions.jsonl is that of `dte pretrain`.
    Raises DTEError, before any slow work, for a value with which nothing can be trained.
    """
    out, device, configs = Path(out), checked_device(device), encoder_configs(e4t, options)
    if minutes is not None:
        check_number("minutes", minutes, 0)
    if count is not None:
        check_whole("count", count, 1)
    check_whole("word_steps", word_steps, 1)
    first = phase(word_steps, WORD_BATCH, mixed_precision, seed)
    second = replace(phase(steps, batch_size, mixed_precision, seed), rate_factors=WORD_RATES)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TensorFloat-32
    prepare_folder(out)
    folder, backbone = backbone_folder(backbone), load_backbone(backbone, device)
    words = PictureWords.load(folder / PICTURE_WORDS).to(device)
    backbone.scheduler.alphas_cumprod = backbone.alphas_cumprod  # on the device once and for all
    encoder = (E4TEncoder if e4t else TuningEncoder).from_backbone(backbone, *configs, seed=seed)
    torch.nn.init.zeros_(encoder.zero_shot_weight)  # the first phase begins with nothing
    drawings = Drawings(split_names("train") + split_names("extra"), wide, count, device)
    training = EncoderTraining.of(backbone, encoder, drawings, words, batch_size, out)
    settings = {
        "encoder": encoder.settings, "model": type(encoder).__name__, "drawings": len(drawings)
    }  # fmt: skip
    if word is not None or (out / WORD).exists():
        read_word(encoder, word or out / WORD)
    else:
        train_word(out, encoder, training, first, minutes, device, settings)
    if not (out / CHECKPOINT).exists():
        training.predictions.write(encoder, 0)
    settings |= {"method": encoder.method}
    average = train(out, encoder, second, training.loss, training.sample, minutes, device, settings)
    save_folder(average, out / "encoder")
    errors = training.errors_by_concept(average)
    write_atomically(out / BY_CONCEPT, json.dumps(errors, indent=1).encode())
    return out / "encoder"
