"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for all the rest.

torch.optim.Muon refuses convolutions, and its Newton-Schulz iteration is in bfloat16, which takes
seconds a step on a CPU without instructions for it; this one flattens convolutions, takes batches
of matrices, and is told the precision.
"""

import re
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Coefficients and number of the Newton-Schulz iterations, and momentum: as in torch.optim.Muon.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of linear layers and convolutions inside the layers or blocks of a network.

    Embeddings, first and last layers are not among them, as Muon's author advises.
    """
    inside = re.compile(r"(layers|blocks?|conv[12])\.")
    named = model.named_parameters()
    return [p for name, p in named if p.ndim > 1 and p.requires_grad and inside.search(name)]


def orthogonalise(
    matrices: Float[Tensor, "*batch rows columns"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch rows columns"]:
    """About U V^T of each matrix with decomposition U S V^T, found in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `muon=True` take Muon's step instead.

    There, a parameter of three dimensions is a batch of matrices, one of four a convolution.

    Updates are scaled to the root mean square of AdamW's (arXiv 2502.16982), 0.2 times the rate.
    """

    def __init__(self, params: Iterable, dtype: torch.dtype = torch.float32, **options) -> None:
        """dtype: of the orthogonalisation. options: of AdamW."""
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._muon(group)

    def _muon(self, group: dict) -> None:
        """Muon's step; matrices of one shape are made orthogonal together."""
        shapes = {}
        for p in group["params"]:
            state = self.state[p]
            if not state:  # AdamW, when it loads, expects to find a step everywhere
                state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(p)
            state["step"] += 1
            momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            update = p.grad.lerp(momentum, MOMENTUM)  # Nesterov
            update = update.flatten(1) if p.ndim == 4 else update
            shapes.setdefault(update.shape, []).append((p, update))
        for shape, pairs in shapes.items():
            updates = orthogonalise(torch.stack([update for _, update in pairs]), self.dtype)
            updates *= 0.2 * max(shape[-2:]) ** 0.5 * group["lr"]
            for (p, _), update in zip(pairs, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view(p.shape))
