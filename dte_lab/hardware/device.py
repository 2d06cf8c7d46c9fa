"""Which device is there, and how much of its memory was in use."""

import ctypes
import gc
import os
import platform
from pathlib import Path

import torch


def checked_device(device: str | None) -> str:
    """The device to use; with several processes each has its own GPU.

    Raises ValueError when CUDA is asked for and is not there.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "torch finds no CUDA device: use --device cpu, or ask dte doctor what is there."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def give_back_free_memory():
    """Hand to the system what the C library keeps: it would hide what is taken from it next."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Peak memory in MB from here to `read`, above what was in use; None where it is not known."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        try:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                give_back_free_memory()
                Path("/proc/self/clear_refs").write_text("5")  # Linux: peak := current
            self.before = self._now()
        except OSError:
            self.before = None

    def _now(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

    def read(self):
        return None if self.before is None else self._now() - self.before
