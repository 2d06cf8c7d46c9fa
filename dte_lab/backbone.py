"""The frozen text-to-image model that the encoder personalizes.

A backbone is a directory in the Stable Diffusion layout plus a CLIP image encoder:

    unet/ vae/ text_encoder/ tokenizer/ scheduler/ image_encoder/ feature_extractor/

`load_backbone("small")` is the model of the small world that ships with the package, "sd15" is
Stable Diffusion 1.5 from the hub, and any path to such a directory works as well. The image encoder
of a plain copy of Stable Diffusion 1.5, which has none, comes from the hub.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from dte_lab.backbone_parts import WEIGHTS, backbone_folder, check_parts, load_parts
from dte_lab.common.device import checked_device
from dte_lab.common.errors import DTEError
from dte_lab.common.files import check_path
from dte_lab.common.settings import check_one_of
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.recommended import SMALL_WORLD, STABLE_DIFFUSION, Recommended
from dte_lab.sd15 import random_parts

__all__ = [
    "DTYPES", "WEIGHTS", "Backbone", "add_noise", "backbone_folder", "load_backbone",
    "signal_variance", "stock_pipeline",
]  # fmt: skip

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Backbone:
    """The parts of a latent diffusion model, all frozen and in evaluation mode.

    `text_encoder`'s last hidden state conditions the UNet; with a projection (`has_projection`) its
    `text_embeds` share a space with `image_encoder`'s `image_embeds`.
    """

    name: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection
    image_processor: CLIPImageProcessor
    unet: UNet2DConditionModel
    vae: AutoencoderKL | PatchAutoencoder
    scheduler: DPMSolverMultistepScheduler
    offload: bool = False  # keep image encoder and autoencoder on the CPU while they are idle
    _users: Counter[nn.Module] = field(
        default_factory=Counter, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for module in self.modules:
            module.requires_grad_(False).eval()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.text_encoder, self.image_encoder, self.unet, self.vae

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device  # diffusers' own looks through all modules

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def has_projection(self) -> bool:
        return isinstance(self.text_encoder, CLIPTextModelWithProjection)

    @property
    def draws_small_world(self) -> bool:
        """Whether it is a model of the small world, of which training can draw pictures itself."""
        return isinstance(self.vae, PatchAutoencoder)

    @property
    def recommended(self) -> Recommended:
        """What is taken where nothing else is asked for."""
        return SMALL_WORLD if self.draws_small_world else STABLE_DIFFUSION

    @property
    def guidance_scale(self) -> float:
        """Of classifier-free guidance where none is asked for."""
        return self.recommended.guidance_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    @property
    def resolution(self) -> int:
        """Side of the square picture in pixels."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def alphas_cumprod(self) -> Float[Tensor, " T"]:
        """Signal variance of the forward process at each of the T training timesteps."""
        return self.scheduler.alphas_cumprod.to(self.device)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    def to(self, device: torch.device | str) -> "Backbone":
        """Move all parts. Raises DTEError for what is no device, and for one that is not there."""
        device = checked_device(device)
        for module in self.modules:
            idle = self.offload and module in (self.image_encoder, self.vae)
            module.to("cpu" if idle else device)
        return self

    def fetch(self, module: nn.Module) -> None:
        module.to(self.device)

    def put_away(self, module: nn.Module) -> None:
        module.to("cpu")

    @contextmanager
    def loaded(self, module: nn.Module) -> Iterator[nn.Module]:
        """`module`, an image encoder or autoencoder, on the device inside the block.

        Blocks may lie in each other: it leaves the device when the outermost ends.
        """
        if self.offload and not self._users[module]:
            self.fetch(module)
        self._users[module] += 1
        try:
            yield module
        finally:
            self._users[module] -= 1
            if self.offload and not self._users[module]:
                self.put_away(module)

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels h w"]:
        """Pictures in [-1, 1] -> scaled latents, the posterior's mode."""
        with self.loaded(self.vae) as vae:
            posterior = vae.encode(images.to(self.device, self.dtype)).latent_dist
        return posterior.mode() * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Scaled latents -> pictures, clipped to [-1, 1]."""
        latents = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        # One by one, where the decoder is what needs most memory.
        size = len(latents) if self.draws_small_world else 1
        with self.loaded(self.vae) as vae:
            pictures = torch.cat([vae.decode(z).sample for z in latents.split(size)])
        return pictures.clamp(-1, 1)

    def clip_pixels(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """Pictures in [-1, 1] -> the image encoder's input."""
        size = self.image_encoder.config.image_size
        pixels = (images.to(self.device, torch.float32) + 1) / 2
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = self.image_processor.image_mean, self.image_processor.image_std
        channels = zip(pixels.unbind(1), mean, std, strict=True)  # numbers: no copy to the device
        return torch.stack([(c - m) / s for c, m, s in channels], dim=1).to(self.dtype)


