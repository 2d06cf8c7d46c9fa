"""Train CLIP in two phases: the text tower by painting, then both towers' meeting by contrast.

dte world train clip --out DIR --parts DIR

`parts` holds the vae that was trained before.

1. Text. Words of names start where a latent semantic analysis of their pictures puts them. Then the
   tower learns to say what the picture looks like: each of its last 16 end tokens the latents of
   one cell, and the first end token the principal components of the whole, and the kind of thing.
   This is ours. It costs half of a denoiser's step and teaches more: the denoiser draws no better
   than its captions tell, and what they tell is what it learns soonest.
2. Towers. The text states are frozen. The picture tower and both projections learn to match
   pictures with captions, and with the name, style and scene among all names, styles and scenes.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.captions import caption
from dte_lab.world.clip import (
    WORDS,
    build_image_processor,
    build_image_tower,
    build_text_tower,
    build_tokenizer,
    cells,
    from_cells,
    tokenize,
    whitening,
)
from dte_lab.world.data import (
    Item,
    caption_bank,
    from_bytes,
    indices,
    latent_bank,
    one_caption,
    picture_bank,
    picture_grid,
    random_batch,
    random_items,
    random_rows,
)
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, concepts, split_names
from dte_lab.world.training import TrainConfig, train

CODE = 160  # dimensions of a word embedding that say what its thing looks like; 32 say the rest
TARGET = 256  # principal components of the pictures that the first end state is to name
PICTURE_WEIGHT, KIND_WEIGHT = 0.3, 0.05
FULL_CAPTIONS = 0.5  # share of captions that name style and scene for sure; see random_caption
CAPTIONS = 8  # ways to say what an item of the bank shows
CANONICAL_SEED = 0  # one rendering per (thing, style, scene), or the target would blur several


def kinds_of(names: list[str]) -> Tensor:
    """The kind of thing (subgroup, as a number) that each of n names is: (n,)."""
    kinds = all_kinds()
    return torch.tensor([kinds.index(concepts()[name].subgroup) for name in names])


@cache
def all_kinds() -> list[str]:
    return sorted({c.subgroup for c in concepts().values()})


class CanonicalPictures:
    """Latents of one rendering of every (train concept, style, scene), and their components.

    The scene makes up half of the variance of pictures, so a plain regression learns things last.
    Principal components are divided by the square root of their standard deviation: half way to
    whitening.
    """

    @torch.no_grad()
    def __init__(self, vae: PatchAutoencoder):
        self.names, self.vae = split_names("train"), vae
        items = [
            (name, style, scene, CANONICAL_SEED)
            for name in self.names
            for style in STYLES
            for scene in SCENES
        ]
        # (concepts, styles, scenes, 96 * 4 * 4)
        sizes = len(self.names), len(STYLES), len(SCENES)
        self.bank = latent_bank(vae, items).flatten(1).unflatten(0, sizes)
        some = np.random.default_rng(0).permutation(len(items))[:4000]
        some = self.bank.flatten(0, 2)[torch.from_numpy(some).to(self.bank.device)].float()
        self.mean = some.mean(0)
        _, s, v = torch.linalg.svd(some - self.mean, full_matrices=False)
        self.basis = v[:TARGET] / (s[:TARGET] / len(some) ** 0.5).sqrt()[:, None]  # (256, 1536)

    def look_up(self, shown: Tensor) -> Tensor:
        """Scaled latents (B, 96, 4, 4), in single precision, of concepts, styles, scenes (B, 3)."""
        return self.bank[tuple(shown.T)].float().unflatten(1, (-1, 4, 4))

    def components(self, latents: Tensor) -> Tensor:
        """Latents (B, 96, 4, 4) -> (B, 256)."""
        return (latents.flatten(1) - self.mean) @ self.basis.T

    def pictures(self, latents: Tensor) -> Tensor:
        """(B, 96, 4, 4) -> (B, 3, 64, 64)."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def codes(self) -> Tensor:
        """What each thing looks like in all styles, scenes averaged out: (concepts, CODE)."""
        z = self.bank.float()
        z = (z - z.mean((0, 1))).mean(2).flatten(1)
        u, s, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        codes = u[:, :CODE] * s[:CODE].sqrt()
        return (codes / codes.pow(2).mean().sqrt()).cpu()


