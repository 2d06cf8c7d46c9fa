"""Train CLIP in two phases: the text tower by painting, then both towers' meeting by contrast.

dte world train clip --out DIR

1. Text. A denoiser reads the text states by cross-attention from every latent position. Here a
   throw-away painter does the same and regresses the latents of the picture; a linear layer names
   the kind of thing, so that words of a kind lie together. This is ours. It costs a tenth of a
   denoiser's step and is what lets the denoiser draw objects after minutes and not hours.
2. Towers. The text states are frozen. The picture tower and both projections learn to match
   pictures with captions, and with the name, style and scene among all names, styles and scenes.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.captions import caption
from dte_lab.world.clip import (
    build_image_processor,
    build_image_tower,
    build_text_tower,
    build_tokenizer,
    tokenize,
    whitening,
)
from dte_lab.world.data import picture_grid, random_batch, random_captions, to_tensor
from dte_lab.world.scenes import SCENES, render
from dte_lab.world.sprites import STYLES, concepts, split_names
from dte_lab.world.training import TrainConfig, train

KIND_WEIGHT = 0.1
CANONICAL_SEED = 0  # the painter's target is the unmirrored rendering, or it would blur the two


class TextPainter(nn.Module):
    """A text tower, and three readers of its states that are thrown away after training."""

    def __init__(self, text: CLIPTextModelWithProjection, kinds: int, latent_channels: int = 16):
        super().__init__()
        self.text = text
        width = text.config.hidden_size
        self.queries = nn.Parameter(0.02 * torch.randn(64, width))
        self.attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_channels))
        self.at_once = nn.Linear(width, latent_channels * 64)
        self.kind = nn.Linear(width, kinds)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) ids -> latents (B, 16, 8, 8) as the denoiser reads, and at once; kinds (B, K)."""
        states = self.text(input_ids).last_hidden_state  # (B, T, 192)
        last = states[:, -1]  # (B, 192), has seen every word
        q = self.queries.expand(len(states), -1, -1)  # (B, 64, 192)
        h = q + self.attention(q, states, states, need_weights=False)[0]
        read = self.out(h + self.mlp(h)).transpose(1, 2).unflatten(2, (8, 8))
        return read, self.at_once(last).unflatten(1, (-1, 8, 8)), self.kind(last)


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
    out: Path, tokenizer: CLIPTokenizer, steps: int, minutes: float | None, seed: int, device: str
) -> CLIPTextModelWithProjection:
    """Phase 1: see the module's docstring."""
    kinds = sorted({c.subgroup for c in concepts().values()})
    torch.manual_seed(seed)
    model = TextPainter(build_text_tower(tokenizer), len(kinds))
    target = PatchAutoencoder()
    x, _, _ = random_batch(np.random.default_rng(seed), 1024)
    target.initialise_from_pca(x)
    target.requires_grad_(False).to(device)
    scale = 1 / target.linear_latents(x.to(device)).std()

    def loss(model: TextPainter, rng: np.random.Generator) -> tuple[Tensor, dict]:
        texts, items = random_captions(rng, 64)
        pictures = np.stack([render(*item[:3], CANONICAL_SEED) for item in items])
        truth = scale * target.linear_latents(to_tensor(pictures).to(device))
        read, at_once, kind = model(tokenize(tokenizer, texts).to(device))
        true_kind = torch.tensor([kinds.index(concepts()[i[0]].subgroup) for i in items])
        losses = {
            "paint": nn.functional.mse_loss(read, truth),
            "paint_at_once": nn.functional.mse_loss(at_once, truth),
            "kind": nn.functional.cross_entropy(kind, true_kind.to(device)),
        }
        value = losses["paint"] + losses["paint_at_once"] + KIND_WEIGHT * losses["kind"]
        return value, {name: loss.item() for name, loss in losses.items()}

    x_test, _, items = random_batch(np.random.default_rng(10_000), 24)
    test_ids = tokenize(tokenizer, [caption(*item[:3]) for item in items]).to(device)

    def sample(model: TextPainter, step: int) -> dict[str, float]:
        painted = [target.decode(z / scale).sample.cpu() for z in model(test_ids)[:2]]
        grid = torch.stack([x_test, *painted], 1).flatten(0, 1)
        Image.fromarray(picture_grid(grid, 12)).save(out / "samples.png")
        return {}

    config = TrainConfig(
        steps=steps,
        batch_size=64,
        learning_rate=1.5e-3,
        ema_decay=0.998,
        seed=seed,
        sample_every=500,
    )
    return train(out, model, config, loss, sample, minutes, device).text


