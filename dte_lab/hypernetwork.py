"""The encoder's trunk and its two heads.

features -> convolutional fusion -> tokens -> token head        -> residual of v*
                                          -> LoRA hypernetwork  -> offsets A, B

The token head reads the fused tokens and CLIP's patches in their places as well, with linear maps.

The hypernetwork asks one learned query per (layer, projection, side) about the fused tokens, and
turns each answer into a matrix with a linear head shared by all matrices of that shape. ("ours":
the paper gives neither the architecture nor the initialisation.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dte_lab.features import to_grid
from dte_lab.lora import Offsets


class TokenHead(nn.Module):
    """Tokens and CLIP patches -> residual of v* in units of `residual_unit`, zero at first.

    The mean of the tokens no longer knows what is where; `read_tokens` and `read` do. The latter is
    linear in the patches, so that training/first_words.py can fit it at once. ("ours")
    """

    def __init__(
        self, width: int, token_dim: int, clip_dim: int, grid: int, patch_channels: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, token_dim)
        patch_channels = min(patch_channels, clip_dim)
        self.narrow = nn.Conv2d(clip_dim, patch_channels, 1, bias=False)
        self.read = nn.Linear(patch_channels * grid**2, token_dim, bias=False)
        self.narrow_tokens = nn.Linear(width, patch_channels, bias=False)
        self.read_tokens = nn.Linear(patch_channels * grid**2, token_dim, bias=False)
        for last in (self.out.weight, self.out.bias, self.read.weight, self.read_tokens.weight):
            nn.init.zeros_(last)

    def forward(
        self, tokens: Float[Tensor, "batch n width"], patches: Float[Tensor, "batch clip p p"]
    ) -> Float[Tensor, "batch dim"]:
        from_tokens = self.out(F.silu(self.hidden(tokens.mean(dim=1))))  # (B, dim)
        in_places = self.narrow_tokens(tokens).flatten(1)  # (B, grid^2 * patch_channels)
        from_places = self.read_tokens(in_places / in_places.shape[1] ** 0.5)  # (B, dim)
        return from_tokens + from_places + self.read(self.places(patches))

    def places(self, patches: Float[Tensor, "batch clip p p"]) -> Float[Tensor, "batch places"]:
        """What `read` reads: `patch_channels` numbers of each of grid^2 places.

        Divided by the root of their number, so that one step of AdamW moves v* by little.
        """
        x = to_grid(self.narrow(F.group_norm(patches.contiguous(), 1)), self.grid).flatten(1)
        return x / x.shape[1] ** 0.5


class CrossBlock(nn.Module):
    """Queries read from tokens, then an MLP; pre-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, queries: Float[Tensor, "batch queries width"], tokens: Float[Tensor, "batch n width"]
    ) -> Float[Tensor, "batch queries width"]:
        queries = queries + self.attn(self.norm1(queries), tokens, tokens, need_weights=False)[0]
        return queries + self.mlp(self.norm2(queries))


class Group(NamedTuple):
    """The matrices of one kind and shape, which one head makes."""

    side: str  # "A", "B", or "W" for whole matrices
    shape: tuple[int, int]
    std: float  # of the head's first weights
    numbers: list[int]  # of the matrices, each of which has the query of its number