@torch.no_grad()
def start_from_pictures(
    text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, pictures: CanonicalPictures
) -> None:
    """Start the words of names where their pictures say (latent semantic analysis of the world).

    A ridge regression of the things' codes on the words of their names gives each such word the
    first CODE dimensions of its embedding. All other words, and the positions, have random values
    in the others, of which the last tells names from the rest. The first attention starts by
    averaging the words of the name (CODE dimensions) and, beside it, all words (the others).
    """
    grammar = [caption("thing", style, scene) for style in STYLES for scene in SCENES]
    grammar = set(sum(tokenizer([*grammar, "an of , ."]).input_ids, []))
    counts = torch.zeros(len(pictures.names), len(tokenizer))
    for row, ids in zip(counts, tokenizer(pictures.names).input_ids, strict=True):
        for token in set(ids) - grammar:
            row[token] += ids.count(token)
    gram = counts @ counts.T + 0.1 * torch.eye(len(counts))
    codes = counts.T @ torch.linalg.solve(gram, pictures.codes())  # (tokens, CODE)
    is_name = counts.sum(0) > 0
    tokens = text.text_model.embeddings.token_embedding.weight
    positions = text.text_model.embeddings.position_embedding.weight
    for weight in (tokens, positions):
        weight.normal_(0, 0.3)
        weight[:, :CODE] = 0
    tokens[is_name] = 0
    tokens[is_name, :CODE] = 0.3 * nn.functional.normalize(codes[is_name]) * CODE**0.5
    tokens[:, -1] = torch.where(is_name, 0.9, -0.9)
    positions[:, -1] = 0
    attention = text.text_model.encoder.layers[0].self_attn
    nn.init.zeros_(attention.q_proj.weight)
    attention.k_proj.weight.mul_(0.1)
    for first in range(0, CODE, attention.head_dim):  # these heads look for names
        attention.q_proj.bias[first] = attention.head_dim**0.5
        attention.k_proj.weight[first] = torch.eye(len(tokens.T))[-1]
    nn.init.eye_(attention.v_proj.weight)
    nn.init.eye_(attention.out_proj.weight).mul_(0.5)


class TextPainter(nn.Module):
    """A text tower, and linear readers of its end states that are thrown away afterwards."""

    def __init__(self, text: CLIPTextModelWithProjection, channels: int, kinds: int):
        """channels: of a latent."""
        super().__init__()
        self.text = text
        self.cell = nn.Linear(text.config.hidden_size, channels)
        self.picture = nn.Linear(text.config.hidden_size, TARGET)
        self.kind = nn.Linear(text.config.hidden_size, kinds)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) ids -> cells (B, 16, 96), components (B, 256) and kinds (B, K).

        The last two are read from the first end token, whose state CLIP projects.
        """
        states = self.text(input_ids).last_hidden_state  # (B, T, 192)
        pooled = first_end_state(states, input_ids, self.text.config.eos_token_id)
        return self.cell(states[:, WORDS:]), self.picture(pooled), self.kind(pooled)


def first_end_state(states: Tensor, input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Of states (B, T, d), that of the first end token, which CLIP projects: (B, d)."""
    first = (input_ids == eos_token_id).int().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), first]


class Towers(nn.Module):
    """Picture tower, projection of the frozen text tower, and a temperature (arXiv 2103.00020)."""

    def __init__(self, image: CLIPVisionModelWithProjection, projection: nn.Linear):
        super().__init__()
        self.image, self.projection = image, projection
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def logits(self, image: Tensor, pooled_text: Tensor) -> Tensor:
        """Image embeddings (B, 128) and text states (N, 192) -> scaled cosines (B, N)."""
        text = nn.functional.normalize(self.projection(pooled_text), dim=-1)
        scale = self.log_scale.clamp(max=np.log(100)).exp()
        return scale * nn.functional.normalize(image, dim=-1) @ text.T


