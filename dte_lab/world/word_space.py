"""A word space that is a space of pictures: where the text tower starts, and what fills it.

The word of a picture is linear: the principal components of the autoencoder's latents of the thing
on white, scaled to the norm of a word. 160 of them leave a quarter of the variance of things that
were never seen unexplained, in a style that was never seen, too; no network that we trained made a
better word of so few numbers. Words of the dictionary start at the same components of their things.

The tower starts as one that says these pictures. What a word says of a cell is another linear map
for each of the 16 cells, but a transformer has the same weights at all positions, and finding out
how to tell them apart takes it millions of samples. Here each position starts with its share of the
hidden units of each layer: a gate, linear in the state, opens them there alone (`open_gates`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.world.align import ridge
from dte_lab.world.clip import CELLS, WORDS, cells

PICTURE_WORDS = "picture_words.safetensors"
CODE = 160  # dimensions of a word that say what its thing looks like; see train_clip
ENTRY = 0.3  # root mean square of their entries
GATE = 5.0  # what a gate adds where it is open, and takes away where it is shut
SPREAD = 1.2  # std of what a hidden unit then says
SHYNESS = 0.1
CELL_ENTRY = 2.0  # std of a cell's position: large beside the rest, so that layer norms are linear
COPY, SAID = 0.1, 0.15  # what a name adds to a cell's state, and how loud a latent of 1 is in it


@dataclass
class PictureWords:
    """The linear map from latents on white (B, 96, 4, 4) to words (B, d)."""

    mean: Tensor  # (1536,)
    basis: Tensor  # (CODE, 1536)
    width: int = 192

    @classmethod
    def fit(cls, latents: Tensor, width: int = 192) -> "PictureWords":
        """From latents (N, 96, 4, 4) of many things on white; half-whitened components."""
        flat = latents.flatten(1)
        mean = flat.mean(0)
        _, s, v = torch.linalg.svd(flat - mean, full_matrices=False)
        basis = v[:CODE] / (s[:CODE] / len(flat) ** 0.5).sqrt()[:, None]
        basis *= ENTRY / ((flat - mean) @ basis.T).square().mean().sqrt()
        return cls(mean, basis, width)

    @classmethod
    def load(cls, path: Path) -> "PictureWords":
        """What `save` wrote. Raises DTEError for a file that holds something else."""
        try:
            state = load_file(path)
            return cls(state["mean"].float(), state["basis"].float())
        except (OSError, SafetensorError, KeyError) as error:
            raise DTEError(f"{path} holds no words of pictures ({error}).") from error

    def save(self, path: Path) -> None:
        """Write PICTURE_WORDS, in half precision."""
        state = {"mean": self.mean.half().contiguous(), "basis": self.basis.half().contiguous()}
        write_atomically(path, save(state))

    def to(self, device: torch.device | str) -> "PictureWords":
        return PictureWords(self.mean.to(device), self.basis.to(device), self.width)

    def __call__(self, latents: Tensor) -> Tensor:
        words = latents.new_zeros(len(latents), self.width)
        words[:, :CODE] = (latents.flatten(1) - self.mean) @ self.basis.T
        words[:, -1] = 3 * ENTRY  # as names of the dictionary: see start_from_pictures
        return words


@torch.no_grad()
def start_words(
    text: CLIPTextModelWithProjection,
    names: list[list[int]],
    codes: Tensor,
    grammar: set[int],
    weights: Tensor,
) -> None:
    """Embeddings of the words of names, and a first attention that copies them to all positions.

    names: token ids of each name. codes (N, CODE): of their things. grammar: tokens of no name.
    """
    tokens = text.text_model.embeddings.token_embedding.weight
    positions = text.text_model.embeddings.position_embedding.weight
    counts = torch.zeros(len(names), len(tokens))
    for row, ids in zip(counts, names, strict=True):
        for token in set(ids) - grammar:
            row[token] += ids.count(token)
    gram = counts.T @ (weights[:, None] * counts) + 0.3 * torch.eye(len(tokens))
    found = torch.linalg.solve(gram, counts.T @ (weights[:, None] * codes))  # (tokens, CODE)
    is_name = counts.sum(0) > 0
    for weight in (tokens, positions):
        weight.normal_(0, ENTRY)
        weight[:, :CODE] = 0
    tokens[is_name] = 0
    tokens[is_name, :CODE] = found[is_name]
    tokens[:, -1] = torch.where(is_name, 3 * ENTRY, -3 * ENTRY)
    positions[WORDS:, CODE:] *= CELL_ENTRY / ENTRY
    positions[:, -1] = 0
    attention = text.text_model.encoder.layers[0].self_attn
    nn.init.zeros_(attention.q_proj.weight)
    attention.k_proj.weight.mul_(0.1)
    for first in range(0, CODE, attention.head_dim):  # these heads look for names
        attention.q_proj.bias[first] = attention.head_dim**0.5
        attention.k_proj.weight[first] = torch.eye(len(tokens.T))[-1]
    nn.init.eye_(attention.v_proj.weight)
    nn.init.eye_(attention.out_proj.weight).mul_(COPY)


def low_rank(x: Tensor, y: Tensor, rank: int, shy: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced-rank regression: A (d, rank) and B (rank, c) with y about x A B, for x, y centred.

    shy (d, d): a penalty, in units of x's squares.
    """
    weight = torch.linalg.solve(x.T @ x + shy, x.T @ y)  # (d, c)
    _, _, v = torch.linalg.svd(x @ weight, full_matrices=False)
    return weight @ v[:rank].T, v[:rank]


