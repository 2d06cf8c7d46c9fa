"""The encoder's trunk and its two heads.

features -> convolutional fusion -> tokens -> token head        -> residual of v*
                                          -> LoRA hypernetwork  -> offsets A, B

The token head reads CLIP's patches as well, each in its place, with one linear map.

The hypernetwork asks one learned query per (layer, projection, side) about the fused tokens, and
turns each answer into a matrix with a linear head shared by all matrices of that shape. ("ours":
the paper gives neither the architecture nor the initialisation.)
"""

import torch
import torch.nn.functional as F
from torch import nn

from dte_lab.features import to_grid


class TokenHead(nn.Module):
    """Tokens (B, N, d), CLIP patches (B, c, p, p) -> residual of v* (B, token_dim), zero at first.

    The mean of the tokens no longer knows what is where; `read` does. It is linear in the patches,
    so that it can be fitted at once, as world/first_words.py does. ("ours")
    """

    def __init__(self, width, token_dim, clip_dim, grid, patch_channels):
        super().__init__()
        self.grid = grid
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, token_dim)
        patch_channels = min(patch_channels, clip_dim)
        self.narrow = nn.Conv2d(clip_dim, patch_channels, 1, bias=False)
        self.read = nn.Linear(patch_channels * grid**2, token_dim, bias=False)
        for last in (self.out.weight, self.out.bias, self.read.weight):
            nn.init.zeros_(last)

    def forward(self, tokens, patches):
        from_tokens = self.out(F.silu(self.hidden(tokens.mean(dim=1))))
        return from_tokens + self.read(self.places(patches))

    def places(self, patches):
        """What `read` reads: (B, c, p, p) -> (B, patch_channels * grid^2).

        Divided by the root of their number, so that one step of AdamW moves v* by little.
        """
        x = to_grid(self.narrow(F.group_norm(patches.contiguous(), 1)), self.grid).flatten(1)
        return x / x.shape[1] ** 0.5


