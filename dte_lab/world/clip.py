"""The CLIP of the small backbone: a tokenizer from the captions, a text and a picture tower.

All three are the stock transformers classes, only small, so that whatever works here works on
Stable Diffusion's CLIP.
"""

import json
import string

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from dte_lab.world.captions import caption
from dte_lab.world.scenes import SCENES, SIZE
from dte_lab.world.sprites import STYLES, concepts, split_names

VOCABULARY = 9000  # tokens at most
WIDTH = 192  # of the text tower: of words and states
WORDS = 16  # tokens with start and end: the longest caption of the grammar fits
CELLS = 16  # end tokens after these: one per position of the latents, row by row
MAX_LENGTH = WORDS + CELLS
PROJECTION = 128
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-pair vocabulary from the captions, names and tags of the train concepts, and `words`.

    Words of val and test concepts are left out, so every whole word of the vocabulary is one that
    the towers have been trained on; unseen words fall apart into pieces.
    """
    texts = [caption("thing", style, scene) for style in STYLES for scene in SCENES]
    for name in split_names("train"):
        texts += [caption(name, None, None)] * 8 + [*concepts()[name].tags] * 2
    texts += [*words] * 8
    texts += 2 * [*string.ascii_lowercase, *string.digits, *string.punctuation]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained.decoder = decoders.ByteLevel()
    pieces = trained.pre_tokenizer.pre_tokenize_str(" ".join(texts).lower())
    ends = sorted({piece[-1] + "</w>" for piece, _ in pieces})  # else numbered in a random order
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>", *ends],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=MAX_LENGTH,
    )


def build_text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Five layers of width 192; the last hidden state conditions the denoiser.

    As in Stable Diffusion, end tokens fill the caption up, and the denoiser reads them, too. The
    last CELLS learn to say what is in their cell of the picture (ours: see painter).
    """
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=5,
            num_attention_heads=6,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=PROJECTION,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_image_tower(x: Float[Tensor, "pictures 3 height width"]) -> CLIPVisionModelWithProjection:
    """Three layers of width 128 on patches of 8 px, the cells that sprites are aligned with.

    The patch embedding starts as the whitening PCA of the patches of x: otherwise
    their mean colours drown everything else, and the tower learns shapes very late.
    """
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=SIZE,
            patch_size=8,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=PROJECTION,
        )
    )
    embedding = tower.vision_model.embeddings.patch_embedding  # a convolution without bias
    patches = nn.functional.unfold(x, 8, stride=8).transpose(1, 2).flatten(0, 1)  # (N, 192)
    basis = whitening(patches - patches.mean(0), embedding.out_channels)
    with torch.no_grad():
        embedding.weight.copy_(basis.unflatten(1, (3, 8, 8)))
    return tower


def whitening(x: Float[Tensor, "rows dim"], count: int) -> Float[Tensor, "count dim"]:
    """The `count` directions of most variance of x, scaled to variance 1.

    Directions with under 2 % of the largest standard deviation are scaled as if they had it.
    """
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    std = s[:count] / len(x) ** 0.5
    return v[:count] / std.clamp(min=0.02 * std[0])[:, None]


def build_image_processor() -> CLIPImageProcessor:
    """Resize and crop to 64 px; mean and std 0.5, so normalised pixels are just [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Int[Tensor, "texts tokens"]:
    """Ids of the tokenizer's longest length, padded with the end token as in SD."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def cells(
    latents: Float[Tensor, "batch channels 4 4"],
) -> Float[Tensor, "batch cells channels"]:
    """Latents as one vector per cell, row by row."""
    return latents.flatten(2).transpose(1, 2)


def from_cells(
    content: Float[Tensor, "batch cells channels"],
) -> Float[Tensor, "batch channels 4 4"]:
    """Undo `cells`."""
    return content.transpose(1, 2).unflatten(2, (4, 4))
