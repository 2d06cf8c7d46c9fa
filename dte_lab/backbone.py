"""The frozen text-to-image model that the encoder personalizes.

A backbone is a directory in the Stable Diffusion layout plus a CLIP image encoder:

    unet/ vae/ text_encoder/ tokenizer/ scheduler/ image_encoder/ feature_extractor/

`load_backbone("small")` is the model of the small world that ships with the package, "sd15" is
Stable Diffusion 1.5 from the hub, and any path to such a directory works as well.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

WEIGHTS = Path(__file__).parent / "weights"

# SD 1.5's text tower is the one of openai/clip-vit-large-patch14, which has the projection and the
# image tower too: both come from there.
CLIP_L14 = "openai/clip-vit-large-patch14"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


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
    vae: torch.nn.Module
    scheduler: DPMSolverMultistepScheduler

    def __post_init__(self):
        for module in self.modules:
            module.requires_grad_(False).eval()

    @property
    def modules(self):
        return self.text_encoder, self.image_encoder, self.unet, self.vae

    @property
    def device(self):
        return self.unet.device

    @property
    def dtype(self):
        return self.unet.dtype

    @property
    def has_projection(self):
        return isinstance(self.text_encoder, CLIPTextModelWithProjection)

    @property
    def latent_shape(self):
        """(channels, height, width) of a latent."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    @property
    def resolution(self):
        """Side of the square picture in pixels."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def alphas_cumprod(self):
        """Signal variance of the forward process at each of the training timesteps, (T,)."""
        return self.scheduler.alphas_cumprod.to(self.device)

    @property
    def prediction_type(self):
        return self.scheduler.config.prediction_type

    def to(self, device=None, dtype=None):
        given = {k: v for k, v in {"device": device, "dtype": dtype}.items() if v is not None}
        for module in self.modules:
            module.to(**given)
        return self

    @torch.no_grad()
    def encode_images(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the posterior's mode."""
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return posterior.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents):
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), clipped to [-1, 1]."""
        latents = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.clamp(-1, 1)

    def clip_pixels(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> the image encoder's input (B, 3, S, S)."""
        size = self.image_encoder.config.image_size
        pixels = (images.to(self.device, torch.float32) + 1) / 2
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean = pixels.new_tensor(self.image_processor.image_mean)[:, None, None]
        std = pixels.new_tensor(self.image_processor.image_std)[:, None, None]
        return ((pixels - mean) / std).to(self.dtype)


def signal_variance(backbone, latents, timesteps):
    """abar_t of timesteps (B,), shaped to multiply latents (B, C, h, w): (B, 1, 1, 1)."""
    return backbone.alphas_cumprod[timesteps].to(latents)[:, None, None, None]


def add_noise(backbone, latents, noise, timesteps):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for latents (B, C, h, w), timesteps (B,)."""
    alpha = signal_variance(backbone, latents, timesteps)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def load_backbone(name="small", device="cpu", dtype=torch.float32):
    """Load "small", "sd15" or a directory in the Stable Diffusion layout.

    Raises ValueError when `name` is neither, or when the directory lacks a part.
    """
    if name == "sd15":  # needs the network, or the hub's cache
        source = {"text_encoder": (CLIP_L14, None), "tokenizer": (SD15, "tokenizer")}
        source |= {part: (SD15, part) for part in ("unet", "vae", "scheduler")}
        source |= {part: (CLIP_L14, None) for part in ("image_encoder", "feature_extractor")}
        text_class, vae_class = CLIPTextModelWithProjection, AutoencoderKL
    else:
        root = WEIGHTS / "small" if name == "small" else Path(name)
        parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder"]
        parts.append("feature_extractor")
        if not root.is_dir():
            raise ValueError(f"No backbone at {root}: give 'small', 'sd15' or a model directory.")
        if missing := [part for part in parts if not (root / part).is_dir()]:
            raise ValueError(f"The backbone at {root} lacks the folder(s) {', '.join(missing)}.")
        source = {part: (str(root / part), None) for part in parts}
        text_class, vae_class = _text_class(root), _vae_class(root)

    def load(cls, part, **kwargs):
        path, subfolder = source[part]
        return cls.from_pretrained(path, subfolder=subfolder or "", **kwargs)

    return Backbone(
        name=str(name),
        tokenizer=load(CLIPTokenizer, "tokenizer"),
        text_encoder=load(text_class, "text_encoder", dtype=dtype),
        image_encoder=load(CLIPVisionModelWithProjection, "image_encoder", dtype=dtype),
        image_processor=load(CLIPImageProcessor, "feature_extractor"),
        unet=load(UNet2DConditionModel, "unet", torch_dtype=dtype),
        vae=load(vae_class, "vae", torch_dtype=dtype),
        scheduler=load(DPMSolverMultistepScheduler, "scheduler"),
    ).to(device)


def _text_class(root):
    config = json.loads((root / "text_encoder" / "config.json").read_text())
    projects = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
    return CLIPTextModelWithProjection if projects else CLIPTextModel


def _vae_class(root):
    name = json.loads((root / "vae" / "config.json").read_text()).get("_class_name")
    if name == "PatchAutoencoder":
        from dte_lab.world.autoencoder import PatchAutoencoder

        return PatchAutoencoder
    if name == "AutoencoderKL":
        return AutoencoderKL
    raise ValueError(f"The backbone at {root} has an autoencoder of unknown class {name}.")
