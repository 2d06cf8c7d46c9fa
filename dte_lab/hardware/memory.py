"""Peak GPU memory and arithmetic of tuning, pre-training and sampling, predicted on any machine.

The real steps run on fake tensors, which have shapes and no data, with the model at its full size
and no weights; every storage that comes and goes and every product of matrices is counted. No
formula stands for a step, so what changes
a step changes its prediction. What a trace cannot see is not in it: CUDA's own context, cuDNN's
workspaces and gaps in the allocator's blocks.
"""

from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dte_lab import placeholder_token
from dte_lab.backbone import DTYPES, Backbone
from dte_lab.common.errors import DTEError
from dte_lab.common.settings import check_number
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.dual_path import dual_path
from dte_lab.encoder import EncoderPrediction, TuningEncoder, encoder_dimensions
from dte_lab.hardware.trace import TracedMemory
from dte_lab.memory_needs import WORKLOADS, Setting
from dte_lab.recommended import STABLE_DIFFUSION
from dte_lab.sd15 import random_parts
from dte_lab.tokens import PromptEncoder
from dte_lab.training.batches import prepare
from dte_lab.training.config import PretrainConfig
from dte_lab.training.optimizer import build_optimizer
from dte_lab.training.step import Frozen, training_step
from dte_lab.tuning import TuneConfig, tune

NUM_INFERENCE_STEPS = 25
ACHIEVED = {"T4": 10e12, "L4": 30e12, "A100": 100e12}  # FLOP/s in half precision: assumed


class Need(NamedTuple):
    """What a part takes: peak bytes of all tensors, and the arithmetic of a step or a picture.

    flops: two for a product and its sum, of matrix products and convolutions, of one step of tuning
    or pre-training without the look at the picture before, or of one picture in 25 steps.
    """

    bytes: int
    flops: int


class CountedBackbone(Backbone):
    """With `offload`, image encoder and autoencoder count in `memory` only while they are in use.

    Nothing is moved: fake tensors all lie on one device.
    """

    memory: TracedMemory

    def fetch(self, module: nn.Module) -> None:
        self.memory.add(_bytes_of(module))

    def put_away(self, module: nn.Module) -> None:
        self.memory.add(-_bytes_of(module))


def _bytes_of(module: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in module.parameters())


def predict(setting: Setting, parts: tuple[str, ...] = WORKLOADS) -> dict[str, int]:
    """Peak bytes of each part. Raises DTEError for a backbone other than sd15."""
    return {name: need.bytes for name, need in needs(setting, parts).items()}


def needs(setting: Setting, parts: tuple[str, ...] = WORKLOADS) -> dict[str, Need]:
    """What each part takes.

    Raises DTEError for a backbone other than sd15, and a resolution or rank that it cannot have.
    """
    if setting.backbone != "sd15":
        raise DTEError(f"Memory is predicted for sd15 alone, not for {setting.backbone}.")
    settings = EncoderConfig.of(STABLE_DIFFUSION, rank=setting.rank)
    peaks, flops, memory = {}, {}, TracedMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        backbone = _sd15(setting, memory)
        if setting.gradient_checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        encode = PromptEncoder(backbone)
        dimensions = encoder_dimensions(backbone, encode.table, settings)
        encoder = TuningEncoder(**dimensions, settings=asdict(settings))
        encoder.bind(backbone, encode.table)
        size = backbone.resolution
        pictures = torch.zeros(setting.batch, 3, size, size)
        prediction = None
        if "pre-training" in parts:  # offload would not help: each step needs every part
            with memory.measured(peaks, "pre-training"):
                flops["pre-training"] = _pretrain(memory, backbone, encode, encoder, pictures)
        if setting.offload:
            backbone.offload = True
            for idle in (backbone.image_encoder, backbone.vae):
                backbone.put_away(idle)
        if "tuning" in parts:
            with memory.measured(peaks, "tuning"):
                prediction = encoder.predict(backbone, pictures[:1], 0, encode)
                flops["tuning"] = _tune(memory, backbone, encode, encoder, prediction, pictures)
        if "sampling" in parts:
            prediction = prediction or encoder.predict(backbone, pictures[:1], 0, encode)
            with memory.measured(peaks, "sampling"), torch.no_grad():
                flops["sampling"] = _sample(
                    memory, backbone, encode, prediction, setting.batch, encoder.method
                )
    return {name: Need(peaks[name], flops[name]) for name in parts}