def signal_variance(
    backbone: Backbone,
    latents: Float[Tensor, "batch channels h w"],
    timesteps: Int[Tensor, " batch"],
) -> Float[Tensor, "batch 1 1 1"]:
    """abar_t, shaped to multiply latents."""
    return backbone.alphas_cumprod[timesteps].to(latents)[:, None, None, None]


def add_noise(
    backbone: Backbone,
    latents: Float[Tensor, "batch channels h w"],
    noise: Float[Tensor, "batch channels h w"],
    timesteps: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channels h w"]:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
    alpha = signal_variance(backbone, latents, timesteps)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """One of DTYPES, or what is called so. Raises DTEError for any other."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    check_one_of("dtype", dtype, tuple(DTYPES))
    return DTYPES[dtype]


def load_backbone(
    name: str | Path = "small",
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype | str | None = None,
    random: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    gradient_checkpointing: bool = False,
    offload: bool = False,
) -> Backbone:
    """Load "small", "sd15" or a directory in the Stable Diffusion layout; safetensors only.

    device: as `checked_device` takes it. dtype: one of DTYPES or its name, by default half
    precision on CUDA, except for "small", and float32 elsewhere.
    random: "sd15" with random weights, at full size, for measurements; downloads nothing.
    revision: commit of the hub's Stable Diffusion 1.5, by default a fixed one. local_files_only:
    use the hub's cache alone, as the environment variable HF_HUB_OFFLINE=1 does everywhere.
    gradient_checkpointing: the UNet computes its activations anew in the backward pass, for less
    memory and about a third more time. offload: see `Backbone`.

    Raises DTEError for a device or dtype that is none or not there, when `name` is neither, or when
    the directory lacks a part or a single tensor, is damaged, or holds a model of another kind
    (Stable Diffusion 2 without its image encoder, XL); OSError when something must come from the
    hub and cannot.
    """
    check_path("the backbone", name)  # concepts tell it
    device = checked_device(device)
    if dtype is None:
        dtype = "fp16" if device.startswith("cuda") and name != "small" else "fp32"
    dtype = checked_dtype(dtype)
    if random:
        if name != "sd15":
            raise DTEError(f"Only sd15 can be had with random weights, not {name}.")
        parts = random_parts(device, dtype)
    else:
        parts = load_parts(name, dtype, revision, local_files_only)
    check_parts(str(name), parts)
    backbone = Backbone(name=str(name), **parts, offload=offload)
    if gradient_checkpointing:
        backbone.unet.enable_gradient_checkpointing()
    if device.startswith("cpu"):  # where 3x3 convolutions become almost twice as fast
        for module in (backbone.unet, backbone.vae):
            module.to(memory_format=torch.channels_last)
    return backbone.to(device)


def new_scheduler(scheduler: DPMSolverMultistepScheduler) -> DPMSolverMultistepScheduler:
    """One like it, which remembers no sampling yet.

    With steps_offset 1: StableDiffusionPipeline insists, and warns before it sets it itself.
    """
    return type(scheduler).from_config(scheduler.config, steps_offset=1)


def stock_pipeline(
    vae: AutoencoderKL | PatchAutoencoder,
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DPMSolverMultistepScheduler,
) -> StableDiffusionPipeline:
    """diffusers' StableDiffusionPipeline around these parts, without a bar; nothing is copied."""
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, new_scheduler(scheduler), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
