"""A text tower that says pictures, and a start in closed form for it.

Each of a caption's last 16 end tokens says the latents of one cell; a linear reader takes them out.
What a word says of a cell is another linear map for each cell, but a transformer has the same
weights at all positions, and finding out how to tell them apart takes it millions of samples. Here
each position starts with its share of the hidden units of each layer: a gate, linear in the state,
opens them there alone (`open_gates`). Training changes these weights as it does all others. Ours.
"""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from dte_lab.common.checkpoint import save_folder
from dte_lab.common.files import write_atomically
from dte_lab.common.weights import load_weights, read_tensors
from dte_lab.world.align import ridge
from dte_lab.world.clip import CELLS, WORDS, cells, from_cells

PAINTER = "painter.safetensors"  # the reader's weights, in a folder of parts
GATE = 5.0  # what a gate adds where it is open, and takes away where it is shut
SPREAD = 1.2  # std of what a hidden unit then says
SHYNESS = 0.1  # penalty on what opens a unit at other positions
SAID = 0.15  # how loud a latent of 1 is in a state
LATER_ATTENTION = 0.05  # factor of what the attentions after the first add
EXAMPLES_AT_ONCE = 128


class TextPainter(nn.Module):
    """A text tower and a linear reader of its last end states, from 192 numbers to 96."""

    def __init__(self, text: CLIPTextModelWithProjection, channels: int) -> None:
        """channels: of a latent. The tower's projection is not trained here."""
        super().__init__()
        self.text = text
        self.cell = nn.Linear(text.config.hidden_size, channels)
        text.text_projection.requires_grad_(False)

    def states(
        self,
        ids: Int[Tensor, "batch tokens"],
        is_slot: Bool[Tensor, "batch tokens"],
        v: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The last states of captions, with words v in their slots."""

        def insert(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            return torch.where(is_slot[..., None], v[:, None].to(out), out)

        hook = self.text.get_input_embeddings().register_forward_hook(insert)
        try:
            return self.text(ids).last_hidden_state
        finally:
            hook.remove()

    def paint(
        self, states: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch channels 4 4"]:
        """What states say: scaled latents."""
        return from_cells(self.cell(states[:, WORDS:])).float()

    def save(self, folder: Path) -> None:
        """`text_encoder` and PAINTER in a folder."""
        save_folder(self.text, Path(folder) / "text_encoder")
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.cell.state_dict().items()}
        write_atomically(Path(folder) / PAINTER, save(tensors))

    @classmethod
    def load(cls, folder: Path) -> "TextPainter":
        """What `save` wrote, in single precision. Raises DTEError where it is not there."""
        path = Path(folder) / PAINTER
        load = CLIPTextModelWithProjection.from_pretrained
        text = load_weights(load, Path(folder) / "text_encoder", dtype=torch.float32)
        shapes = {"weight": ("channels", text.config.hidden_size), "bias": ("channels",)}
        reader = read_tensors(path, shapes, "dte world train text writes one that is whole")
        painter = cls(text, len(reader["bias"]))
        painter.cell.load_state_dict(reader)
        return painter


def low_rank(
    x: Float[Tensor, "examples dim"],
    y: Float[Tensor, "examples channels"],
    rank: int,
    shy: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, "dim rank"], Float[Tensor, "rank channels"]]:
    """Reduced-rank regression: A and B with y about x A B, for centred x and y.

    shy: a penalty, in units of x's squares.
    """
    weight = torch.linalg.solve(x.T @ x + shy, x.T @ y)  # (d, c)
    _, _, v = torch.linalg.svd(x @ weight, full_matrices=False)
    return weight @ v[:rank].T, v[:rank]


@torch.no_grad()
def open_gates(
    layer: nn.Module,
    seen: Float[Tensor, "examples cells dim"],
    residual: Float[Tensor, "examples cells channels"],
    write: Float[Tensor, "dim channels"],
) -> None:
    """Set a layer's two linear maps so that it adds `residual` to what the reader reads.

    seen: what the first map is given at the cells. residual: latents that the tower does not say
    yet. write: what to add to a state to say latents. Each position has a 16th of the hidden units;
    the last of them cancels what the open gates of the others add.
    """
    first, second = layer.mlp.fc1, layer.mlp.fc2
    share = first.out_features // CELLS
    mean = seen.mean((0, 1))
    flat = (seen - mean).flatten(0, 1)
    one_hot = torch.eye(CELLS, device=seen.device).repeat(len(seen), 1)
    gate = ridge(flat, one_hot - 1 / CELLS, 1e-4)  # (d, 16)
    # What tells positions apart must not open other positions' gates: it is read by gates alone.
    where = torch.linalg.qr((seen.mean(0) - mean).T)[0]  # (d, 16)
    unit = torch.eye(len(where), device=seen.device)
    free = unit - where @ where.T
    centred = ((seen - seen.mean(0)) @ free).flatten(0, 1)
    pooled = centred.T @ centred / CELLS  # nor must a gate be opened by what other positions say
    shy = SHYNESS * pooled + 1e-4 * pooled.diag().mean() * unit
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


@torch.no_grad()
def start_painter(
    painter: TextPainter,
    ids: Int[Tensor, "examples tokens"],
    is_slot: Bool[Tensor, "examples tokens"],
    v: Float[Tensor, "examples dim"],
    latents: Float[Tensor, "examples channels 4 4"],
) -> list[float]:
    """Start a painter, whose words have started (`start_words`), as one that says latents.

    ids, is_slot, v and latents are examples. Returns the mean squared error after the reader alone,
    and after each layer but the last.
    """
    layers, truth, errors = painter.text.text_model.encoder.layers, cells(latents), []
    for i, layer in enumerate(layers):
        if i > 0:
            layer.self_attn.out_proj.weight.mul_(LATER_ATTENTION)
        nn.init.zeros_(layer.mlp.fc2.weight)
        nn.init.zeros_(layer.mlp.fc2.bias)

    def states(module: nn.Module) -> tuple[Tensor, Tensor]:
        """What a module is given, and the last states, at the cells: (n, 16, d) each."""
        given, last, at_once = [], [], EXAMPLES_AT_ONCE
        hook = module.register_forward_pre_hook(lambda m, args: given.append(args[0][:, WORDS:]))
        for part in zip(*(x.split(at_once) for x in (ids, is_slot, v)), strict=True):
            last.append(painter.states(*part)[:, WORDS:])
        hook.remove()
        return torch.cat(given), torch.cat(last)

    before, last = states(painter.text.text_model.final_layer_norm)
    loudness = before.std(-1).mean()  # the last layer norm divides by it
    random = torch.randn(before.shape[-1], truth.shape[-1], device=before.device)
    write = SAID * torch.linalg.qr(random)[0]  # (d, c)
    painter.cell.weight.copy_(loudness / SAID**2 * write.T)
    painter.cell.bias.add_((truth - painter.cell(last)).mean((0, 1)))
    for layer in layers[:-1]:
        seen, last = states(layer.mlp)
        residual = truth - painter.cell(last)
        errors.append(residual.square().mean().item())
        open_gates(layer, seen, residual, write)
    last = states(layers[0].mlp)[1]
    errors.append((truth - painter.cell(last)).square().mean().item())
    return errors
