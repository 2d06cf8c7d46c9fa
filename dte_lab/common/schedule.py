"""How the learning rate and the average of the weights follow the steps, in every training here."""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn


def trapezoid(step: int, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay to zero at `steps`."""
    warm = (step + 1) / max(1, warmup_steps)
    decay = (steps - step) / max(1, int(decay_fraction * steps))
    return min(1.0, warm, decay)


def ema_weight(step: int, decay: float) -> float:
    """Of the newest weights; large at first, so that the start is forgotten in short runs."""
    return 1 - min(decay, (1 + step) / (10 + step))


def average_of(model: nn.Module) -> nn.Module:
    """A copy for the exponential moving average of the weights; buffers stay the model's own."""
    shared = {id(buffer): buffer for buffer in model.buffers()}
    return deepcopy(model, shared).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, weight: Float[Tensor, ""]) -> None:
    """average += weight (model - average), all parameters at once.

    By hand: EMAModel of diffusers and AveragedModel of torch look at a number of the host at each
    step, which a captured CUDA graph cannot, and both forget the start at once.
    """
    old, new = list(average.parameters()), list(model.parameters())
    difference = torch._foreach_sub(new, old)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(old, difference)
