"""Stable Diffusion 1.5 by its numbers: where it lies, how it is built, and a random one.

The random model has every module at its full size and says nothing sensible: it measures memory and
speed where the weights are not at hand. (The dimensions are those of the published configurations.)
"""

import errno
import itertools
import logging
import shutil
import string
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from huggingface_hub import constants, get_session, snapshot_download, try_to_load_from_cache
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.settings import check_whole

# SD 1.5's text tower is the one of openai/clip-vit-large-patch14, which has the projection and the
# image tower too: both come from there.
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_REVISION = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
CLIP_L14 = "openai/clip-vit-large-patch14"
CLIP_L14_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"

LICENCE = (
    "The weights of Stable Diffusion 1.5 are under the CreativeML OpenRAIL-M licence, whose "
    "restrictions of use hold for what you make with them "
    "(https://huggingface.co/spaces/CompVis/stable-diffusion-license); no safety checker looks at "
    "the pictures."
)

CLIP_FILES = {"config.json": 0, "preprocessor_config.json": 0, "model.safetensors": 1.71}

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers' name for the number of heads
}
VAE = {
    "sample_size": 512,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49_408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
}
VISION = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
USABLE_WORDS = 12_003  # of the real vocabulary, as `TokenTable` counts them


@cache
def tell_licence() -> None:
    """Name the weights' licence, and what is not checked, once in a process."""
    logging.getLogger(__name__).warning(LICENCE)


def sd15_files(half: bool) -> dict[str, float]:
    """{file of the hub's repository: its size in GB, 0 for the small ones}."""
    variant, sizes = (".fp16", (1.72, 0.17)) if half else ("", (3.44, 0.33))
    weights = f"diffusion_pytorch_model{variant}.safetensors"
    tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    return {
        "unet/config.json": 0,
        f"unet/{weights}": sizes[0],
        "vae/config.json": 0,
        f"vae/{weights}": sizes[1],
        "scheduler/scheduler_config.json": 0,
        **{f"tokenizer/{name}": 0 for name in tokenizer},
    }


def fetch(
    repository: str, files: dict[str, float], revision: str, local_files_only: bool = False
) -> Path:
    """Folder of the hub's cache with `files` {name: GB} of a repository, downloaded if need be.

    What the cache holds needs no network. Raises OSError, with one sentence, when files are missing
    and the hub cannot be reached, has no such files, or the disk is too full for them.
    """
    offline = local_files_only or constants.is_offline_mode()
    cause = None
    for local in (True,) if offline else (True, False):
        try:
            if not local:
                check_hub()
                check_space(repository, files)
            root = snapshot_download(
                repository, revision=revision, allow_patterns=list(files), local_files_only=local
            )
        except Exception as error:  # of httpx, of the hub, or of the file system
            if _disk_full(error):
                raise _no_space(repository, files) from error
            cause = error
            continue
        missing = [name for name in files if not (Path(root) / name).is_file()]
        if not missing:
            return Path(root)
        cause = FileNotFoundError(f"it has no {missing[0]} at revision {revision}")
    reason = "downloads are switched off" if offline else _innermost(cause)
    raise OSError(
        f"{repository} is not in the cache {constants.HF_HUB_CACHE} and cannot be downloaded from "
        f"the hub ({reason}): connect to the network, copy the cache from a machine that has it, "
        "or give --backbone the folder of a local copy."
    ) from cause


def in_cache(repository: str, files: dict[str, float], revision: str) -> bool:
    """Whether the hub's cache holds all `files` of a repository."""
    found = (try_to_load_from_cache(repository, name, revision=revision) for name in files)
    return all(isinstance(path, str) for path in found)


def check_hub(timeout: float = 5) -> None:
    """Raise whatever the network raises when the hub does not answer within `timeout` seconds."""
    if constants.is_offline_mode():
        raise ConnectionError("offline mode is on (HF_HUB_OFFLINE)")
    get_session().head(constants.ENDPOINT, timeout=timeout)


def check_space(repository: str, files: dict[str, float]) -> None:
    """Raise OSError when the disk of the hub's cache has no room for `files` {name: GB}."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    if shutil.disk_usage(existing).free < sum(files.values()) * 1e9:
        raise _no_space(repository, files)


def _no_space(repository: str, files: dict[str, float]) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"{repository} needs {sum(files.values()):.1f} GB in {constants.HF_HUB_CACHE}, and the "
        "disk is too full: make room, or set HF_HOME to a folder on another disk",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_full(error: BaseException) -> bool:
    return any(
        getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e)
        for e in _chain(error)
    )


def _innermost(error: BaseException) -> str:
    *_, last = _chain(error)
    return reason_of(last)


def random_parts(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    resolution: int = 512,
    seed: int = 0,
    **changes: dict,
) -> dict[str, Any]:
    """The parts of a `Backbone` with random weights, by name.

    changes: unet, vae, text or vision, each a dict of settings that differ from SD 1.5's.
    Raises DTEError when `resolution` is not a multiple of 64, or over 4096.
    """
    check_whole("resolution", resolution, 64, 4096)
    if resolution % 64:
        raise DTEError(f"The resolution must be a multiple of 64, not {resolution}.")
    unet, vae, text, vision = (
        base | changes.get(name, {})
        for name, base in (("unet", UNET), ("vae", VAE), ("text", TEXT), ("vision", VISION))
    )
    unet |= {"sample_size": resolution // 8}
    with torch.random.fork_rng(devices=[]), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(seed)
        models = {
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)),
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**vae),
        }
    side = vision["image_size"]
    return {
        **models,
        "tokenizer": made_up_tokenizer(),
        "image_processor": CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        "scheduler": DPMSolverMultistepScheduler(**SCHEDULER),
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def made_up_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with 49,408 tokens, of which as many are whole words as in the real one.

    The words are made up ("aab", "aac", ...): the real vocabulary comes with the weights.
    """
    byte = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(c) for c in byte] + [chr(256 + i) for i in range(256 - len(byte))]
    letters = string.ascii_lowercase
    endings = [(a, f"{b}</w>") for a, b in itertools.product(letters, repeat=2)]  # 676, "ab</w>"
    triples = [(a, b + c) for a in letters for b, c in endings]  # 17,576 words of 3 letters
    words = triples[:USABLE_WORDS]
    merges = 49_408 - 512 - 2 - len(endings) - len(words)  # the rest: pieces that end no word
    pairs = [(a, b) for a, b in itertools.product(letters.upper(), repeat=2)]
    threes = [(a, b + c) for a in letters.upper() for b, c in pairs]
    fours = ((a, b + c) for a in letters.upper() for b, c in threes)
    pieces = itertools.chain(pairs, threes, fours)
    merges = [*endings, *words, *itertools.islice(pieces, merges)]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