def train_towers(
    out: Path,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModelWithProjection,
    steps: int,
    minutes: float | None,
    seed: int,
    device: str,
) -> Towers:
    """Phase 2: see the module's docstring."""
    torch.manual_seed(seed)
    x, _, _ = random_batch(np.random.default_rng(seed), 1024)
    model = Towers(build_image_tower(x), text.text_projection.requires_grad_(True))
    names = split_names("train")

    @torch.no_grad()
    def pooled(texts: list[str]) -> Tensor:
        """(B, 192) state of the end token, which CLIP projects."""
        ids = tokenize(tokenizer, texts).to(device)
        ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        return text(ids).last_hidden_state[torch.arange(len(ids)), ends]

    classes = {  # what is in the picture -> the texts among which it must be found
        "concept": pooled([caption(name, None, None) for name in names]),
        "style": pooled([f"a {style} picture of a thing" for style in STYLES]),
        "scene": pooled([caption("thing", None, scene) for scene in SCENES]),
    }

    # The states of all captions are nearly parallel; whitened, they start apart from each other.
    captions, _ = random_captions(np.random.default_rng(seed), 2048)
    with torch.no_grad():
        model.projection.weight.copy_(whitening(pooled(captions), len(model.projection.weight)))

    def truth(items: list[tuple]) -> dict[str, Tensor]:
        found = {
            "concept": [names.index(item[0]) for item in items],
            "style": [STYLES.index(item[1]) for item in items],
            "scene": [SCENES.index(item[2]) for item in items],
        }
        return {key: torch.tensor(value, device=device) for key, value in found.items()}

    def loss(model: Towers, rng: np.random.Generator) -> tuple[Tensor, dict]:
        x, texts, items = random_batch(rng, 64)
        image = model.image(x.to(device)).image_embeds
        logits = model.logits(image, pooled(texts))  # (B, B)
        own = torch.arange(len(logits), device=device)
        cross_entropy = nn.functional.cross_entropy
        losses = {"caption": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2}
        for key, index in truth(items).items():
            losses[key] = cross_entropy(model.logits(image, classes[key]), index)
        return sum(losses.values()), {name: loss.item() for name, loss in losses.items()}

    x_test, _, items = random_batch(np.random.default_rng(10_000), 400)

    def sample(model: Towers, step: int) -> dict[str, float]:
        image = model.image(x_test.to(device)).image_embeds
        return {
            f"{key}_top1": (model.logits(image, classes[key]).argmax(1) == index)
            .float()
            .mean()
            .item()
            for key, index in truth(items).items()
        }

    config = TrainConfig(
        steps=steps,
        batch_size=64,
        learning_rate=1e-3,
        ema_decay=0.998,
        seed=seed,
        sample_every=250,
    )
    return train(out, model, config, loss, sample, minutes, device)


def main(
    out: Path,
    steps: int = 10_000,
    minutes: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train both phases, `steps` each; `minutes` stops the phase that is under way.

    Saves `tokenizer` and `text_encoder` to `out` after the first phase, and after the second
    `text_encoder` again (now with its projection), `image_encoder` and `feature_extractor`.
    """
    out = Path(out)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    text = train_text(out / "text", tokenizer, steps, minutes, seed, device)
    text.save_pretrained(out / "text_encoder")
    text = text.requires_grad_(False)
    towers = train_towers(out / "towers", tokenizer, text, steps, minutes, seed, device)
    text.text_projection = towers.projection
    text.save_pretrained(out / "text_encoder")
    towers.image.save_pretrained(out / "image_encoder")
    build_image_processor().save_pretrained(out / "feature_extractor")
