"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for all the rest.

torch.optim.Muon refuses convolutions, and its Newton-Schulz iteration is in bfloat16, which takes
seconds a step on a CPU without instructions for it; this one flattens convolutions and is told the
precision.
"""

import re

import torch
import torch.distributed as dist
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


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of a matrix (m, n) with singular value decomposition U S V^T, found in dtype."""
    a, b, c = COEFFICIENTS
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `muon=True` take Muon's step instead.

    Updates are scaled to the root mean square of AdamW's (arXiv 2502.16982), 0.2 times the rate.
    """

    def __init__(self, params, dtype: torch.dtype = torch.float32, **options):
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
            if not group.get("muon"):
                continue
            updates = [self._update(p, i) for i, p in enumerate(group["params"])]
            share_sums(updates)
            for p, update in zip(group["params"], updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])

    def _update(self, p: Tensor, index: int) -> Tensor:
        """The step of a matrix; zeros if it is for another process to compute."""
        state = self.state[p]
        if not state:  # AdamW, when it loads, expects to find a step everywhere
            state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(p)
        state["step"] += 1
        momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        if dist.is_initialized() and index % dist.get_world_size() != dist.get_rank():
            return torch.zeros_like(p)
        update = p.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov
        update = orthogonalise(update, self.dtype)
        return update.mul(0.2 * max(update.shape) ** 0.5).view(p.shape)


def share_sums(tensors: list[Tensor]) -> None:
    """Replace tensors by their sums over all processes; does nothing in a process alone."""
    if dist.is_initialized() and tensors:
        flat = torch._utils._flatten_dense_tensors(tensors)
        dist.all_reduce(flat)
        torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))
