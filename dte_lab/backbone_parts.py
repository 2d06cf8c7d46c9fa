"""The parts of a backbone from its folder or the hub, whole and fitting together, or not at all.

Nothing but safetensors is read, and a part that lacks a tensor is refused (common/weights.py).
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import COPY_AGAIN, read_settings, told_of
from dte_lab.common.settings import check_number, check_one_of, check_whole
from dte_lab.common.weights import DAMAGE, load_weights, read_config
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.sd15 import (
    CLIP_FILES,
    CLIP_L14,
    CLIP_L14_REVISION,
    SD15,
    SD15_REVISION,
    TEXT,
    fetch,
    sd15_files,
    tell_licence,
)

WEIGHTS = Path(__file__).parent / "weights"
AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "PatchAutoencoder": PatchAutoencoder}
ABLATIONS = ("none",)  # encoders shipped for "small", by their regulariser


def backbone_folder(name: str | Path) -> Path:
    """Where a backbone that is not "sd15" lies, and its encoders: "small", or a path."""
    return WEIGHTS / "small" if name == "small" else Path(name)


def encoder_folder(name_or_path: str | Path) -> Path:
    """Where an encoder lies: "small", an ablation of it such as "small/none", or a directory."""
    path = Path(name_or_path)
    if path == Path("small"):
        return WEIGHTS / "small" / "encoder"
    if path.parent == Path("small") and path.name in ABLATIONS:
        return WEIGHTS / "small" / "ablations" / path.name
    return path


def load_parts(
    name: str | Path, dtype: torch.dtype, revision: str | None, local_files_only: bool
) -> dict[str, Any]:
    """The parts of a `Backbone` by the names of its fields, on the CPU.

    Raises DTEError for a folder that holds no backbone, or a damaged one.
    """
    variant = None
    if name == "sd15":
        tell_licence()
        half = dtype != torch.float32
        root = fetch(SD15, sd15_files(half), revision or SD15_REVISION, local_files_only)
        variant = "fp16" if half else None
    else:
        root = backbone_folder(name)
        check_folders(root)

    text_root, image_root = root / "text_encoder", root / "image_encoder"
    processor_root, clip = root / "feature_extractor", None
    if name == "sd15" or not image_root.is_dir():
        clip = fetch(CLIP_L14, CLIP_FILES, CLIP_L14_REVISION, local_files_only)
        image_root = processor_root = clip
        text_root = clip if name == "sd15" else text_root
    autoencoder = AUTOENCODERS[read_config(root / "vae")["_class_name"]]
    return {
        "text_encoder": _text_encoder(text_root, clip, dtype),
        "tokenizer": _small_part(CLIPTokenizer, root / "tokenizer"),
        "image_encoder": load_weights(
            CLIPVisionModelWithProjection.from_pretrained,
            image_root,
            strangers=clip is not None,
            dtype=dtype,
        ),
        "image_processor": _small_part(CLIPImageProcessor, processor_root),
        "unet": load_weights(
            UNet2DConditionModel.from_pretrained, root / "unet", variant=variant, torch_dtype=dtype
        ),
        "vae": load_weights(
            autoencoder.from_pretrained, root / "vae", variant=variant, torch_dtype=dtype
        ),
        "scheduler": _scheduler(root / "scheduler"),
    }


def _text_encoder(
    folder: Path, clip: Path | None, dtype: torch.dtype
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """With a projection where the folder has one; a plain copy of SD 1.5 takes that of `clip`."""
    load = CLIPTextModelWithProjection.from_pretrained
    if clip is not None:
        whole = load_weights(load, clip, strangers=True, dtype=dtype)
        if folder == clip:
            return whole
        encoder = load_weights(load, folder, absent=("text_projection.weight",), dtype=dtype)
        encoder.text_projection = whole.text_projection
        return encoder
    projects = "CLIPTextModelWithProjection" in str(read_config(folder).get("architectures"))
    return load_weights(load if projects else CLIPTextModel.from_pretrained, folder, dtype=dtype)


def _small_part(kind: type, folder: Path) -> Any:
    """A tokenizer, image processor or scheduler."""
    try:
        return kind.from_pretrained(folder)
    except DAMAGE as error:
        raise DTEError(f"{folder} cannot be loaded ({reason_of(error)}): {COPY_AGAIN}.") from error


def _scheduler(folder: Path) -> DPMSolverMultistepScheduler:
    path = folder / "scheduler_config.json"
    with told_of(path):
        check_whole(
            "num_train_timesteps", read_settings(path).get("num_train_timesteps", 1000), 2, 10**5
        )
    return _small_part(DPMSolverMultistepScheduler, folder)


def check_folders(root: Path) -> None:
    """Raise DTEError when `root` holds no backbone that `load_backbone` can load."""
    if not root.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(root)):
            raise DTEError(
                f"There is no folder {root}; if that is a repository of the hub, fetch it with "
                f"hf download {root} --local-dir FOLDER, and give the folder."
            )
        raise DTEError(
            f"No backbone at {root}: give small, sd15 or the folder of a model like Stable "
            "Diffusion 1.5; Stable Diffusion XL and its successors are not supported."
        )
    if (root / "text_encoder_2").exists():
        raise DTEError(
            f"The model at {root} has two text encoders, as Stable Diffusion XL has: only models "
            "like Stable Diffusion 1.5, with one, are supported."
        )
    parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if (root / "image_encoder").is_dir():
        parts.append("feature_extractor")
    if missing := [part for part in parts if not (root / part).is_dir()]:
        raise DTEError(f"The backbone at {root} lacks the folder(s) {', '.join(missing)}.")
    if not (root / "image_encoder").is_dir():
        width = read_config(root / "text_encoder").get("hidden_size")
        if width != TEXT["hidden_size"]:
            raise DTEError(
                f"The model at {root} has no image_encoder, and text states of width {width} fit "
                "no CLIP that can be fetched for it (Stable Diffusion 2 has 1024): use Stable "
                "Diffusion 1.5, or add the folders image_encoder and feature_extractor of its CLIP."
            )
    kind = read_config(root / "vae").get("_class_name")
    if not isinstance(kind, str) or kind not in AUTOENCODERS:
        raise DTEError(f"The backbone at {root} has an autoencoder of unknown class {kind}.")


def check_parts(name: str, parts: dict[str, Any]) -> None:
    """Raise DTEError where the parts do not fit together."""
    text, image, unet = (parts[p].config for p in ("text_encoder", "image_encoder", "unet"))
    if (size := len(parts["tokenizer"])) != text.vocab_size:  # an empty folder gives a tiny one
        raise DTEError(
            f"The tokenizer of the backbone {name} has {size} tokens and its text encoder "
            f"{text.vocab_size}: it is damaged or of another model."
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise DTEError(
            f"The UNet of the backbone {name} reads text of width {unet.cross_attention_dim}, "
            f"but its text encoder gives {text.hidden_size}."
        )
    _check_small_parts(name, parts)
    projects = isinstance(parts["text_encoder"], CLIPTextModelWithProjection)
    if projects and text.projection_dim != image.projection_dim:
        raise DTEError(f"Text and image encoder of the backbone {name} are not of one CLIP.")


def _check_small_parts(name: str, parts: dict[str, Any]) -> None:
    """Raise DTEError for settings, without which nothing is drawn, that mean nothing."""
    tokenizer, text, unet = parts["tokenizer"], parts["text_encoder"].config, parts["unet"].config
    scheduler, vae, processor = parts["scheduler"], parts["vae"].config, parts["image_processor"]
    with told_of(f"The tokenizer of the backbone {name}"):
        longest = tokenizer.model_max_length
        check_whole("model_max_length", longest, 3, text.max_position_embeddings)
        for token in ("bos", "eos", "pad"):
            check_whole(f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"), 0)
    with told_of(f"The UNet of the backbone {name}"):
        check_whole("sample_size", unet.sample_size, 1, 1024)
    with told_of(f"The autoencoder of the backbone {name}"):
        check_number("scaling_factor", vae.scaling_factor, above=0)
    with told_of(f"The scheduler of the backbone {name}"):
        check_one_of(
            "prediction_type", scheduler.config.prediction_type, ("epsilon", "v_prediction")
        )
        left = scheduler.alphas_cumprod.double()
        if not (left.isfinite().all() and left.min() >= 0 and left.max() < 1 and left[0] > 0):
            raise DTEError("its betas leave no signal, or no noise.")
    with told_of(f"The feature_extractor of the backbone {name}"):
        for setting, least in (("image_mean", None), ("image_std", 0)):
            values = getattr(processor, setting)
            if not isinstance(values, list | tuple) or len(values) != 3:
                raise DTEError(f"{setting} are three numbers, not {values!r}.")
            for value in values:
                check_number(setting, value, above=least)
    latent = unet.in_channels, unet.out_channels, channels_of(parts["vae"])
    if len(set(latent)) > 1:
        raise DTEError(
            f"The UNet of the backbone {name} takes {latent[0]} channels and gives {latent[1]}, "
            f"and its autoencoder has {latent[2]}: they are not of one model for pictures of text."
        )


def channels_of(vae: AutoencoderKL | PatchAutoencoder) -> int:
    """Channels of a latent."""
    if isinstance(vae, PatchAutoencoder):
        return vae.config.patch_channels * vae.config.cell**2
    return vae.config.latent_channels
