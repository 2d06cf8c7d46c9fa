"""One step of the encoder's pre-training, for both of its trainers.

Features of the concept picture and of a noisy latent -> v*, A, B -> the objective on a target
picture of the same concept. In the paper both pictures are one; a dataset may also give another
scene of the concept as the target, with its caption ("ours").

A trainer draws the random numbers (`Noise`), calls `make_batch` and then

    with training_step(encoder, frozen, batch) as (losses, prediction):
        losses["loss"].backward()

`pretrain` does so in one or more processes, for any backbone and any pictures; `small_world` on a
GPU that replays a step as one CUDA graph. They stay two loops: a step that waits for other
processes, a DataLoader or a tokenizer cannot be captured, and the shipped weights come from the
captured one, with Muon. What a step is, its schedule, average, checkpoint and log are shared.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed

from dte_lab.backbone import Backbone, add_noise
from dte_lab.encoder import EncoderPrediction, TuningEncoder
from dte_lab.features import ImageFeatures
from dte_lab.objective import Batch, objective
from dte_lab.tokens import PromptEncoder


class Noise(NamedTuple):
    """The random numbers of a step, for its targets and, `own`, for its concept pictures.

    shared: where the features see the noisy target at the loss's timestep, as in the paper;
    elsewhere the noisy concept picture at its own, which is what `personalize` does.
    """

    noise: Float[Tensor, "batch channels height width"]
    timesteps: Int[Tensor, " batch"]
    own_noise: Float[Tensor, "batch channels height width"]
    own_timesteps: Int[Tensor, " batch"]
    shared: Bool[Tensor, " batch"]


class Processes(NamedTuple):
    """This one of the `count` processes that share a batch, and each other's v* as negatives."""

    rank: int = 0
    count: int = 1

    def share(self, x: Tensor) -> Tensor:
        """This process's part (B / count, ...) of what was drawn for all, (B, ...)."""
        return x.chunk(self.count)[self.rank]

    def gather(self, x: Tensor) -> Tensor:
        """The parts of all processes, in their order; the gradients of all come back to each."""
        return x if self.count == 1 else SeenByAll.apply(x, self)

    def others(self, gathered: Tensor) -> Tensor:
        """What `gather` returned without this process's own part."""
        parts = gathered.chunk(self.count)
        return torch.cat([gathered[:0], *parts[: self.rank], *parts[self.rank + 1 :]])


ALONE = Processes()


