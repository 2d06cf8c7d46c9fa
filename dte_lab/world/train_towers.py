"""Train CLIP's picture tower and both projections: pictures and texts meet by contrast.

dte world train towers --out DIR --parts DIR --wide CACHE

`parts` holds the tokenizer and the text_encoder that is to stay, the one that the denoiser was
trained with: its states are frozen. The picture tower and the projections learn to match pictures
with captions, and drawings of the small world with the name, style and scene among all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from dte_lab.common.checkpoint import save_folder
from dte_lab.common.weights import load_weights
from dte_lab.world.batches import Captions
from dte_lab.world.captions import caption
from dte_lab.world.clip import build_image_processor, build_image_tower, tokenize, whitening
from dte_lab.world.data import indices, random_item, rendered
from dte_lab.world.drawings import drawings_to_train_on
from dte_lab.world.options import PartOptions
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, concepts
from dte_lab.world.training import TrainConfig, train

SMALL_SHARE = 0.4  # of a batch: train things of the small world, whose names, ... must be found
STATES = 20_000  # of captions of each world, kept
WHITENED_ON = 1500  # captions of each world


class Towers(nn.Module):
    """Picture tower, projection of the frozen text tower, and a temperature (arXiv 2103.00020)."""

    def __init__(self, image: CLIPVisionModelWithProjection, projection: nn.Linear) -> None:
        super().__init__()
        self.image, self.projection = image, projection
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def logits(
        self, image: Float[Tensor, "batch projected"], pooled: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "batch texts"]:
        """Image embeddings and text states -> scaled cosines."""
        text = nn.functional.normalize(self.projection(pooled), dim=-1)
        scale = self.log_scale.clamp(max=np.log(100)).exp()
        return scale * nn.functional.normalize(image, dim=-1) @ text.T


def augment(
    x: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Shift pictures by up to 3 px and scale their colours by up to 15 %.

    For the picture tower alone, which is to know things that it has not seen.
    """
    window = torch.arange(x.shape[-1], device=x.device)
    top, left = torch.randint(7, (2, 1), device=x.device)
    x = nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    x = x.index_select(2, window + top).index_select(3, window + left)
    gains = 1 + 0.15 * (2 * torch.rand(len(x), 3, 1, 1, device=x.device) - 1)
    return ((x + 1) * gains - 1).clamp(-1, 1)


def first_end_state(
    states: Float[Tensor, "batch tokens dim"],
    input_ids: Int[Tensor, "batch tokens"],
    eos_token_id: int,
) -> Float[Tensor, "batch dim"]:
    """Of states, that of the first end token, which CLIP projects."""
    first = (input_ids == eos_token_id).int().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), first]


@torch.no_grad()
def end_states(
    text: CLIPTextModelWithProjection, ids: Int[Tensor, "texts tokens"]
) -> Float[Tensor, "texts dim"]:
    """The state of the first end token of each text."""
    eos = text.config.eos_token_id
    parts = ids.to(text.device).split(512)
    return torch.cat([first_end_state(text(p).last_hidden_state, p, eos) for p in parts])


class CaptionBank:
    """Captions with the states of their first end tokens, in half precision."""

    def __init__(self, text: CLIPTextModelWithProjection, captions: Captions) -> None:
        self.captions, self.states = captions, end_states(text, captions.ids).half()

    def __call__(
        self, size: int
    ) -> tuple[Int[Tensor, " size"], Float[Tensor, "size 3 64 64"], Float[Tensor, "size dim"]]:
        """Numbers of random captions, what they say, and their states."""
        which = self.captions.random(size)
        return which, self.captions.pictures(which), self.states[which].float()


def labels_of(captions: Captions) -> dict[str, Int[Tensor, " captions"]]:
    """Which train thing, style and scene each caption of the small world says."""
    row, style = captions.rows // len(STYLES), captions.rows % len(STYLES)
    return {"concept": row, "style": style, "scene": captions.scenes}


def class_states(
    text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, names: list[str]
) -> dict[str, Float[Tensor, "texts dim"]]:
    """States of the texts among which what is in a picture must be found."""
    texts = {
        "concept": [caption(name, None, None) for name in names],
        "style": [f"a {style} picture of a thing" for style in STYLES],
        "scene": [caption("thing", None, scene) for scene in SCENES],
    }
    return {k: end_states(text, tokenize(tokenizer, t)) for k, t in texts.items()}


def kinds_of(names: list[str]) -> Int[Tensor, " names"]:
    """The kind of thing (subgroup, as a number) that each of the names is."""
    kinds = sorted({c.subgroup for c in concepts().values()})
    return torch.tensor([kinds.index(concepts()[name].subgroup) for name in names])


