"""The vocabulary's words as CLIP sees them: which word is a picture of?"""

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.tokens import TokenTable, known_words

WORD_CLIP = "word_clip"  # of an encoder: the words' embeddings


@torch.no_grad()
def clip_embeddings(
    backbone: Backbone, texts: list[str], batch_size: int = 256
) -> Float[Tensor, "texts embed"]:
    """CLIP's unit embeddings of texts, for a backbone that has a projection."""
    embeddings = []
    starts = range(0, len(texts), batch_size)
    for i in tqdm(starts, desc="words", disable=len(starts) < 50):  # a large vocabulary takes time
        # Attention is causal, so padding behind the end token would change nothing.
        batch = backbone.tokenizer(
            texts[i : i + batch_size], padding=True, truncation=True, return_tensors="pt"
        )
        embeds = backbone.text_encoder(input_ids=batch.input_ids.to(backbone.device)).text_embeds
        embeddings.append(F.normalize(embeds.float(), dim=-1))
    return torch.cat(embeddings)  # (n, p)


@torch.no_grad()
def word_clip_embeddings(backbone: Backbone, table: TokenTable) -> Float[Tensor, "words embed"]:
    """Unit CLIP embeddings of "a picture of a WORD" for the table's words.

    Those of Stable Diffusion 1.5 are kept beside the hub's files: on a CPU they take half an hour.
    Raises DTEError when the text encoder has no projection.
    """
    if not backbone.has_projection:
        raise DTEError(
            f"The text encoder of backbone {backbone.name} has no projection to CLIP space; "
            "save it as CLIPTextModelWithProjection."
        )
    cache = _cache_file(backbone, table)
    if (kept := _read_cache(cache, backbone, table)) is not None:
        return kept.to(backbone.device)
    found = clip_embeddings(backbone, [f"a picture of a {word}" for word in table.words])
    if cache is not None:
        with suppress(OSError):  # where the cache is full or not ours, it is no loss
            write_atomically(cache, save({"word_clip": found.cpu()}))
    return found


def _cache_file(backbone: Backbone, table: TokenTable) -> Path | None:
    """Where the embeddings of the hub's model lie: the name says of which weights and words."""
    if backbone.name != "sd15" or known_words(backbone) is None:  # random weights say nothing
        return None
    weight = backbone.text_encoder.text_projection.weight.detach().float().cpu()
    of = repr((table.words, str(backbone.dtype))).encode() + weight.numpy().tobytes()
    name = f"words-{hashlib.sha256(of).hexdigest()[:16]}.safetensors"
    return Path(constants.HF_HUB_CACHE) / "dte_lab" / name


def _read_cache(
    path: Path | None, backbone: Backbone, table: TokenTable
) -> Float[Tensor, "words embed"] | None:
    """What lies there, if it is whole."""
    if path is None or not path.is_file():
        return None
    try:
        found = load_file(path)["word_clip"]
    except (OSError, SafetensorError, KeyError):
        return None
    shape = len(table), backbone.text_encoder.config.projection_dim
    return found if found.shape == shape and found.isfinite().all() else None


def mix_words(
    similarity: Float[Tensor, "batch words"],
    embeddings: Float[Tensor, "words dim"],
    num_words: int,
    temperature: float,
) -> Float[Tensor, "batch dim"]:
    """Mixture of the `num_words` most similar words' embeddings, softmax(similarity / temperature).

    A mixture of vectors is shorter than they are; its norm is set to their mean norm.
    """
    similarity, rows = similarity.topk(min(num_words, len(embeddings)), dim=-1)  # (B, k)
    weight = (similarity / temperature).softmax(dim=-1)[..., None]  # (B, k, 1)
    words = embeddings[rows]  # (B, k, d)
    norm = (weight * words.norm(dim=-1, keepdim=True)).sum(dim=1)  # (B, 1)
    return F.normalize((weight * words).sum(dim=1), dim=-1) * norm


def similarity_of_pictures(
    embeds: Float[Tensor, "pictures embed"], word_clip: Float[Tensor, "words embed"]
) -> Float[Tensor, " words"]:
    """Mean cosine of pictures of one concept to each word."""
    return word_clip.to(embeds) @ embeds.mean(dim=0)


def words_of_folder(
    folder: Path, backbone: Backbone, table: TokenTable
) -> Float[Tensor, "words embed"]:
    """`word_clip_embeddings` for an encoder's folder: 100 MB, for Stable Diffusion, to compute.

    Those of a folder that was written when they were still saved are taken as they are.
    Raises DTEError when they are damaged.
    """
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if WORD_CLIP in file.keys():
                words = file.get_tensor(WORD_CLIP).float()
                shape = (len(table), backbone.image_encoder.config.projection_dim)
                if words.shape != shape or not words.isfinite().all():
                    raise DTEError(f"{path}: the tensor {WORD_CLIP} is damaged; copy it again.")
                return words
    return word_clip_embeddings(backbone, table)


def forget_words(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Drop the words from a state that was written when they were still saved."""
    state.pop(prefix + WORD_CLIP, None)


def word_of_pictures(
    embeds: Float[Tensor, "pictures embed"], word_clip: Float[Tensor, "words embed"]
) -> int:
    """Row of the word that is most similar to pictures of one concept, on average."""
    return int(similarity_of_pictures(embeds, word_clip).argmax())
