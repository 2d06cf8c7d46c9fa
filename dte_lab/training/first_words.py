"""Start the token head reading: v* of a picture, from a ridge regression on CLIP's patches.

The words of the train concepts are known, and their pictures are many. From these the regression
learns what a part of a word's embedding looks like, and names unseen things better than the
zero-shot guess, of which nothing is left. This is ours. Training changes these weights as it does
all others.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone
from dte_lab.encoder import TuningEncoder
from dte_lab.world.align import ridge
from dte_lab.world.data import random_item, rendered
from dte_lab.world.sprites import split_names

PENALTY = 0.5  # chosen on val


def name_embeddings(backbone: Backbone, names: list[str]) -> Float[Tensor, "names dim"]:
    """The mean of the embeddings of each name's tokens."""
    table = backbone.text_encoder.get_input_embeddings().weight.detach().float()
    ids = backbone.tokenizer(names, add_special_tokens=False).input_ids
    return torch.stack([table[row].mean(dim=0) for row in ids])


def fit_token_head(
    encoder: TuningEncoder,
    backbone: Backbone,
    names: list[str] | None = None,
    pictures: int = 4000,
    seed: int = 0,
) -> None:
    """`fit_reading` on pictures of things whose names are known.

    names: concepts whose pictures are looked at, by default all of train.
    """
    rng, names = np.random.default_rng(seed), names or split_names("train")
    items = [random_item(rng, names) for _ in range(pictures)]
    fit_reading(
        encoder, backbone, rendered(items), name_embeddings(backbone, [name for name, *_ in items])
    )


@torch.no_grad()
def fit_reading(
    encoder: TuningEncoder,
    backbone: Backbone,
    pixels: Float[Tensor, "pictures 3 height width"],
    words: Float[Tensor, "pictures dim"],
) -> None:
    """Set `narrow`, `read` and the bias of a fresh encoder's token head; `zero_shot_weight` to 0.

    pixels: in [-1, 1]. words: embeddings of what they show.
    """
    head, patches = encoder.token_head, []
    for part in tqdm(pixels.split(128), desc="first words"):
        patches.append(encoder.image_features(backbone, part).patches)
    patches = torch.cat(patches)  # (n, c, p, p)

    # narrow: the directions in which patches differ most
    channels = F.group_norm(patches, 1).transpose(0, 1).flatten(1)  # (c, n p p)
    directions = torch.linalg.eigh(torch.cov(channels)).eigenvectors.flip(-1)  # most first
    rows = len(head.narrow.weight)
    head.narrow.weight.copy_(directions.T[:rows, :, None, None])

    x = torch.cat([head.places(part) for part in patches.split(512)])
    y = words / encoder.residual_unit
    weight = ridge(x - x.mean(dim=0), y - y.mean(dim=0), PENALTY)
    head.read.weight.copy_(weight.T)
    head.out.bias.copy_(y.mean(dim=0) - x.mean(dim=0) @ weight)
    encoder.zero_shot_weight.zero_()