class CrossBlock(nn.Module):
    """Queries (B, Q, d) read from tokens (B, N, d), then an MLP; pre-norm."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries, tokens):
        queries = queries + self.attn(self.norm1(queries), tokens, tokens, need_weights=False)[0]
        return queries + self.mlp(self.norm2(queries))


class Trunk(nn.Module):
    """Learned queries read from tokens (B, N, d): -> answers (B, Q, d)."""

    def __init__(self, num_queries, width, num_heads, depth):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.blocks = nn.ModuleList([CrossBlock(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def index_queries(self):
        """Keep which queries each head answers, `groups`, on the device."""
        for name, index in self.groups.items():
            self.register_buffer(f"of_{name}", torch.tensor(index), persistent=False)

    def answers(self, tokens):
        queries = self.queries.expand(len(tokens), -1, -1)  # (B, Q, d)
        for block in self.blocks:
            queries = block(queries, tokens)
        return self.norm(queries)


class LoRAHypernetwork(Trunk):
    """Tokens (B, N, d) -> {"layer.projection": (A (B, Din, r), B (B, r, Dout))}.

    One query per (layer, projection, side); the heads grow with the number of distinct widths, not
    with the number of layers.

    A starts with entries of variance 1/Din, so that x A has the scale of x; B starts at exactly
    zero, so that W + A B = W. `offset_scale` multiplies B, which makes a learning rate near 1e-3
    move the layers' outputs by a few percent a step instead of by their own size.
    """

    def __init__(self, projections, rank, width, num_heads, depth, offset_scale):
        super().__init__(2 * len(projections), width, num_heads, depth)
        self.rank, self.offset_scale = rank, offset_scale
        self.keys = sorted(projections)  # a reloaded configuration comes in another order
        # Matrix 2i is the A of key i, matrix 2i+1 its B; `dims` holds Din or Dout.
        dims = [dim for key in self.keys for dim in projections[key]]
        self.groups = {}  # name of the head -> the matrices it makes
        for i, dim in enumerate(dims):
            self.groups.setdefault(f"{'AB'[i % 2]}{dim}", []).append(i)

        self.heads = nn.ModuleDict()
        for name in self.groups:
            dim = int(name[1:])
            head = nn.Linear(width, dim * rank, bias=False)
            std = (width * dim) ** -0.5 if name[0] == "A" else 0.0
            nn.init.normal_(head.weight, std=std)
            self.heads[name] = head
        self.index_queries()

    def forward(self, tokens):
        answers, matrices = self.answers(tokens), {}  # (B, Q, d)
        for name, index in self.groups.items():
            out = self.heads[name](answers[:, self.get_buffer(f"of_{name}")])  # (B, q, dim*r)
            if name[0] == "A":
                out = out.unflatten(-1, (-1, self.rank))  # (B, q, Din, r)
            else:
                out = self.offset_scale * out.unflatten(-1, (self.rank, -1))  # (B, q, r, Dout)
            matrices |= zip(index, out.unbind(1), strict=True)
        return {key: (matrices[2 * i], matrices[2 * i + 1]) for i, key in enumerate(self.keys)}


class FullHypernetwork(Trunk):
    """Tokens (B, N, d) -> {"layer.projection": (W_delta (B, Din, Dout), identity)}.

    The paper's alternative to low rank, for comparison: the same trunk with one query per (layer,
    projection), and heads of Din * Dout outputs. Whole matrices go through the same code as pairs
    A, B, with an identity for B. Starts as an exact no-op.
    """

    def __init__(self, projections, width, num_heads, depth, offset_scale):
        super().__init__(len(projections), width, num_heads, depth)
        self.keys, self.offset_scale = sorted(projections), offset_scale
        self.groups = {}  # name of the head -> the keys of its shape
        for i, key in enumerate(self.keys):
            self.groups.setdefault("{}x{}".format(*projections[key]), []).append(i)
        self.heads = nn.ModuleDict()
        for name in self.groups:
            d_in, d_out = map(int, name.split("x"))
            self.heads[name] = head = nn.Linear(width, d_in * d_out, bias=False)
            nn.init.zeros_(head.weight)
        self.index_queries()

    def forward(self, tokens):
        answers, offsets = self.answers(tokens), {}  # (B, Q, d)
        for name, index in self.groups.items():
            d_in, d_out = map(int, name.split("x"))
            out = self.heads[name](answers[:, self.get_buffer(f"of_{name}")])
            out = out.unflatten(-1, (d_in, d_out))
            out = out * self.offset_scale * d_in**-0.5  # (B, q, Din, Dout)
            eye = torch.eye(d_out, device=out.device).expand(len(out), -1, -1)
            offsets |= {self.keys[i]: (out[:, j], eye) for j, i in enumerate(index)}
        return {key: offsets[key] for key in self.keys}


def build_hypernetwork(projections, rank, width, num_heads, depth, offset_scale):
    """The hypernetwork of a rank: 1, 2, ..., or "full" for whole matrices."""
    if rank == "full":
        return FullHypernetwork(projections, width, num_heads, depth, offset_scale)
    return LoRAHypernetwork(projections, rank, width, num_heads, depth, offset_scale)


def count_parameters(projections, rank, width, num_heads, depth):
    """Parameters of the hypernetwork for a UNet's {key: (Din, Dout)}, allocating nothing.

    rank: 1, 2, ..., or "full" for whole matrices. Returns a dict: `hypernetwork`, trunk and heads;
    `heads` alone; `offsets`, the values that it predicts for one concept.
    """
    with torch.device("meta"):
        net = build_hypernetwork(projections, rank, width, num_heads, depth, 1.0)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    sizes = [(i * o if rank == "full" else (i + o) * rank) for i, o in projections.values()]
    return {"hypernetwork": count(net), "heads": count(net.heads), "offsets": sum(sizes)}