@torch.no_grad()
def open_gates(
    layer: nn.Module, seen: Tensor, residual: Tensor, write: Tensor, shyness: float = SHYNESS
) -> None:
    """Set a layer's two linear maps so that it adds `residual` to what the reader reads.

    seen (n, 16, d): what the first map is given at the cells. residual (n, 16, c): latents that the
    tower does not say yet. write (d, c): what to add to a state to say latents. Each position has a
    16th of the hidden units; the last of them cancels what the open gates of the others add.
    """
    first, second = layer.mlp.fc1, layer.mlp.fc2
    share = first.out_features // CELLS
    mean = seen.mean((0, 1))
    flat = (seen - mean).flatten(0, 1)
    one_hot = torch.eye(CELLS).repeat(len(seen), 1)
    gate = ridge(flat, one_hot - 1 / CELLS, 1e-4)  # (d, 16)
    # What tells positions apart must not open other positions' gates: it is read by gates alone.
    where = torch.linalg.qr((seen.mean(0) - mean).T)[0]  # (d, 16)
    free = torch.eye(len(where)) - where @ where.T
    centred = ((seen - seen.mean(0)) @ free).flatten(0, 1)
    pooled = centred.T @ centred / CELLS  # nor must a gate be opened by what other positions say
    shy = shyness * pooled + 1e-4 * pooled.diag().mean() * torch.eye(len(pooled))
    for k in range(CELLS):
        x, y = (seen[:, k] - seen[:, k].mean(0)) @ free, residual[:, k] - residual[:, k].mean(0)
        a, b = low_rank(x, y, share - 1, shy)  # (d, r), (r, c)
        spread = torch.maximum((x @ a).std(0), (centred @ a).std(0)) / SPREAD
        a, b = free @ a / spread, b * spread[:, None]
        rows = slice(k * share, (k + 1) * share)
        opening = 2 * GATE * gate[:, k]
        first.weight[rows] = opening
        first.weight[rows][: share - 1] += a.T
        first.bias[rows] = GATE * (2 / CELLS - 1) - opening @ mean
        first.bias[rows][: share - 1] -= seen[:, k].mean(0) @ a
        constant = (residual[:, k].mean(0) - GATE * b.sum(0)) / GATE  # (c,)
        second.weight[:, rows] = write @ torch.cat([b, constant[None]]).T
    second.bias.zero_()


class Recorder:
    """Keeps what a module is given while it is watched."""

    def __init__(self, module: nn.Module):
        self.given = []
        self.hook = module.register_forward_pre_hook(lambda m, args: self.given.append(args[0]))

    def done(self) -> Tensor:
        self.hook.remove()
        return torch.cat(self.given)


@torch.no_grad()
def start_painter(model, ids: Tensor, is_slot: Tensor, v: Tensor, latents: Tensor) -> list[float]:
    """Start a `Words` model (whose `start_words` is done) as one that says latents.

    ids, is_slot (n, T), v (n, d) and latents (n, 96, 4, 4) are examples. Returns the mean squared
    error after the reader alone, and after each layer but the last.
    """
    layers, truth, errors = model.text.text_model.encoder.layers, cells(latents), []
    for i, layer in enumerate(layers):
        if i > 0:
            layer.self_attn.out_proj.weight.mul_(0.05)
        nn.init.zeros_(layer.mlp.fc2.weight)
        nn.init.zeros_(layer.mlp.fc2.bias)

    def states(module: nn.Module) -> tuple[Tensor, Tensor]:
        """What a module is given, and the last states, at the cells: (n, 16, d) each."""
        recorder = Recorder(module)
        parts = zip(ids.split(128), is_slot.split(128), v.split(128), strict=True)
        last = torch.cat([model.states(*part)[:, WORDS:] for part in parts])
        return recorder.done()[:, WORDS:], last

    before, last = states(model.text.text_model.final_layer_norm)
    loudness = before.std(-1).mean()  # the last layer norm divides by it
    write = SAID * torch.linalg.qr(torch.randn(before.shape[-1], truth.shape[-1]))[0]  # (d, c)
    model.cell.weight.copy_(loudness / SAID**2 * write.T)
    model.cell.bias.copy_((truth - model.cell(last)).mean((0, 1)) + model.cell.bias)
    for layer in layers[:-1]:
        seen, last = states(layer.mlp)
        residual = truth - model.cell(last)
        errors.append(residual.square().mean().item())
        open_gates(layer, seen, residual, write)
    errors.append((truth - model.cell(states(layers[0].mlp)[1])).square().mean().item())
    return errors
