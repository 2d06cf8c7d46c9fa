"""The frozen text-to-image model that the encoder personalizes.

A backbone is a directory in the Stable Diffusion layout plus a CLIP image encoder:

    unet/ vae/ text_encoder/ tokenizer/ scheduler/ image_encoder/ feature_extractor/

`load_backbone("small")` is the model of the small world that ships with the package, "sd15" is
Stable Diffusion 1.5 from the hub, and any path to such a directory works as well. The image encoder
of a plain copy of Stable Diffusion 1.5, which has none, comes from the hub.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from dte_lab.sd15 import (
    CLIP_FILES,
    CLIP_L14,
    CLIP_L14_REVISION,
    SD15,
    SD15_REVISION,
    TEXT,
    fetch,
    random_parts,
    sd15_files,
)

WEIGHTS = Path(__file__).parent / "weights"


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
    offload: bool = False  # keep image encoder and autoencoder on the CPU while they are idle

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

    def to(self, device):
        for module in self.modules:
            idle = self.offload and module in (self.image_encoder, self.vae)
            module.to("cpu" if idle else device)
        return self

    @contextmanager
    def loaded(self, module):
        """`module`, an image encoder or autoencoder, on the device inside the block."""
        if self.offload:
            module.to(self.device)
        try:
            yield module
        finally:
            if self.offload:
                module.to("cpu")

    @torch.no_grad()
    def encode_images(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the posterior's mode."""
        with self.loaded(self.vae) as vae:
            posterior = vae.encode(images.to(self.device, self.dtype)).latent_dist
        return posterior.mode() * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents):
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), clipped to [-1, 1]."""
        latents = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        with self.loaded(self.vae) as vae:
            return vae.decode(latents).sample.clamp(-1, 1)

    def clip_pixels(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> the image encoder's input (B, 3, S, S)."""
        size = self.image_encoder.config.image_size
        pixels = (images.to(self.device, torch.float32) + 1) / 2
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = self.image_processor.image_mean, self.image_processor.image_std
        channels = zip(pixels.unbind(1), mean, std, strict=True)  # numbers: no copy to the device
        return torch.stack([(c - m) / s for c, m, s in channels], dim=1).to(self.dtype)


def backbone_folder(name):
    """Where a backbone that is not "sd15" lies, and its encoders: "small", or a path."""
    return WEIGHTS / "small" if name == "small" else Path(name)


def signal_variance(backbone, latents, timesteps):
    """abar_t of timesteps (B,), shaped to multiply latents (B, C, h, w): (B, 1, 1, 1)."""
    return backbone.alphas_cumprod[timesteps].to(latents)[:, None, None, None]


