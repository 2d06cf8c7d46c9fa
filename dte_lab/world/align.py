"""Start the denoiser reading: two heads of each cross-attention look at their own cell.

The last end tokens of a caption say what each cell of the picture holds (see painter). Which
token belongs to which position is the same for all captions, and a network that starts at random
needs hours to find out. This is ours: three ridge regressions say it at the start. Training changes
these weights as it does all others.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from jaxtyping import Float, Num
from torch import Tensor

from dte_lab.world.clip import CELLS, WORDS, cells

STRENGTH = 30.0  # factor of queries and of keys: most of the attention falls on one cell
HEADS = 2  # of four; the others start at random


def ridge(
    x: Float[Tensor, "examples dim"], y: Float[Tensor, "examples out"], penalty: float
) -> Float[Tensor, "dim out"]:
    """Weights that give y from x; the penalty is relative to x's power."""
    gram = x.T @ x
    return torch.linalg.solve(
        gram + penalty * gram.diag().mean() * torch.eye(len(gram), device=x.device), x.T @ y
    )


def cell_blocks(unet: UNet2DConditionModel) -> list[BasicTransformerBlock]:
    """The transformer blocks, whose positions are the 4x4 cells."""
    attentions = [
        *unet.down_blocks[0].attentions,
        *unet.mid_block.attentions,
        *unet.up_blocks[0].attentions,
    ]
    return [attention.transformer_blocks[0] for attention in attentions]


@torch.no_grad()
def align(
    unet: UNet2DConditionModel,
    x_t: Float[Tensor, "examples channels 4 4"],
    t: Num[Tensor, " examples"],
    states: Float[Tensor, "examples tokens dim"],
    latents: Float[Tensor, "examples channels 4 4"],
) -> None:
    """Set query, key, value and output weights of the cross-attentions of `cell_blocks`.

    x_t at timesteps t, the texts' states and the true latents are examples.
    Features tell positions apart because a convolution sees where the padding is.
    """
    blocks, features = cell_blocks(unet), {}
    hooks = [
        block.norm2.register_forward_hook(
            lambda module, args, out, i=i: features.setdefault(i, []).append(out)
        )
        for i, block in enumerate(blocks)
    ]
    for part in zip(x_t.split(64), t.split(64), states.split(64), strict=True):
        unet(*part)
    for hook in hooks:
        hook.remove()
    one_hot = torch.eye(CELLS, device=states.device)
    which = torch.cat([one_hot.new_zeros(WORDS, CELLS), one_hot]).repeat(len(states), 1)
    key = ridge(states.flatten(0, 1), which, 1e-4)  # (d, 16)
    content = states[:, WORDS:].flatten(0, 1)
    truth = cells(latents).flatten(0, 1)
    value = ridge(content - content.mean(0), truth - truth.mean(0), 1e-3)  # (d, c)
    for i, block in enumerate(blocks):
        x = torch.cat(features[i]).flatten(0, 1)
        query = ridge(x, one_hot.repeat(len(states), 1), 1e-2)
        attention = block.attn2
        width = attention.to_q.out_features // attention.heads  # 48 of the 96 numbers of a cell
        for head in range(HEADS):
            rows = slice(head * width, (head + 1) * width)
            first = head * (value.shape[1] - width) // (HEADS - 1)
            attention.to_q.weight[rows] = 0
            attention.to_q.weight[rows][:CELLS] = STRENGTH * query.T
            attention.to_k.weight[rows] = 0
            attention.to_k.weight[rows][:CELLS] = STRENGTH * key.T
            attention.to_v.weight[rows] = value[:, first : first + width].T
            attention.to_out[0].weight[:, rows] = 0
