"""Tuning a prediction on the concept's own pictures: 12 optimisation steps, or any other number.

(paper: "up to 12 optimization steps"; what is optimised and how is not known. Ours: AdamW on v*,
Muon on A and B themselves, or AdamW on the weights that predict them, with the pre-training
objective.)
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
from dte_lab.common.muon import MuonAdamW
from dte_lab.common.random import stream
from dte_lab.common.settings import check_number, check_one_of, check_whole
from dte_lab.config import MethodConfig
from dte_lab.contrastive import Bank
from dte_lab.encoder import (
    EncoderPrediction,
    Predictor,
    TuningEncoder,
    mean_prediction,
    trained_encoder,
)
from dte_lab.features import ImageFeatures
from dte_lab.lora import is_whole
from dte_lab.objective import Batch, objective
from dte_lab.recommended import OPTIMIZERS, Recommended
from dte_lab.setting import picture_prompts
from dte_lab.tokens import PromptEncoder

TRAINABLE = ("predictions", "heads", "encoder")
LOSS_SCALE = 2.0**16  # in fp16, where small gradients vanish; halved where large ones overflow

SHARED = (
    "optimizer", "batch_size", "token_learning_rate", "offset_learning_rate", "constant_steps",
)  # fmt: skip


@dataclass
class TuneConfig:
    """Values are ours, not the paper's.

    `trainable`: the predictions themselves, the encoder's two heads, or the whole encoder.
    `optimizer` of A and B; v* and the encoder's weights are AdamW's. `batch_size` noise levels per
    step, spread evenly over the timesteps. `token_learning_rate` is in units of a word's typical
    embedding entry, `encoder_learning_rate` is that of heads and encoder. After `constant_steps`
    the rates fall as one over the step, so that a run passes through the results of all shorter
    ones. `prompts` are taken in turn; None for "a picture of S*"
    with what else each picture shows, see setting.py.
    Raises DTEError for a value that means nothing.
    """

    num_steps: int = 12
    trainable: str = "predictions"
    optimizer: str = "muon"
    batch_size: int = 8
    token_learning_rate: float = 0.1
    offset_learning_rate: float = 0.06
    encoder_learning_rate: float = 1e-3
    constant_steps: int = 6
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("num_steps", self.num_steps, 0)
        check_one_of("trainable", self.trainable, TRAINABLE)
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_whole("batch_size", self.batch_size, 1)
        for name in ("token", "offset", "encoder"):
            name += "_learning_rate"
            check_number(name, getattr(self, name), 0)
        check_whole("constant_steps", self.constant_steps, 1)
        if isinstance(self.prompts, list):  # JSON knows lists only
            self.prompts = tuple(self.prompts)
        texts = isinstance(self.prompts, tuple) and all(isinstance(p, str) for p in self.prompts)
        if self.prompts is not None and (not texts or not self.prompts):
            raise DTEError(f"prompts are one or more texts in a tuple, not {self.prompts!r}.")

    @classmethod
    def of(cls, recommended: Recommended, **changes: Any) -> Self:
        """The settings that a backbone recommends, with changes."""
        return cls(**{name: getattr(recommended, name) for name in SHARED} | changes)

    def kept_in(self, recommended: Recommended) -> Recommended:
        """The settings of a backbone with these in their place, as a concept keeps them."""
        values = {name: getattr(self, name) for name in SHARED} | {"num_steps": self.num_steps}
        return replace(recommended, num_steps_without_encoder=self.num_steps, **values)

    def rate_at(self, step: int) -> float:
        """The factor of the rates at a step from 0."""
        return min(1.0, self.constant_steps / (step + 1))


@dataclass
class TuneResult:
    """The tuned prediction, one dict of losses per step, and whether it had to stop early."""

    prediction: EncoderPrediction
    losses: list[dict[str, float]]
    stopped_early: bool


@dataclass
class Parameters:
    """Groups of leaves for `MuonAdamW`, and the prediction that they make."""

    predict: Callable[[], EncoderPrediction]
    groups: list[dict]

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for group in self.groups for leaf in group["params"]]

    def optimizer(self) -> torch.optim.Optimizer:
        return MuonAdamW(self.groups, betas=(0.9, 0.99), weight_decay=0.0)

    def copies(self) -> list[Tensor]:
        return [leaf.detach().clone() for leaf in self.leaves]

    @torch.no_grad()
    def restore(self, copies: list[Tensor]) -> None:
        for leaf, value in zip(self.leaves, copies, strict=True):
            leaf.copy_(value)


def tune(
    backbone: Backbone, prompt_encoder: PromptEncoder, prediction: EncoderPrediction,
    images: Float[Tensor, "pictures 3 height width"], method: MethodConfig,
    config: TuneConfig | None = None, bank: Bank | None = None, seed: int = 0,
    callback: Callable[[dict], object] | None = None, progress: bool = True,
    encoder: Predictor | None = None,
    masks: Float[Tensor, "pictures 1 height width"] | None = None,
) -> TuneResult:  # fmt: skip
    """Fine-tune a prediction (batch 1) on pictures of the concept in [-1, 1].

    bank: negatives, see `regularise`. callback: called after each step with a dict of step, the
    losses, v_star and offsets (detached copies, as the losses found them). encoder: the one that
    predicted, from the same pictures and seed, where more than the predictions is tuned; a copy of
    it is. masks: from 0 to 1, where the thing is; elsewhere no error counts. The same seed gives
    the same result on the same machine.
    If the loss or a gradient stops being finite, tuning ends with a warning and returns the last
    state whose loss was finite. In fp16 a gradient may overflow because the loss was scaled: then
    the step is left out and the scale halved, until it is 1.

    Raises DTEError when heads or encoder shall be tuned and there is no encoder.
    """
    if (config := config or TuneConfig()).num_steps == 0:
        return TuneResult(_copy(prediction), [], False)
    tuned = _parameters(backbone, prompt_encoder, prediction, images, config, seed, encoder)
    optimizer, good, half = tuned.optimizer(), tuned.copies(), backbone.dtype == torch.float16
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(backbone.device.type, LOSS_SCALE, enabled=half)
    latents = backbone.encode_images(images).float()  # (n, C, h, w)
    matched, prompts = not config.prompts, config.prompts or picture_prompts(backbone, images)
    losses, finite, generator = [], True, stream(seed, "tuning")
    for step in tqdm(range(config.num_steps), desc="tuning", disable=not progress):
        batch = draw_batch(
            backbone, latents, prompts, step, config.batch_size, generator, masks, matched
        )
        optimizer.zero_grad()
        state = tuned.predict()
        with objective(backbone, prompt_encoder, state, batch, method, bank) as terms:
            scaler.scale(terms["loss"]).backward()
        scaler.unscale_(optimizer)
        if finite := bool(terms["loss"].isfinite()):
            good = tuned.copies()
        overflow = not _all_finite(leaf.grad for leaf in tuned.leaves if leaf.grad is not None)
        if not (finite := finite and not (overflow and scaler.get_scale() <= 1)):
            break
        losses.append({name: value.item() for name, value in terms.items()})
        seen = None if callback is None else _copy(state)  # before the step changes it
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * config.rate_at(step)
        if not overflow:
            optimizer.step()
        scaler.update()
        if callback is not None:
            callback({"step": step, **losses[-1], "v_star": seen.v_star, "offsets": seen.offsets})

    if not (finite := finite and _all_finite(tuned.leaves)):
        tuned.restore(good)
        _warn_of_stop(len(losses))
    with torch.no_grad():
        return TuneResult(_copy(tuned.predict()), losses, stopped_early=not finite)


def _warn_of_stop(step: int) -> None:
    warnings.warn(
        f"Tuning stopped at step {step}: the loss was no longer finite. The last good state is "
        "kept.",
        stacklevel=3,
    )


def draw_batch(
    backbone: Backbone,
    latents: Float[Tensor, "pictures channels height width"],
    prompts: tuple[str, ...],
    step: int,
    batch_size: int,
    generator: torch.Generator,
    masks: Float[Tensor, "pictures 1 rows columns"] | None = None,
    matched: bool = False,
) -> Batch:
    """What a step of tuning sees of latents: pictures and prompts in turn, noise, timesteps.

    matched: the prompts are those of the pictures, in their order.
    One timestep lies in each of `batch_size` equal bins of the T timesteps: far less variance than
    with independent ones. Which picture and which prompt meet which bin is drawn anew each step.
    """
    B, T = batch_size, len(backbone.alphas_cumprod)
    picture = in_turn(step, B, generator).to(latents.device) % len(latents)
    turns = in_turn(step, B, generator)
    prompt = [prompts[i % len(prompts)] for i in (picture if matched else turns).tolist()]
    t = (torch.arange(B) + torch.rand(B, generator=generator)) / B * T
    t = t.long().clamp(max=T - 1)  # in fp32 the sum may round up to B
    noise = torch.randn((B, *latents.shape[1:]), generator=generator)
    if masks is not None:
        masks = F.interpolate(masks, latents.shape[-2:], mode="area").to(latents.device)[picture]
    return Batch(latents[picture], noise.to(latents), t.to(latents.device), prompt, weights=masks)


def in_turn(step: int, batch_size: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """The numbers of the step's samples, counted through all steps, in random order."""
    return step * batch_size + torch.randperm(batch_size, generator=generator)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(x.isfinite().all() for x in tensors)


