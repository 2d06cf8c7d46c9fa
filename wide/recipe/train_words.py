"""Fill the word space: the text tower learns to say what a word made from a picture looks like.

    dte world train words --out DIR --parts DIR --wide CACHE

`parts` holds a backbone of the small world, whose text tower is trained on. A convolutional network
turns one rendering of a thing into a word; the tower says the latents of another rendering, cell by
cell (see train_clip), as it does for the words of the dictionary. The network is thrown away: what
stays is a space of words in which things can be said that have no name.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dte_lab.world.align import ridge
from dte_lab.world.autoencoder import PatchAutoencoder, ResidualBlock
from dte_lab.world.clip import WORDS, cells, from_cells
from dte_lab.world.data import picture_grid
from dte_lab.world.sprites import split_names
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide_batches import Batch, Shares, WideBatches

NEAREST_WEIGHT, SHARPNESS = 0.03, 20.0  # of the term that puts a picture's word near its name


class Looker(nn.Module):
    """A picture as one word: (B, 3, 64, 64) in [-1, 1] -> (B, d), all of one norm."""

    def __init__(self, dimensions: int, norm: float):
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 64, 3, padding=1), nn.SiLU())
        self.blocks = nn.Sequential(
            nn.Conv2d(64, 128, 3, stride=2, padding=1),  # (B, 128, 8, 8)
            ResidualBlock(128),
            nn.Conv2d(128, 256, 3, stride=2, padding=1),  # (B, 256, 4, 4)
            ResidualBlock(256),
        )
        self.squeeze = nn.Sequential(nn.Linear(256 * 16, 512), nn.SiLU(), nn.Linear(512, 512))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(512, dimensions))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.blocks(self.stem(x))).flatten(1)  # (B, 4096)
        return self.norm * nn.functional.normalize(self.head(self.squeeze(h)), dim=-1)


class Words(nn.Module):
    """A text tower, the network that makes words for it, and a linear reader of its end states."""

    def __init__(self, text: CLIPTextModelWithProjection, norm: float | None, channels: int):
        """norm: of the words that its own network makes, or None for no such network."""
        super().__init__()
        self.text = text
        self.look = Looker(text.config.hidden_size, norm) if norm else None
        self.cell = nn.Linear(text.config.hidden_size, channels)

    def states(self, ids: Tensor, is_slot: Tensor, v: Tensor) -> Tensor:
        """Last states (B, T, d) of captions, with words v (B, d) in their slots."""

        def insert(module, args, out: Tensor) -> Tensor:
            return torch.where(is_slot[..., None], v[:, None].to(out), out)

        hook = self.text.get_input_embeddings().register_forward_hook(insert)
        try:
            return self.text(ids).last_hidden_state
        finally:
            hook.remove()

    def said(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (B, T, d) of a batch, and the words that its pictures made (B - D, d)."""
        v = self.look(batch.image)
        some = v.new_zeros(len(batch.ids) - len(v), v.shape[1])
        return self.states(batch.ids, batch.is_slot, torch.cat([some, v])), v

    def paint(self, states: Tensor) -> Tensor:
        """What the states say: scaled latents (B, 96, 4, 4)."""
        return from_cells(self.cell(states[:, WORDS:]))


class Names:
    """The train concepts' names as words: the mean embedding of each, (400, d)."""

    def __init__(self, tokenizer: CLIPTokenizer):
        rows = tokenizer(split_names("train"), add_special_tokens=False).input_ids
        self.ids = torch.tensor([i for row in rows for i in row])
        self.row = torch.tensor([r for r, row in enumerate(rows) for _ in row])
        self.share = torch.tensor([1 / len(row) for row in rows for _ in row])
        self.count = len(rows)

    def __call__(self, text: CLIPTextModelWithProjection) -> Tensor:
        words = text.get_input_embeddings().weight[self.ids] * self.share[:, None]
        return words.new_zeros(self.count, words.shape[1]).index_add(0, self.row, words)


