"""Phase 1 of CLIP's training: the text tower learns to paint; see train_clip.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dte_lab.common.images import save_png
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world.captions import caption
from dte_lab.world.clip import WORDS, build_text_tower, cells, from_cells, tokenize
from dte_lab.world.data import (
    Rendering,
    caption_bank,
    indices,
    latent_bank,
    one_caption,
    pixel_grid,
    random_items,
    random_rows,
)
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, concepts, split_names
from dte_lab.world.training import PartOptions, TrainConfig, train

CODE = 160  # dimensions of a word embedding that say what its thing looks like; 32 say the rest
COMPONENTS_FROM = 4000  # pictures whose principal components are taken
TARGET = 256  # principal components of the pictures that the first end state is to name
PICTURE_WEIGHT, KIND_WEIGHT = 0.3, 0.05
FULL_CAPTIONS = 0.5  # share of captions that name style and scene for sure; see random_caption
CAPTIONS = 8  # ways to say what an item of the bank shows
CANONICAL_SEED = 0  # one rendering per (thing, style, scene), or the target would blur several


def kinds_of(names: list[str]) -> Int[Tensor, " names"]:
    """The kind of thing (subgroup, as a number) that each of the names is."""
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
    def __init__(self, vae: PatchAutoencoder) -> None:
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
        some = np.random.default_rng(0).permutation(len(items))[:COMPONENTS_FROM]
        some = self.bank.flatten(0, 2)[torch.from_numpy(some).to(self.bank.device)].float()
        self.mean = some.mean(0)
        _, s, v = torch.linalg.svd(some - self.mean, full_matrices=False)
        self.basis = v[:TARGET] / (s[:TARGET] / len(some) ** 0.5).sqrt()[:, None]  # (256, 1536)

    def look_up(self, shown: Int[Tensor, "batch 3"]) -> Float[Tensor, "batch channels 4 4"]:
        """Scaled latents, in single precision, of concepts, styles and scenes."""
        return self.bank[tuple(shown.T)].float().unflatten(1, (-1, 4, 4))

    def components(
        self, latents: Float[Tensor, "batch channels 4 4"]
    ) -> Float[Tensor, "batch components"]:
        """Of latents: 256 numbers."""
        return (latents.flatten(1) - self.mean) @ self.basis.T

    def pictures(
        self, latents: Float[Tensor, "batch channels 4 4"]
    ) -> Float[Tensor, "batch 3 64 64"]:
        """Of latents, in about [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def codes(self) -> Float[Tensor, "concepts code"]:
        """What each thing looks like in all styles, scenes averaged out: CODE numbers."""
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

    def __init__(self, text: CLIPTextModelWithProjection, channels: int, kinds: int) -> None:
        """channels: of a latent."""
        super().__init__()
        self.text = text
        self.cell = nn.Linear(text.config.hidden_size, channels)
        self.picture = nn.Linear(text.config.hidden_size, TARGET)
        self.kind = nn.Linear(text.config.hidden_size, kinds)

    def forward(
        self, input_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[
        Float[Tensor, "batch cells channels"],
        Float[Tensor, "batch components"],
        Float[Tensor, "batch kinds"],
    ]:
        """Ids -> cells (B, 16, 96), components (B, 256) and kinds (B, K).

        The last two are read from the first end token, whose state CLIP projects.
        """
        states = self.text(input_ids).last_hidden_state  # (B, T, 192)
        pooled = first_end_state(states, input_ids, self.text.config.eos_token_id)
        return self.cell(states[:, WORDS:]), self.picture(pooled), self.kind(pooled)


def first_end_state(
    states: Float[Tensor, "batch tokens dim"],
    input_ids: Int[Tensor, "batch tokens"],
    eos_token_id: int,
) -> Float[Tensor, "batch dim"]:
    """Of states, that of the first end token, which CLIP projects."""
    first = (input_ids == eos_token_id).int().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), first]


class TextTraining:
    """What `train` calls: the losses of random captions, and what unseen ones paint.

    captions: token ids (N, count, T) of N items. labels: numbers of their concept, style and scene,
    (N, 3). kinds: number of the kind of each concept. test: ids (n, T) and labels (n, 3).
    """

    def __init__(
        self,
        pictures: CanonicalPictures,
        captions: Int[Tensor, "items count tokens"],
        labels: Int[Tensor, "items 3"],
        kinds: Int[Tensor, " concepts"],
        batch_size: int,
        test: tuple[Tensor, Tensor],
        out: Path,
    ) -> None:
        self.pictures, self.captions, self.labels, self.kinds = pictures, captions, labels, kinds
        self.batch_size, self.test, self.out = batch_size, test, out

    def losses(
        self, model: TextPainter, ids: Int[Tensor, "batch tokens"], labels: Int[Tensor, "batch 3"]
    ) -> dict[str, Float[Tensor, ""]]:
        painted, components, kind = model(ids)
        latents = self.pictures.look_up(labels)
        truth = self.pictures.components(latents)
        return {
            "cells": nn.functional.mse_loss(painted, cells(latents)),
            "unexplained": (components - truth).pow(2).mean() / truth.pow(2).mean(),
            "kind": nn.functional.cross_entropy(kind, self.kinds[labels[:, 0]]),
        }

    @contextmanager
    def loss(self, model: TextPainter) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        rows = random_rows(self.labels, self.batch_size)
        parts = self.losses(model, one_caption(self.captions, rows), self.labels[rows])
        value = parts["cells"] + PICTURE_WEIGHT * parts["unexplained"] + KIND_WEIGHT * parts["kind"]
        yield value, parts

    def sample(self, model: TextPainter, step: int) -> dict[str, float]:
        ids, labels = self.test
        painted = from_cells(model(ids[:36])[0])
        both = torch.stack([self.pictures.look_up(labels[:36]), painted], 1).flatten(0, 1)
        grid = pixel_grid(self.pictures.pictures(both), 12)
        save_png(Image.fromarray(grid), self.out / "samples.png")
        return {f"test_{k}": v.item() for k, v in self.losses(model, ids, labels).items()}


def train_text(
    out: Path, tokenizer: CLIPTokenizer, vae: PatchAutoencoder, options: PartOptions
) -> CLIPTextModelWithProjection:
    """The trained text tower."""
    device, pictures = options.device, CanonicalPictures(vae)
    torch.manual_seed(options.seed)
    text = build_text_tower(tokenizer)
    start_from_pictures(text, tokenizer, pictures)
    model = TextPainter(text, vae.config.patch_channels * vae.config.cell**2, len(all_kinds()))
    rng = np.random.default_rng((options.seed, 78))
    items = random_items(rng, options.bank_size)

    def labels(items: list[Rendering]) -> Int[Tensor, "items 3"]:
        return torch.stack(list(indices(items, pictures.names).values()), dim=1).to(device)

    test_items = random_items(np.random.default_rng(10_000), 512)
    test_ids = tokenize(tokenizer, [caption(*item[:3]) for item in test_items]).to(device)
    training = TextTraining(
        pictures,
        caption_bank(tokenizer, items, rng, CAPTIONS, FULL_CAPTIONS).to(device),
        labels(items),
        kinds_of(pictures.names).to(device),
        options.batch_size,
        (test_ids, labels(test_items)),
        out,
    )
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=1.5e-3,
        muon_learning_rate=4e-3,
        warmup_steps=100,
        decay_fraction=0.4,
        ema_decay=0.995,
        seed=options.seed,
        mixed_precision=options.mixed_precision,
        sample_every=200,
    )
    return train(
        out, model, config, training.loss, training.sample, options.minutes, device,
        options.settings("text"),
    ).text  # fmt: skip