def _parameters(
    backbone: Backbone,
    prompt_encoder: PromptEncoder,
    prediction: EncoderPrediction,
    images: Float[Tensor, "pictures 3 height width"],
    config: TuneConfig,
    seed: int,
    encoder: Predictor | None,
) -> Parameters:
    """What `config.trainable` says is to be tuned."""
    if config.trainable == "predictions":
        return _free_prediction(prediction, config, prompt_encoder.table.typical_entry)
    if encoder is None:
        raise DTEError(f"Tuning the {config.trainable} needs the encoder.")
    encoder = trained_encoder(encoder, f"Tuning the {config.trainable}")
    features = encoder.static_features(backbone, images, seed, prompt_encoder)
    return _free_weights(encoder, features, config)


def _free_prediction(prediction: EncoderPrediction, config: TuneConfig, unit: float) -> Parameters:
    """v*, A and B as free fp32 parameters; unit: a word's typical entry.

    Where A is a whole matrix, B is the identity and stays so.
    """
    free = _copy(prediction)
    pairs = free.offsets.values()
    matrices = [m for a, b in pairs for m in ((a,) if is_whole(b) else (a, b))]
    for leaf in (free.v_star, *matrices):
        leaf.requires_grad_()
    muon = config.optimizer == "muon"
    groups = [
        {"params": [free.v_star], "lr": config.token_learning_rate * unit},
        {"params": matrices, "lr": config.offset_learning_rate, "muon": muon},
    ]
    return Parameters(lambda: free, groups)


def _free_weights(
    encoder: TuningEncoder, features: tuple[ImageFeatures, Tensor, Tensor], config: TuneConfig
) -> Parameters:
    """The weights of a copy of the encoder, which predicts from `static_features`."""
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    parts = [encoder.token_head, encoder.hypernetwork]
    if config.trainable == "encoder":
        parts.append(encoder.fusion)
    weights = [weight for part in parts for weight in part.parameters()]
    return Parameters(
        lambda: mean_prediction(encoder(*features), len(features[-1])),
        [{"params": weights, "lr": config.encoder_learning_rate}],
    )


def _copy(prediction: EncoderPrediction) -> EncoderPrediction:
    """A prediction of its own, in fp32 and detached."""

    def copied(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float().clone()

    offsets = {key: (copied(a), copied(b)) for key, (a, b) in prediction.offsets.items()}
    return EncoderPrediction(copied(prediction.v_star), offsets, copied(prediction.class_word))