class SeenByAll(torch.autograd.Function):
    """`Processes.gather`, which sums the gradients that accelerate's `gather` drops.

    torch's own, torch.distributed.nn.functional.all_gather, is deprecated, and what is to take its
    place has another private name in each version from 2.6 to 2.13.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes, x = processes, x.contiguous()
        parts = [torch.empty_like(x) for _ in range(processes.count)]
        distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return ctx.processes.share(gradient), None


@dataclass(kw_only=True)
class EncoderBatch(Batch):
    """What a step sees: the `Batch` of its loss, and what the encoder's features come from.

    images: concept pictures in [-1, 1], or what CLIP sees in them. feature_latents: noisy, at
    feature_timesteps.
    """

    images: Float[Tensor, "batch 3 pixels pixels"] | ImageFeatures
    feature_latents: Float[Tensor, "batch channels height width"]
    feature_timesteps: Int[Tensor, " batch"]


@dataclass
class Frozen:
    """What training leaves as it is. feature_prompt: (1, L, d), under which features are taken."""

    backbone: Backbone
    prompt_encoder: PromptEncoder
    feature_prompt: Float[Tensor, "1 tokens dim"]

    @classmethod
    def of(
        cls, backbone: Backbone, encoder: TuningEncoder, prompt_encoder: PromptEncoder | None = None
    ) -> "Frozen":
        prompt_encoder = prompt_encoder or PromptEncoder(backbone)
        prompt = prompt_encoder.plain([encoder.settings.feature_prompt])
        return cls(backbone, prompt_encoder, prompt)


def make_batch(
    backbone: Backbone, pictures: dict[str, Any], draw: Callable[[Tensor], Noise]
) -> EncoderBatch:
    """The step's batch.

    pictures: prompt and concept as in `Batch`, and what `encode_pictures` takes.
    draw: gives the `Noise` for latents (2B, C, h, w), those of the targets first.
    """
    both = encode_pictures(backbone, pictures)
    latents, own_latents = both.chunk(2)
    noise, t, own_noise, own_t, shared = draw(both)
    feature_latents = torch.where(
        shared[:, None, None, None],
        add_noise(backbone, latents, noise, t),
        add_noise(backbone, own_latents, own_noise, own_t),
    )
    if "image" in pictures:
        images = pictures["image"]
    else:
        clip = (pictures[name].to(backbone.device) for name in ("patches", "embeds"))
        images = ImageFeatures(*(x.float() for x in clip))
    return EncoderBatch(
        images=images,
        prompts=pictures["prompt"],
        concepts=pictures["concept"].to(backbone.device),
        latents=latents,
        noise=noise,
        timesteps=t,
        feature_latents=feature_latents,
        feature_timesteps=torch.where(shared, t, own_t),
    )


def encode_pictures(
    backbone: Backbone, pictures: dict[str, Any]
) -> Float[Tensor, "both channels height width"]:
    """Latents (2B, C, h, w) of the targets and then of the concept pictures.

    pictures: image (B, 3, H, W) in [-1, 1] and, where it is another picture, target; or, of a
    cache, latents (B, 2 or 1, C, h, w), the target's first, patches and embeds (`ImageFeatures`).
    """
    if "latents" in pictures:
        latents = pictures["latents"].to(backbone.device).float().transpose(0, 1)
        return latents.expand(2, *latents.shape[1:]).flatten(0, 1)
    if "target" in pictures:
        pixels = torch.cat([pictures["target"], pictures["image"]])
        return backbone.encode_images(pixels).float()
    # Once: more than half of a step's arithmetic would go into the second time.
    return backbone.encode_images(pictures["image"]).float().repeat(2, 1, 1, 1)


def encoder_inputs(
    encoder: TuningEncoder, frozen: Frozen, batch: EncoderBatch
) -> tuple[ImageFeatures, Float[Tensor, "batch features grid grid"], Int[Tensor, " batch"]]:
    """What the encoder predicts from: the three arguments of its `forward`."""
    unet = encoder.unet_features(
        frozen.backbone, batch.feature_latents, batch.feature_timesteps, frozen.feature_prompt
    )
    clip = batch.images
    if not isinstance(clip, ImageFeatures):
        clip = encoder.image_features(frozen.backbone, clip)
    return clip, unet, batch.feature_timesteps


@contextmanager
def training_step(
    encoder: TuningEncoder,
    frozen: Frozen,
    batch: EncoderBatch,
    forward: Callable[..., EncoderPrediction] | None = None,
    processes: Processes = ALONE,
    autocast: AbstractContextManager | None = None,
    enqueue: bool = True,
) -> Iterator[tuple[dict[str, Tensor], EncoderPrediction]]:
    """The losses of `objective` and the prediction; call `backward` within the block.

    forward: the encoder as several processes share it, by default itself. autocast: for the encoder
    alone; what is frozen is in half precision already, and autocast would keep its norms, and their
    activations, in fp32. On leaving the block the v* of the batch enter the bank of negatives,
    unless `enqueue` is false.
    """
    inputs = encoder_inputs(encoder, frozen, batch)
    with autocast or nullcontext():
        prediction = (forward or encoder)(*inputs)
    v_star, concepts = (processes.gather(x) for x in (prediction.v_star, batch.concepts))
    bank = (
        torch.cat([encoder.bank, processes.others(v_star)]),
        torch.cat([encoder.bank_concepts, processes.others(concepts)]),
    )
    with objective(
        frozen.backbone, frozen.prompt_encoder, prediction, batch, encoder.method, bank
    ) as losses:
        yield losses, prediction
    if enqueue:
        encoder.enqueue(v_star, concepts)
