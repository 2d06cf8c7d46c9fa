"""Random numbers: each use of a seed has a stream of its own.

Two uses that start a generator from the same seed would draw the *same* numbers: noise of the
features that is the noise from which sampling starts, for instance.
"""

import zlib

import numpy as np
import torch


def stream(seed: int, *use: int | str) -> torch.Generator:
    """A CPU generator for one use of a seed: the same on every device and in every process.

    use: what the numbers are for, words or numbers, such as ("tuning",) or (step, 0); always as
    many for one use, since numpy takes (step,) and (step, 0) for the same.

    >>> noise = torch.randn(4, generator=stream(0, "initial noise"))
    """
    keys = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in use]
    state = np.random.SeedSequence([seed % 2**64, *keys]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