def _sd15(setting: Setting, memory: TracedMemory) -> CountedBackbone:
    parts = random_parts("cpu", DTYPES[setting.dtype], setting.resolution)
    backbone = CountedBackbone(name="sd15", **parts)
    backbone.memory = memory
    return backbone


def _tune(
    memory: TracedMemory, backbone: Backbone, encode: PromptEncoder, encoder: TuningEncoder,
    prediction: EncoderPrediction, pictures: Tensor,
) -> int:  # fmt: skip
    """One step; returns its FLOPs, without those of the picture's latent."""
    before = memory.flops
    tune(
        backbone, encode, prediction, pictures[:1], encoder.method,
        TuneConfig(num_steps=1, batch_size=len(pictures)),
        bank=(encoder.bank, encoder.bank_concepts), progress=False,
    )  # fmt: skip
    both = memory.flops - before
    backbone.encode_images(pictures[:1])
    return 2 * both + before - memory.flops


def _pretrain(
    memory: TracedMemory, backbone: Backbone, encode: PromptEncoder, encoder: TuningEncoder,
    pictures: Tensor,
) -> int:  # fmt: skip
    """A step after the first, when the optimizer has its state; returns its FLOPs."""
    config = PretrainConfig(batch_size=len(pictures))
    parameters = list(encoder.train().requires_grad_(True).parameters())
    average = [p.detach().clone() for p in parameters]  # EMA
    optimizer = build_optimizer(parameters, config.weight_decay)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    batch = {
        "image": pictures,
        "prompt": [f"a picture of {placeholder_token}"] * len(pictures),
        "concept": torch.arange(len(pictures)),
    }
    frozen, before = Frozen.of(backbone, encoder, encode), memory.flops
    prepared = prepare(backbone, batch, config, 0)
    # What pretrain's `train_step` does, without accelerate: its state is the process's, and would
    # be set to CPU for whoever trains on a GPU here.
    with training_step(encoder, frozen, prepared) as (losses, _):
        losses["loss"].backward()
    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    encoder.eval().requires_grad_(False)
    del average
    return memory.flops - before


def _sample(
    memory: TracedMemory, backbone: Backbone, encode: PromptEncoder, prediction: EncoderPrediction,
    batch: int, method: MethodConfig,
) -> int:  # fmt: skip
    """One denoising step with guidance, which doubles the batch, and the decoding.

    Returns the FLOPs of a picture.
    """
    prompts = [f"a picture of {placeholder_token}"] * batch
    soft, hard = encode(prompts, prediction.v_star), encode.hard(prompts, prediction.v_star)
    negative = encode.plain([""]).expand_as(soft)
    latents = torch.zeros(batch, *backbone.latent_shape, dtype=backbone.dtype)
    before = memory.flops
    with dual_path(
        backbone.unet, prediction.offsets, torch.cat([negative, hard]), method.alpha_blend,
        method.offsets_on, method.granularity,
    ):  # fmt: skip
        noise = backbone.unet(
            torch.cat([latents, latents]), torch.tensor(500), torch.cat([negative, soft])
        ).sample
    step = memory.flops - before
    backbone.decode_latents(noise.chunk(2)[1])
    return (memory.flops - before + (NUM_INFERENCE_STEPS - 1) * step) // batch


def check_card(card: float) -> None:
    """Raise DTEError for what is no number of GB."""
    check_number("card", card, above=0)


def advise(setting: Setting, card: float, peak: int) -> str:
    """What makes tuning fit a card of so many GB, in one sentence; 1 GB is kept free for CUDA.

    peak: the bytes that tuning takes with `setting`. Raises DTEError as `check_card` does.
    """
    check_card(card)
    room = (card - 1) * 1e9
    tried = {str(setting): peak}
    if peak <= room:
        return f"Tuning fits a card of {card:g} GB as it is."
    for changes in (
        {"offload": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "offload": True},
        {"gradient_checkpointing": True, "offload": True, "batch": 1},
    ):
        choice = replace(setting, **changes)
        if str(choice) in tried:
            continue
        tried[str(choice)] = peak = predict(choice, ("tuning",))["tuning"]
        if peak <= room:
            options = [f"--{k.replace('_', '-')}" for k, v in changes.items() if v is True]
            if choice.batch != setting.batch:
                options.append("--batch-size 1")
            return (
                f"Tuning fits a card of {card:g} GB with {' '.join(options)}: {peak / 1e9:.2f} GB."
            )
    least = min(tried.values()) / 1e9
    return f"Tuning does not fit a card of {card:g} GB: it needs {least:.2f} GB at least."
