"""The state of a training run in one file, which is never half written; and its learning rate.

Shared by the pre-training of the encoder and the training of the small base model.
"""

from contextlib import contextmanager

import torch
from safetensors import safe_open
from safetensors.torch import save

from dte_lab.common.files import write_atomically


def trapezoid(step, steps, warmup_steps, decay_fraction):
    """Factor of the learning rate: linear warm-up, constant, linear decay to zero at `steps`."""
    warm = (step + 1) / max(1, warmup_steps)
    decay = (steps - step) / max(1, int(decay_fraction * steps))
    return min(1.0, warm, decay)


def write_state(path, parts, optimizer, metadata):
    """Write parts {name: {key: tensor}}, the optimizer's state and metadata {str: str} to `path`.

    The tensors are called "part.key", and "optimizer.index.key" with the parameter's index.
    """
    tensors = {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    write_atomically(path, save(tensors, metadata))


def read_state(path):
    """Undo `write_state`: (parts, with the optimizer's as "optimizer"; metadata)."""
    parts = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            part, rest = key.split(".", 1)
            parts.setdefault(part, {})[rest] = file.get_tensor(key)
        return parts, file.metadata()


@torch.no_grad()
def restore_optimizer(optimizer, state):
    """Load {"index.key": tensor} into an optimizer of the same parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    restored = {}
    for key, value in state.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:  # fused AdamW takes for granted that strides agree
            value = torch.empty_like(parameter).copy_(value)
        restored.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})


@contextmanager
def ema_weights(ema, encoder):
    """The encoder with the weights of a diffusers EMAModel, inside the block."""
    parameters = list(encoder.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