@dataclass
class TowersTraining:
    """What `train` calls: the losses of random pictures with their captions, and hits on new ones.

    small, wide: captions of both worlds. labels: of the small one's by "concept", "style", "scene".
    classes: for each of these the states of all texts among which it must be found. kinds: number
    of the kind of each concept. test: pictures and labels.
    """

    small: CaptionBank
    wide: CaptionBank
    labels: dict[str, Int[Tensor, " captions"]]
    classes: dict[str, Float[Tensor, "texts dim"]]
    kinds: Int[Tensor, " concepts"]
    batch_size: int
    test: tuple[Float[Tensor, "pictures 3 64 64"], dict[str, Int[Tensor, " pictures"]]]

    @contextmanager
    def loss(self, model: Towers) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        size = round(self.batch_size * SMALL_SHARE)
        rows, x, states = self.small(size)
        _, other, other_states = self.wide(self.batch_size - size)
        image = model.image(augment(torch.cat([x, other]))).image_embeds
        logits = model.logits(image, torch.cat([states, other_states]))  # (B, B)
        own = torch.arange(len(logits), device=logits.device)
        cross_entropy = nn.functional.cross_entropy
        losses = {"caption": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2}
        truth = {key: label[rows] for key, label in self.labels.items()}
        scores = {key: model.logits(image[:size], self.classes[key]) for key in truth}
        for key, index in truth.items():
            losses[key] = cross_entropy(scores[key], index)
        # A picture's kind: its share of the softmax over names, added up over names of one kind.
        same_kind = self.kinds == self.kinds[truth["concept"]][:, None]  # (B, concepts)
        shares = (scores["concept"].softmax(1) * same_kind).sum(1)
        losses["kind"] = -shares.clamp(min=1e-6).log().mean()
        yield sum(losses.values()), losses

    def sample(self, model: Towers, step: int) -> dict[str, float]:
        pictures, labels = self.test
        image = model.image(pictures).image_embeds
        found = {key: model.logits(image, self.classes[key]).argmax(1).cpu() for key in labels}
        return {f"{k}_top1": (found[k] == v).float().mean().item() for k, v in labels.items()}


def build_towers(
    text: CLIPTextModelWithProjection, small: CaptionBank, wide: CaptionBank
) -> Towers:
    """Towers that start with white patches, and with white states of captions: as they are, these
    are nearly parallel."""
    banks = (small, wide)
    x = torch.cat([bank.captions.pictures(bank.captions.random(512)) for bank in banks])
    model = Towers(build_image_tower(x.cpu()), text.text_projection.requires_grad_(True))
    some = torch.cat([bank.states[:WHITENED_ON] for bank in banks]).float()
    with torch.no_grad():
        model.projection.weight.copy_(whitening(some, len(model.projection.weight)))
    return model


def main(
    out: Path,
    parts: Path,
    wide: Path,
    steps: int = 2500,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 160,
    count: int | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train, and save `image_encoder`, `feature_extractor` and, with its projection,
    `text_encoder` to `out`.

    wide: cache of the wide world. count: of its and the small world's drawings, None for all.
    """
    options = PartOptions(steps, minutes, seed, batch_size, count, device, mixed_precision)
    device = options.device
    out, parts = Path(out), Path(parts)
    load = CLIPTextModelWithProjection.from_pretrained
    text = load_weights(load, parts / "text_encoder", dtype=torch.float32)
    text = text.eval().requires_grad_(False).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    drawings = drawings_to_train_on(wide, count, device)
    names = drawings.train_names
    banks = [
        CaptionBank(text, Captions(tokenizer, drawings, share, STATES, seed))
        for share in (0.0, 1.0)
    ]
    torch.manual_seed(seed)
    model = build_towers(text, *banks)
    rng = np.random.default_rng(10_000)
    items = [random_item(rng, names) for _ in range(400)]
    training = TowersTraining(
        *banks,
        {key: label.to(device) for key, label in labels_of(banks[0].captions).items()},
        class_states(text, tokenizer, names),
        kinds_of(names).to(device),
        batch_size,
        (rendered(items).to(device), indices(items, names)),
    )
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        warmup_steps=100,
        ema_decay=0.998,
        mixed_precision=mixed_precision,
        seed=seed,
        sample_every=250,
    )
    settings = options.settings("towers")
    towers = train(out, model, config, training.loss, training.sample, minutes, device, settings)
    text.text_projection = towers.projection
    save_folder(text, out / "text_encoder")
    save_folder(towers.image, out / "image_encoder")
    save_folder(build_image_processor(), out / "feature_extractor")
