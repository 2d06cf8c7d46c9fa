"""Attention over the few tokens of the small backbone, fast on a CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def short_attention(device: torch.device | str) -> AbstractContextManager:
    """A context in which attention on a CPU is plain matrix products.

    In bfloat16 and over 16 to 64 tokens, the backward of the flash kernel that torch would choose
    takes a third of a training step, plain products a tenth. On other devices nothing changes.
    """
    cpu = torch.device(device).type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext()