class Trunk(nn.Module):
    """Learned queries read from tokens; linear heads turn the answers into matrices.

    groups: {name of a head: Group}; together they number the queries from 0.
    """

    def __init__(self, groups: dict[str, Group], width: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.groups = groups
        count = sum(len(group.numbers) for group in groups.values())
        self.queries = nn.Parameter(torch.randn(count, width))
        self.blocks = nn.ModuleList([CrossBlock(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict()
        for name, group in groups.items():
            rows, columns = group.shape
            self.heads[name] = head = nn.Linear(width, rows * columns, bias=False)
            nn.init.normal_(head.weight, std=group.std)
            index = torch.tensor(group.numbers)  # kept on the device
            self.register_buffer(f"of_{name}", index, persistent=False)

    def answers(
        self, tokens: Float[Tensor, "batch n width"]
    ) -> Float[Tensor, "batch queries width"]:
        """What the queries find in the tokens."""
        queries = self.queries.expand(len(tokens), -1, -1)  # (B, Q, width)
        for block in self.blocks:
            queries = block(queries, tokens)
        return self.norm(queries)

    def matrices(
        self, tokens: Float[Tensor, "batch n width"]
    ) -> dict[int, Float[Tensor, "batch _ _"]]:
        """{number of a matrix: it}, each of the shape of its group."""
        answers, matrices = self.answers(tokens), {}  # (B, Q, width)
        for name, group in self.groups.items():
            out = self.heads[name](answers[:, self.get_buffer(f"of_{name}")])  # (B, q, rows * cols)
            out = out.unflatten(-1, group.shape)  # (B, q, rows, columns)
            matrices |= zip(group.numbers, out.unbind(1), strict=True)
        return matrices


class LoRAHypernetwork(Trunk):
    """Tokens (B, N, width) -> {"layer.projection": (A (B, Din, r), B (B, r, Dout))}.

    One query per (layer, projection, side); the heads grow with the number of distinct widths, not
    with the number of layers.

    A starts with entries of variance 1/Din, so that x A has the scale of x; B starts at exactly
    zero, so that W + A B = W. `offset_scale` multiplies B, which makes a learning rate near 1e-3
    move the layers' outputs by a few percent a step instead of by their own size.
    """

    def __init__(
        self, projections: dict[str, tuple[int, int]], rank: int, width: int, num_heads: int,
        depth: int, offset_scale: float,
    ) -> None:  # fmt: skip
        keys = sorted(projections)  # a reloaded configuration comes in another order
        groups = {}
        for i, key in enumerate(keys):  # matrix 2i is the A of key i, matrix 2i+1 its B
            d_in, d_out = projections[key]
            a = Group("A", (d_in, rank), (width * d_in) ** -0.5, [])
            b = Group("B", (rank, d_out), 0.0, [])
            groups.setdefault(f"A{d_in}", a).numbers.append(2 * i)
            groups.setdefault(f"B{d_out}", b).numbers.append(2 * i + 1)
        super().__init__(groups, width, num_heads, depth)
        self.keys, self.rank, self.offset_scale = keys, rank, offset_scale

    def forward(self, tokens: Float[Tensor, "batch n width"]) -> Offsets:
        matrices = self.matrices(tokens)
        return {
            key: (matrices[2 * i], self.offset_scale * matrices[2 * i + 1])
            for i, key in enumerate(self.keys)
        }


class FullHypernetwork(Trunk):
    """Tokens (B, N, width) -> {"layer.projection": (W_delta (B, Din, Dout), identity)}.

    The paper's alternative to low rank, for comparison: the same trunk with one query per (layer,
    projection), and heads of Din * Dout outputs. Whole matrices go through the same code as pairs
    A, B, with an identity for B (`lora.is_whole`). Starts as an exact no-op.
    """

    def __init__(
        self, projections: dict[str, tuple[int, int]], width: int, num_heads: int, depth: int,
        offset_scale: float,
    ) -> None:  # fmt: skip
        keys, groups = sorted(projections), {}
        for i, key in enumerate(keys):
            d_in, d_out = projections[key]
            group = Group("W", (d_in, d_out), 0.0, [])
            groups.setdefault(f"{d_in}x{d_out}", group).numbers.append(i)
        super().__init__(groups, width, num_heads, depth)
        self.keys, self.offset_scale = keys, offset_scale

    def forward(self, tokens: Float[Tensor, "batch n width"]) -> Offsets:
        matrices, offsets = self.matrices(tokens), {}
        for i, key in enumerate(self.keys):
            w = matrices[i] * self.offset_scale * matrices[i].shape[1] ** -0.5  # (B, Din, Dout)
            eye = torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
            offsets[key] = w, eye.expand(len(w), -1, -1)
        return offsets


def build_hypernetwork(
    projections: dict[str, tuple[int, int]], rank: int | str, width: int, num_heads: int,
    depth: int, offset_scale: float,
) -> Trunk:  # fmt: skip
    """The hypernetwork of a rank: 1, 2, ..., or "full" for whole matrices."""
    if rank == "full":
        return FullHypernetwork(projections, width, num_heads, depth, offset_scale)
    return LoRAHypernetwork(projections, rank, width, num_heads, depth, offset_scale)


def count_parameters(
    projections: dict[str, tuple[int, int]], rank: int | str, width: int, num_heads: int, depth: int
) -> dict[str, int]:
    """Parameters of the hypernetwork for a UNet's {key: (Din, Dout)}, allocating nothing.

    rank: 1, 2, ..., or "full" for whole matrices. Returns a dict: `hypernetwork`, trunk and heads;
    `heads` alone; `offsets`, the values that it predicts for one concept.
    """
    with torch.device("meta"):
        net = build_hypernetwork(projections, rank, width, num_heads, depth, 1.0)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    sizes = [(i * o if rank == "full" else (i + o) * rank) for i, o in projections.values()]
    return {"hypernetwork": count(net), "heads": count(net.heads), "offsets": sum(sizes)}