def nearest_loss(v: Tensor, word: Tensor, names: Tensor) -> Tensor:
    """Cross-entropy of the name of what a picture shows, among all names, by cosine.

    word (B,): which name; pictures with -1 do not count, and without any other it is 0.
    """
    unit = nn.functional.normalize
    logits = SHARPNESS * unit(v, dim=-1) @ unit(names, dim=-1).T
    total = nn.functional.cross_entropy(logits, word, ignore_index=-1, reduction="sum")
    return total / (word >= 0).sum().clamp(min=1)


@torch.no_grad()
def scaled_latents(vae: PatchAutoencoder, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def start(model: Words, vae: PatchAutoencoder, batches: WideBatches, count: int = 1024) -> None:
    """Fit the reader of the tower's end states on dictionary words."""
    ids, pictures = batches._dictionary(count)
    states = model.text(ids).last_hidden_state[:, WORDS:].flatten(0, 1)
    truth = cells(scaled_latents(vae, pictures)).flatten(0, 1)
    mean, aim = states.mean(0), truth.mean(0)
    weight = ridge(states - mean, truth - aim, 1e-3)  # (d, 96)
    model.cell.weight.copy_(weight.T)
    model.cell.bias.copy_(aim - mean @ weight)


def word_norm(text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> float:
    """Mean norm of the embeddings of the words of train names."""
    ids = sorted(set(Names(tokenizer).ids.tolist()))
    return text.get_input_embeddings().weight[ids].norm(dim=-1).mean().item()


def load_parts(parts: Path) -> tuple[PatchAutoencoder, CLIPTextModelWithProjection, CLIPTokenizer]:
    vae = PatchAutoencoder.from_pretrained(parts / "vae").eval().requires_grad_(False)
    text = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder", dtype=torch.float32)
    return vae, text, CLIPTokenizer.from_pretrained(parts / "tokenizer")


def main(
    out: Path,
    parts: Path,
    wide=None,
    steps: int = 4000,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 96,
    shares: Shares | None = None,
    learning_rate: float = 5e-4,
    muon_learning_rate: float = 1.5e-3,
    nearest_weight: float = NEAREST_WEIGHT,
) -> Words:
    """Train, save the EMA text tower to `out/text_encoder` and return all that was trained."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    vae, text, tokenizer = load_parts(Path(parts))
    vae = vae.to(memory_format=torch.channels_last)
    batches, names = WideBatches(tokenizer, wide, shares), Names(tokenizer)
    torch.manual_seed(seed)
    model = Words(text, word_norm(text, tokenizer), vae.config.patch_channels * 4)
    text.text_projection.requires_grad_(False)
    if not (out / "checkpoint.safetensors").exists():
        start(model, vae, batches)

    def losses(model: Words, batch: Batch) -> dict[str, Tensor]:
        states, v = model.said(batch)
        truth = scaled_latents(vae, batch.target)
        error = (model.paint(states) - truth).pow(2).mean((1, 2, 3))
        made = len(batch.image)
        return {
            "dictionary": error[:-made].mean(),
            "made": error[-made:].mean(),
            "nearest": nearest_loss(v, batch.word, names(model.text)),
        }

    def loss(model: Words) -> tuple[Tensor, dict]:
        parts = losses(model, batches(batch_size))
        value = (
            batches.shares.dictionary * parts["dictionary"]
            + (1 - batches.shares.dictionary) * parts["made"]
            + nearest_weight * parts["nearest"]
        )
        return value, parts

    torch.manual_seed(1)
    shown = batches(48)

    def sample(model: Words, step: int) -> dict[str, float]:
        painted = model.paint(model.said(shown)[0]) / vae.config.scaling_factor
        drawn = vae.decode(painted).sample
        both = torch.stack([shown.target, drawn], 1).flatten(0, 1)
        Image.fromarray(picture_grid(both, 12)).save(out / "samples.png")
        return {}

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        muon_learning_rate=muon_learning_rate,
        warmup_steps=50,
        decay_fraction=0.3,
        ema_decay=0.995,
        seed=seed,
        log_every=20,
        sample_every=50,
        checkpoint_minutes=5,
    )
    ema = train(out, model, config, loss, sample, minutes)
    ema.text.save_pretrained(out / "text_encoder")
    return ema
