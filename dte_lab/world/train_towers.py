"""Phase 2 of CLIP's training: pictures and texts meet by contrast; see train_clip.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from dte_lab.world.captions import caption
from dte_lab.world.clip import build_image_tower, tokenize, whitening
from dte_lab.world.data import (
    caption_bank,
    from_bytes,
    indices,
    one_caption,
    picture_bank,
    random_batch,
    random_items,
    random_rows,
)
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, split_names
from dte_lab.world.train_text import CAPTIONS, first_end_state, kinds_of
from dte_lab.world.training import PartOptions, TrainConfig, train


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


class TowersTraining:
    """What `train` calls: the losses of random pictures with their captions, and hits on new ones.

    pictures: bytes of N items. captions: token ids of theirs. labels: their numbers by "concept",
    "style" and "scene", (N,) each. classes: for each of these the states of all texts among which
    it must be found, (n, d). kinds: number of the kind of each concept. test: pictures and labels.
    """

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        pictures: UInt8[Tensor, "items 3 height width"],
        captions: Int[Tensor, "items count tokens"],
        labels: dict[str, Int[Tensor, " items"]],
        classes: dict[str, Float[Tensor, "texts dim"]],
        kinds: Int[Tensor, " concepts"],
        batch_size: int,
        test: tuple[Tensor, dict[str, Tensor]],
    ) -> None:
        self.text, self.pictures, self.captions, self.labels = text, pictures, captions, labels
        self.classes, self.kinds, self.batch_size, self.test = classes, kinds, batch_size, test

    @contextmanager
    def loss(self, model: Towers) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        rows = random_rows(self.pictures, self.batch_size)
        image = model.image(augment(from_bytes(self.pictures[rows]))).image_embeds
        texts = end_states(self.text, one_caption(self.captions, rows))
        logits = model.logits(image, texts)  # (B, B)
        own = torch.arange(len(logits), device=logits.device)
        cross_entropy = nn.functional.cross_entropy
        losses = {"caption": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2}
        truth = {key: label[rows] for key, label in self.labels.items()}
        scores = {key: model.logits(image, self.classes[key]) for key in truth}
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


@torch.no_grad()
def end_states(
    text: CLIPTextModelWithProjection, ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch dim"]:
    """The state of the first end token, which CLIP projects."""
    return first_end_state(text(ids).last_hidden_state, ids, text.config.eos_token_id)


def class_states(
    text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, names: list[str]
) -> dict[str, Float[Tensor, "texts dim"]]:
    """States of the texts among which what is in a picture must be found."""
    texts = {
        "concept": [caption(name, None, None) for name in names],
        "style": [f"a {style} picture of a thing" for style in STYLES],
        "scene": [caption("thing", None, scene) for scene in SCENES],
    }
    return {k: end_states(text, tokenize(tokenizer, t).to(text.device)) for k, t in texts.items()}


def train_towers(
    out: Path, tokenizer: CLIPTokenizer, text: CLIPTextModelWithProjection, options: PartOptions
) -> Towers:
    """The trained towers, with the projection of the text tower."""
    torch.manual_seed(options.seed)
    device, names = options.device, split_names("train")
    rng = np.random.default_rng((options.seed, 79))
    items = random_items(rng, options.bank_size)
    pictures = picture_bank(items).to(device)  # (N, 3, 64, 64)
    captions = caption_bank(tokenizer, items, rng, CAPTIONS).to(device)
    labels = {key: index.to(device) for key, index in indices(items, names).items()}
    image = build_image_tower(from_bytes(pictures[:1024]).cpu())
    model = Towers(image, text.text_projection.requires_grad_(True))
    # The states of all captions are nearly parallel; whitened, they start apart from each other.
    with torch.no_grad():
        some = end_states(text, captions[:2048, 0])
        model.projection.weight.copy_(whitening(some, len(model.projection.weight)))
    x_test, _, test_items = random_batch(np.random.default_rng(10_000), 400)
    training = TowersTraining(
        text,
        pictures,
        captions,
        labels,
        class_states(text, tokenizer, names),
        kinds_of(names).to(device),
        options.batch_size,
        (x_test.to(device), indices(test_items, names)),
    )
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        ema_decay=0.998,
        seed=options.seed,
        mixed_precision=options.mixed_precision,
        sample_every=250,
    )
    return train(
        out, model, config, training.loss, training.sample, options.minutes, device,
        options.settings("towers"),
    )  # fmt: skip