def train_text(
    out: Path,
    tokenizer: CLIPTokenizer,
    vae: PatchAutoencoder,
    steps: int,
    minutes: float | None,
    seed: int,
    batch_size: int,
    bank_size: int,
    device: str,
    mixed_precision: str,
) -> CLIPTextModelWithProjection:
    """Phase 1: see the module's docstring."""
    pictures = CanonicalPictures(vae)
    torch.manual_seed(seed)
    text = build_text_tower(tokenizer)
    start_from_pictures(text, tokenizer, pictures)
    model = TextPainter(text, vae.config.patch_channels * vae.config.cell**2, len(all_kinds()))
    rng = np.random.default_rng((seed, 78))
    items = random_items(rng, bank_size)
    captions = caption_bank(tokenizer, items, rng, CAPTIONS, FULL_CAPTIONS).to(device)
    kinds = kinds_of(pictures.names).to(device)

    def shown(items: list[Item]) -> Tensor:
        """Numbers of concept, style and scene: (B, 3)."""
        return torch.stack(list(indices(items, pictures.names).values()), dim=1).to(device)

    def losses(model: TextPainter, ids: Tensor, shown: Tensor) -> dict[str, Tensor]:
        read, components, kind = model(ids)
        latents = pictures.look_up(shown)
        truth = pictures.components(latents)
        return {
            "cells": nn.functional.mse_loss(read, cells(latents)),
            "unexplained": (components - truth).pow(2).mean() / truth.pow(2).mean(),
            "kind": nn.functional.cross_entropy(kind, kinds[shown[:, 0]]),
        }

    all_shown = shown(items)

    def loss(model: TextPainter) -> tuple[Tensor, dict]:
        rows = random_rows(all_shown, batch_size)
        parts = losses(model, one_caption(captions, rows), all_shown[rows])
        value = parts["cells"] + PICTURE_WEIGHT * parts["unexplained"] + KIND_WEIGHT * parts["kind"]
        return value, parts

    test_items = random_items(np.random.default_rng(10_000), 512)
    test_ids = tokenize(tokenizer, [caption(*item[:3]) for item in test_items]).to(device)
    test_shown = shown(test_items)

    def sample(model: TextPainter, step: int) -> dict[str, float]:
        painted = from_cells(model(test_ids[:36])[0])
        both = torch.stack([pictures.look_up(test_shown[:36]), painted], 1).flatten(0, 1)
        grid = picture_grid(pictures.pictures(both), 12)
        Image.fromarray(grid).save(out / "samples.png")
        return {f"test_{k}": v.item() for k, v in losses(model, test_ids, test_shown).items()}

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1.5e-3,
        muon_learning_rate=4e-3,
        warmup_steps=100,
        decay_fraction=0.4,
        ema_decay=0.995,
        seed=seed,
        mixed_precision=mixed_precision,
        sample_every=200,
    )
    return train(out, model, config, loss, sample, minutes, device).text


def augment(x: Tensor) -> Tensor:
    """Shift pictures (B, 3, H, W) by up to 3 px and scale their colours by up to 15 %.

    For the picture tower alone, which is to know things that it has not seen.
    """
    window = torch.arange(x.shape[-1], device=x.device)
    top, left = torch.randint(7, (2, 1), device=x.device)
    x = nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    x = x.index_select(2, window + top).index_select(3, window + left)
    gains = 1 + 0.15 * (2 * torch.rand(len(x), 3, 1, 1, device=x.device) - 1)
    return ((x + 1) * gains - 1).clamp(-1, 1)


