"""A word space that is a space of pictures: what fills it, and where words start.

The word of a picture is linear: the principal components of the autoencoder's latents of the thing
on white, scaled to the norm of a word. 160 of them leave a quarter of the variance of things that
were never seen unexplained, in a style that was never seen, too; no network that we trained made a
better word of so few numbers. Words of the dictionary start at the same components of their things.
All of this is ours; the paper takes a base model whose word space is filled.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.common.weights import read_tensors
from dte_lab.world.clip import WIDTH, WORDS

PICTURE_WORDS = "picture_words.safetensors"  # in a folder of parts
CODE = 160  # dimensions of a word that say what its thing looks like; the others say the rest
ENTRY = 0.3  # root mean square of their entries
NAME = 3 * ENTRY  # last entry of the words of names, whose opposite all others have
NAME_PENALTY = 0.3  # of the ridge regression that gives words their codes; a name counts 1
CELL_ENTRY = 2.0  # std of a cell's position: large beside the rest, so that layer norms are linear
COPIED = 0.1  # what the words of a name add to a cell's state in the first attention


@dataclass
class PictureWords:
    """The linear map from scaled latents of things on white to words."""

    mean: Float[Tensor, " latent"]  # 1,536 numbers of each
    basis: Float[Tensor, "code latent"]

    @classmethod
    def fit(cls, latents: Float[Tensor, "things channels 4 4"]) -> "PictureWords":
        """Half-whitened principal components: divided by the square root of their deviation.

        Raises DTEError for fewer things than CODE.
        """
        if len(latents) < CODE:
            raise DTEError(f"Words of pictures need {CODE} drawings at least, not {len(latents)}.")
        flat = latents.flatten(1)
        mean = flat.mean(0)
        _, s, v = torch.linalg.svd(flat - mean, full_matrices=False)
        basis = v[:CODE] / (s[:CODE] / len(flat) ** 0.5).sqrt()[:, None]
        basis *= ENTRY / ((flat - mean) @ basis.T).square().mean().sqrt()
        return cls(mean, basis)

    def __call__(self, latents: Float[Tensor, "batch channels 4 4"]) -> Float[Tensor, "batch dim"]:
        words = latents.new_zeros(len(latents), WIDTH)
        words[:, :CODE] = (latents.flatten(1) - self.mean) @ self.basis.T
        words[:, -1] = NAME
        return words

    @classmethod
    def load(cls, path: Path) -> "PictureWords":
        """What `save` wrote. Raises DTEError for a file that is not there or holds other things."""
        shapes = {"mean": ("latent",), "basis": (CODE, "latent")}
        return cls(
            **read_tensors(path, shapes, "dte world train text writes the words of pictures")
        )

    def save(self, path: Path) -> None:
        """Write PICTURE_WORDS, in half precision."""
        state = {"mean": self.mean.half().contiguous(), "basis": self.basis.half().contiguous()}
        write_atomically(path, save({k: v.cpu() for k, v in state.items()}))

    def to(self, device: torch.device | str) -> "PictureWords":
        return PictureWords(self.mean.to(device), self.basis.to(device))


def unexplained_share(
    found: Float[Tensor, "batch dim"], words: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Of the variance of words, what others in their place leave unexplained."""
    return (found - words).square().mean() / (words - words.mean(dim=0)).square().mean()


@torch.no_grad()
def start_words(
    text: CLIPTextModelWithProjection,
    names: list[list[int]],
    codes: Float[Tensor, "names code"],
    weights: Float[Tensor, " names"],
    grammar: set[int],
) -> None:
    """Embeddings of the words of names, and a first attention that copies them to all positions.

    names: token ids of each name. codes: of their things; a name's is the sum of its words' by a
    ridge regression, in which it has a weight. grammar: tokens of no name. All other words, and the
    positions, have random values in the other dimensions, of which the last tells names from the
    rest; the cells' are large. The heads of the first CODE dimensions look for names.
    """
    tokens = text.text_model.embeddings.token_embedding.weight
    positions = text.text_model.embeddings.position_embedding.weight
    counts = torch.zeros(len(names), len(tokens), device=tokens.device)
    for row, ids in enumerate(names):
        for token in set(ids) - grammar:
            counts[row, token] = ids.count(token)
    is_name = counts.sum(0) > 0
    counts = counts[:, is_name]
    gram = counts.T @ (weights[:, None] * counts)
    gram += NAME_PENALTY * torch.eye(len(gram), device=gram.device)
    found = torch.linalg.solve(gram, counts.T @ (weights[:, None] * codes))  # (words, CODE)
    for weight in (tokens, positions):
        weight.normal_(0, ENTRY)
        weight[:, :CODE] = 0
    tokens[is_name] = 0
    tokens[is_name, :CODE] = found
    tokens[:, -1] = torch.where(is_name, NAME, -NAME)
    positions[WORDS:, CODE:] *= CELL_ENTRY / ENTRY
    positions[:, -1] = 0
    attention = text.text_model.encoder.layers[0].self_attn
    nn.init.zeros_(attention.q_proj.weight)
    attention.k_proj.weight.mul_(0.1)
    for first in range(0, CODE, attention.head_dim):
        attention.q_proj.bias[first] = attention.head_dim**0.5
        attention.k_proj.weight[first] = torch.eye(WIDTH)[-1]
    nn.init.eye_(attention.v_proj.weight)
    nn.init.eye_(attention.out_proj.weight).mul_(COPIED)
