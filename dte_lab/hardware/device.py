"""How much of a device's memory was in use."""

import ctypes
import gc
import platform
from pathlib import Path

import torch


def give_back_free_memory() -> None:
    """Hand to the system what the C library keeps: it would hide what is taken from it next."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Peak memory in MB from here to `read`, above what was in use; None where it is not known.

    device: the one that is asked, which need not be torch's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                give_back_free_memory()
                Path("/proc/self/clear_refs").write_text("5")  # Linux: peak := current
            self.before = self._now()
        except OSError:
            self.before = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

    def read(self) -> float | None:
        return None if self.before is None else self._now() - self.before