def add_noise(backbone, latents, noise, timesteps):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for latents (B, C, h, w), timesteps (B,)."""
    alpha = signal_variance(backbone, latents, timesteps)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def load_backbone(
    name="small", device="cpu", dtype=None, random=False, revision=None, local_files_only=False,
    gradient_checkpointing=False, offload=False,
):  # fmt: skip
    """Load "small", "sd15" or a directory in the Stable Diffusion layout; safetensors only.

    dtype: by default half precision on CUDA, except for "small", and float32 elsewhere.
    random: "sd15" with random weights, at full size, for measurements; downloads nothing.
    revision: commit of the hub's Stable Diffusion 1.5, by default a fixed one. local_files_only:
    use the hub's cache alone, as the environment variable HF_HUB_OFFLINE=1 does everywhere.
    gradient_checkpointing: the UNet computes its activations anew in the backward pass, for less
    memory and about a third more time. offload: see `Backbone`.

    Raises ValueError when `name` is neither, or when the directory lacks a part or holds a model of
    another kind (Stable Diffusion 2 without its image encoder, XL); OSError when something must
    come from the hub and cannot.
    """
    if dtype is None:
        half = torch.device(device).type == "cuda" and name != "small"
        dtype = torch.float16 if half else torch.float32
    if random:
        if name != "sd15":
            raise ValueError(f"Only sd15 can be had with random weights, not {name}.")
        parts = random_parts(device, dtype)
    else:
        parts = _load_parts(name, dtype, revision, local_files_only)
    _check_parts(name, parts)
    backbone = Backbone(name=str(name), **parts, offload=offload)
    if isinstance(backbone.vae, AutoencoderKL):
        backbone.vae.enable_slicing()  # picture by picture: the decoder is what needs most memory
    if gradient_checkpointing:
        backbone.unet.enable_gradient_checkpointing()
    if torch.device(device).type == "cpu":  # where 3x3 convolutions become almost twice as fast
        for module in (backbone.unet, backbone.vae):
            module.to(memory_format=torch.channels_last)
    return backbone.to(device)


def _load_parts(name, dtype, revision, local_files_only):
    """The parts of a `Backbone` by name, on the CPU."""
    half = dtype != torch.float32
    if name == "sd15":
        files, revision = sd15_files(half), revision or SD15_REVISION
        root = fetch(SD15, files, revision, local_files_only)
        vae_class, variant = AutoencoderKL, "fp16" if half else None
    else:
        root, variant = backbone_folder(name), None
        check_folders(root)
        vae_class = _vae_class(root)

    image_root, processor_root, text_root = (
        root / part for part in ("image_encoder", "feature_extractor", "text_encoder")
    )
    text_class = CLIPTextModelWithProjection
    if projection := name == "sd15" or not image_root.is_dir():
        clip = fetch(CLIP_L14, CLIP_FILES, CLIP_L14_REVISION, local_files_only)
        image_root = processor_root = clip
        text_root = clip if name == "sd15" else text_root
    elif "CLIPTextModelWithProjection" not in _config(text_root).get("architectures", []):
        text_class = CLIPTextModel
    weights = {"use_safetensors": True}
    text_encoder = text_class.from_pretrained(text_root, dtype=dtype, **weights)
    if projection and text_root != clip:  # a plain copy of Stable Diffusion has no projection
        whole = CLIPTextModelWithProjection.from_pretrained(clip, dtype=dtype, **weights)
        text_encoder.text_projection = whole.text_projection
    weights["torch_dtype"] = dtype
    return {
        "text_encoder": text_encoder,
        "tokenizer": CLIPTokenizer.from_pretrained(root / "tokenizer"),
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(
            image_root, dtype=dtype, use_safetensors=True
        ),
        "image_processor": CLIPImageProcessor.from_pretrained(processor_root),
        "unet": UNet2DConditionModel.from_pretrained(root / "unet", variant=variant, **weights),
        "vae": vae_class.from_pretrained(root / "vae", variant=variant, **weights),
        "scheduler": DPMSolverMultistepScheduler.from_pretrained(root / "scheduler"),
    }


def check_folders(root):
    """Raise ValueError when `root` holds no backbone that `load_backbone` can load."""
    if not root.is_dir():
        raise ValueError(
            f"No backbone at {root}: give small, sd15 or the folder of a model like Stable "
            "Diffusion 1.5; Stable Diffusion XL and its successors are not supported."
        )
    if (root / "text_encoder_2").exists():
        raise ValueError(
            f"The model at {root} has two text encoders, as Stable Diffusion XL has: only models "
            "like Stable Diffusion 1.5, with one, are supported."
        )
    parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if (root / "image_encoder").is_dir():
        parts.append("feature_extractor")
    if missing := [part for part in parts if not (root / part).is_dir()]:
        raise ValueError(f"The backbone at {root} lacks the folder(s) {', '.join(missing)}.")
    if not (root / "image_encoder").is_dir():
        width = _config(root / "text_encoder")["hidden_size"]
        if width != TEXT["hidden_size"]:
            raise ValueError(
                f"The model at {root} has no image_encoder, and text states of width {width} fit "
                "no CLIP that can be fetched for it (Stable Diffusion 2 has 1024): use Stable "
                "Diffusion 1.5, or add the folders image_encoder and feature_extractor of its CLIP."
            )


def _check_parts(name, parts):
    """Raise ValueError where the parts do not fit together."""
    text, image, unet = (parts[p].config for p in ("text_encoder", "image_encoder", "unet"))
    if (size := len(parts["tokenizer"])) != text.vocab_size:  # an empty folder gives a tiny one
        raise ValueError(
            f"The tokenizer of the backbone {name} has {size} tokens and its text encoder "
            f"{text.vocab_size}: it is damaged or of another model."
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(
            f"The UNet of the backbone {name} reads text of width {unet.cross_attention_dim}, "
            f"but its text encoder gives {text.hidden_size}."
        )
    projects = isinstance(parts["text_encoder"], CLIPTextModelWithProjection)
    if projects and text.projection_dim != image.projection_dim:
        raise ValueError(f"Text and image encoder of the backbone {name} are not of one CLIP.")


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _vae_class(root):
    name = _config(root / "vae").get("_class_name")
    if name == "PatchAutoencoder":
        from dte_lab.patch_autoencoder import PatchAutoencoder

        return PatchAutoencoder
    if name == "AutoencoderKL":
        return AutoencoderKL
    raise ValueError(f"The backbone at {root} has an autoencoder of unknown class {name}.")


def stock_pipeline(vae, text_encoder, tokenizer, unet, scheduler):
    """diffusers' StableDiffusionPipeline around these parts, without a bar; nothing is copied."""
    # It insists on steps_offset 1, and warns before it sets it itself.
    scheduler = type(scheduler).from_config(scheduler.config, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
