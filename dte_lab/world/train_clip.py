"""Train CLIP: picture-text contrast, plus a picture that is painted from the text states.

dte world train clip --out DIR

The second loss is ours. A denoiser reads the text states by cross-attention from every latent
position; training the states to be readable like that, by a throw-away painter that regresses
the latents of the picture, is what lets the denoiser draw objects after minutes and not hours.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.captions import caption
from dte_lab.world.clip import Clip, build_image_processor, build_tokenizer, tokenize
from dte_lab.world.data import picture_grid, random_batch, to_tensor
from dte_lab.world.scenes import SCENES, render
from dte_lab.world.sprites import STYLES, split_names
from dte_lab.world.training import TrainConfig, train

PAINT_WEIGHT = 2.0
CONTRAST_SHARE = 1 / 3  # of the steps: the picture tower costs most and learns fastest
CANONICAL_SEED = 0  # the painter's target is the unmirrored rendering, or it would blur the two


class Painter(nn.Module):
    """Paints latents from the text states twice: as the denoiser reads them, and all at once.

    Reading position by position is what the denoiser will do. The linear read-out of the last
    state, which has seen every word, is what brings the look of a word into its embedding quickly.
    """

    def __init__(self, latent_channels: int = 16, width: int = 192, heads: int = 6):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(64, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_channels))
        self.at_once = nn.Linear(width, latent_channels * 64)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Text states (B, T, 192) -> latents (B, 16, 8, 8), twice."""
        q = self.queries.expand(len(states), -1, -1)  # (B, 64, 192)
        h = q + self.attention(q, states, states, need_weights=False)[0]
        h = self.out(h + self.mlp(h))  # (B, 64, 16)
        return (
            h.transpose(1, 2).unflatten(2, (8, 8)),
            self.at_once(states[:, -1]).unflatten(1, (-1, 8, 8)),
        )


class Trainee(nn.Module):
    def __init__(self, clip: Clip):
        super().__init__()
        self.clip, self.painter = clip, Painter()


def contrastive_loss(text: Tensor, image: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of CLIP over a batch of embeddings (B, 128)."""
    text, image = (nn.functional.normalize(e, dim=-1) for e in (text, image))
    logits = log_scale.clamp(max=np.log(100)).exp() * text @ image.T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def zero_shot(clip: Clip, tokenizer, x: Tensor, texts: list[str]) -> Tensor:
    """Rank of each text for each picture (B, 3, 64, 64): (B, len(texts)) indices, best first."""
    device = x.device
    words = nn.functional.normalize(
        clip.text(tokenize(tokenizer, texts).to(device)).text_embeds, dim=-1
    )
    image = nn.functional.normalize(clip.image(x).image_embeds, dim=-1)
    return (image @ words.T).argsort(dim=1, descending=True)


def main(
    out: Path,
    steps: int = 4000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 160,
    device: str = "cpu",
) -> None:
    """Train and save `tokenizer`, `text_encoder`, `image_encoder`, `feature_extractor` to `out`."""
    out = Path(out)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Trainee(Clip(tokenizer))
    target = PatchAutoencoder()
    x, _, _ = random_batch(np.random.default_rng(seed), 1024)
    target.initialise_from_pca(x)
    target.requires_grad_(False).to(device)
    scale = 1 / target.encode(x.to(device)).latent_dist.mode().std()

    def latents(items: list[tuple]) -> Tensor:
        pictures = np.stack([render(*item[:3], CANONICAL_SEED) for item in items])
        return scale * target.encode(to_tensor(pictures).to(device)).latent_dist.mode()

    x_test, _, items = random_batch(np.random.default_rng(10_000), 400)
    names = split_names("train")
    truth = torch.tensor([names.index(item[0]) for item in items], device=device)
    truth_style = torch.tensor([STYLES.index(item[1]) for item in items], device=device)
    truth_scene = torch.tensor([SCENES.index(item[2]) for item in items], device=device)

    def loss(model: Trainee, rng: np.random.Generator) -> tuple[Tensor, dict]:
        x, texts, items = random_batch(rng, batch_size)
        text = model.clip.text(tokenize(tokenizer, texts).to(device))
        truth = latents(items)
        losses = [nn.functional.mse_loss(p, truth) for p in model.painter(text.last_hidden_state)]
        value = PAINT_WEIGHT * sum(losses)
        logs = {"paint": losses[0].item(), "paint_at_once": losses[1].item()}
        if rng.random() >= CONTRAST_SHARE:
            return value, logs
        image = model.clip.image(x.to(device))
        contrast = contrastive_loss(text.text_embeds, image.image_embeds, model.clip.log_scale)
        return contrast + value, {**logs, "contrast": contrast.item()}

    def sample(model: Trainee, step: int) -> dict[str, float]:
        clip = model.clip
        texts = [caption(name, None, None) for name in names]
        ranks = zero_shot(clip, tokenizer, x_test.to(device), texts)
        hit = ranks == truth[:, None]
        style = zero_shot(
            clip, tokenizer, x_test.to(device), [f"a {s} picture of a thing" for s in STYLES]
        )
        scene = zero_shot(
            clip, tokenizer, x_test.to(device), [caption("thing", None, s) for s in SCENES]
        )
        texts = [caption(*item[:3]) for item in items[:24]]
        painted = model.painter(clip.text(tokenize(tokenizer, texts).to(device)).last_hidden_state)
        painted = [target.decode(z / scale).sample.cpu() for z in painted]
        grid = torch.stack([x_test[:24], *painted], 1).flatten(0, 1)
        Image.fromarray(picture_grid(grid, 12)).save(out / "samples.png")
        return {
            "concept_top1": hit[:, :1].any(1).float().mean().item(),
            "concept_top5": hit[:, :5].any(1).float().mean().item(),
            "style": (style[:, 0] == truth_style).float().mean().item(),
            "scene": (scene[:, 0] == truth_scene).float().mean().item(),
        }

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1.5e-3,
        ema_decay=0.998,
        warmup_steps=100,
        seed=seed,
        sample_every=200,
    )
    model = train(out, model, config, loss, sample, minutes, device)
    model.clip.text.save_pretrained(out / "text_encoder")
    model.clip.image.save_pretrained(out / "image_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    build_image_processor().save_pretrained(out / "feature_extractor")