def train_towers(
    out: Path,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModelWithProjection,
    steps: int,
    minutes: float | None,
    seed: int,
    batch_size: int,
    bank_size: int,
    device: str,
    mixed_precision: str,
) -> Towers:
    """Phase 2: see the module's docstring."""
    torch.manual_seed(seed)
    names = split_names("train")
    rng = np.random.default_rng((seed, 79))
    items = random_items(rng, bank_size)
    pictures = picture_bank(items).to(device)  # (N, 3, 64, 64)
    captions = caption_bank(tokenizer, items, rng, CAPTIONS).to(device)
    numbers = {key: index.to(device) for key, index in indices(items, names).items()}
    image = build_image_tower(from_bytes(pictures[:1024]).cpu())
    model = Towers(image, text.text_projection.requires_grad_(True))

    @torch.no_grad()
    def pooled(ids: Tensor) -> Tensor:
        """(B, 192) state of the end token, which CLIP projects."""
        return first_end_state(text(ids).last_hidden_state, ids, tokenizer.eos_token_id)

    texts = {  # what is in the picture -> the texts among which it must be found
        "concept": [caption(name, None, None) for name in names],
        "style": [f"a {style} picture of a thing" for style in STYLES],
        "scene": [caption("thing", None, scene) for scene in SCENES],
    }
    classes = {key: pooled(tokenize(tokenizer, t).to(device)) for key, t in texts.items()}

    kind_of = kinds_of(names).to(device)
    # The states of all captions are nearly parallel; whitened, they start apart from each other.
    with torch.no_grad():
        some = pooled(captions[:2048, 0])
        model.projection.weight.copy_(whitening(some, len(model.projection.weight)))

    def loss(model: Towers) -> tuple[Tensor, dict]:
        rows = random_rows(pictures, batch_size)
        image = model.image(augment(from_bytes(pictures[rows]))).image_embeds
        logits = model.logits(image, pooled(one_caption(captions, rows)))  # (B, B)
        own = torch.arange(len(logits), device=device)
        cross_entropy = nn.functional.cross_entropy
        losses = {"caption": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2}
        truth = {key: number[rows] for key, number in numbers.items()}
        scores = {key: model.logits(image, classes[key]) for key in truth}
        for key, index in truth.items():
            losses[key] = cross_entropy(scores[key], index)
        # A picture's kind: its share of the softmax over names, added up over names of one kind.
        same_kind = kind_of == kind_of[truth["concept"]][:, None]  # (B, concepts)
        shares = (scores["concept"].softmax(1) * same_kind).sum(1)
        losses["kind"] = -shares.clamp(min=1e-6).log().mean()
        return sum(losses.values()), losses

    x_test, _, items = random_batch(np.random.default_rng(10_000), 400)

    def sample(model: Towers, step: int) -> dict[str, float]:
        image = model.image(x_test.to(device)).image_embeds
        return {
            f"{key}_top1": (model.logits(image, classes[key]).argmax(1).cpu() == index)
            .float()
            .mean()
            .item()
            for key, index in indices(items, names).items()
        }

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        ema_decay=0.998,
        seed=seed,
        mixed_precision=mixed_precision,
        sample_every=250,
    )
    return train(out, model, config, loss, sample, minutes, device)


def main(
    out: Path,
    parts: Path,
    steps: int = 10_000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    bank_size: int = 40_000,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train both phases, `steps` each; `minutes` stops the phase that is under way.

    Saves `tokenizer` and `text_encoder` to `out` after the first phase, and after the second
    `text_encoder` again (now with its projection), `image_encoder` and `feature_extractor`.
    """
    out = Path(out)
    tokenizer = build_tokenizer()
    vae = PatchAutoencoder.from_pretrained(Path(parts) / "vae").eval().to(device)
    how = {
        "steps": steps, "minutes": minutes, "seed": seed, "batch_size": batch_size,
        "bank_size": bank_size, "device": device, "mixed_precision": mixed_precision,
    }  # fmt: skip
    text = train_text(out / "text", tokenizer, vae, **how)
    tokenizer.save_pretrained(out / "tokenizer")
    text.save_pretrained(out / "text_encoder")
    text = text.requires_grad_(False)
    towers = train_towers(out / "towers", tokenizer, text, **how)
    text.text_projection = towers.projection
    text.save_pretrained(out / "text_encoder")
    towers.image.save_pretrained(out / "image_encoder")
    build_image_processor().save_pretrained(out / "feature_extractor")
