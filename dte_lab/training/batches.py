"""What a step of `pretrain` sees, pictures and noise, from (seed, step) alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dte_lab.backbone import Backbone
from dte_lab.common.random import stream
from dte_lab.training.config import PretrainConfig
from dte_lab.training.step import ALONE, EncoderBatch, Noise, Processes, make_batch


class StepBatches:
    """Indices of one process's share of each step's batch.

    The batch is drawn with replacement from the step's own generator.
    """

    def __init__(
        self, size: int, config: PretrainConfig, first: int, processes: Processes = ALONE
    ) -> None:
        self.size, self.config, self.first, self.processes = size, config, first, processes

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.config.steps):
            generator = stream(self.config.seed, step, 0)
            batch = torch.randint(self.size, (self.config.batch_size,), generator=generator)
            yield self.processes.share(batch).tolist()


def prepare(
    backbone: Backbone,
    pictures: dict[str, Any],
    config: PretrainConfig,
    step: int,
    processes: Processes = ALONE,
) -> EncoderBatch:
    """`make_batch` with random numbers drawn for the whole batch, of which this takes its share."""
    generator, T = stream(config.seed, step, 1), len(backbone.alphas_cumprod)

    def draw(both: Tensor) -> Noise:
        B = len(both) // 2 * processes.count

        def share(x: Tensor) -> Tensor:
            return processes.share(x).to(both.device)

        def timesteps() -> Tensor:
            return share(torch.randint(T, (B,), generator=generator))

        def normal() -> Tensor:
            return share(torch.randn((B, *both.shape[1:]), generator=generator))

        t, noise, own_t, own_noise = timesteps(), normal(), timesteps(), normal()
        shared = torch.rand(B, generator=generator) < config.shared_timestep_probability
        return Noise(noise, t, own_noise, own_t, share(shared))

    return make_batch(backbone, pictures, draw)
