"""Each use of a seed has a stream of its own."""

import numpy as np
import torch

from dte_lab.common.random import stream


def draw(*arguments):
    return torch.randn(64, generator=stream(*arguments))


def test_a_stream_depends_on_seed_and_use_alone():
    assert torch.equal(draw(3, "tuning"), draw(3, "tuning"))
    seen = [
        draw(*arguments)
        for arguments in [
            (3,), (3, "tuning"), (3, "initial noise"), (4, "tuning"), (-3, "tuning"), (3, 1),
            (3, 0, 1), (3, 1, 1), (3, "tuning", 1), (1, 3),
        ]
    ]  # fmt: skip
    seen.append(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    assert np.abs(np.corrcoef(torch.stack(seen).numpy()) - np.eye(len(seen))).max() < 0.6


def test_numbers_stay_from_version_to_version():
    """Seeds are written in results and concept files."""
    torch.testing.assert_close(draw(0, "tuning")[:2], torch.tensor([1.76687, 0.91615]))
    state = np.random.SeedSequence([5, 7, 1]).generate_state(1, np.uint64)[0]
    old = torch.Generator().manual_seed(int(state) >> 1)  # of a step of pre-training
    assert torch.equal(draw(5, 7, 1), torch.randn(64, generator=old))
