"""What a step of `pretrain` sees, pictures and noise, from (seed, step) alone."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dte_lab.backbone import Backbone
from dte_lab.common.random import stream
from dte_lab.training.config import PretrainConfig
from dte_lab.training.step import ALONE, EncoderBatch, Noise, Processes, make_batch
from dte_lab.training.streams import StreamedPictures

MOST_WORKERS = 8  # of a process, for reading pictures


class StepBatches:
    """Indices of one process's share of each batch, of `gradient_accumulation` a step.

    A batch is drawn with replacement from a generator of its own; they are counted through.
    """

    def __init__(
        self, size: int, config: PretrainConfig, first: int, processes: Processes = ALONE
    ) -> None:
        self.size, self.config, self.first, self.processes = size, config, first, processes

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first) * self.config.gradient_accumulation

    def __iter__(self) -> Iterator[list[int]]:
        parts = self.config.gradient_accumulation
        for part in range(self.first * parts, self.config.steps * parts):
            generator = stream(self.config.seed, part, 0)
            batch = torch.randint(self.size, (self.config.batch_size,), generator=generator)
            yield self.processes.share(batch).tolist()


def batches_of(
    dataset: Dataset,
    config: PretrainConfig,
    first: int,
    device: torch.device,
    processes: Processes = ALONE,
) -> DataLoader:
    """This process's pictures from step `first` on; of a stream without an end."""
    options = loading(dataset, config.num_workers, device)
    if not isinstance(dataset, StreamedPictures):
        batches = StepBatches(len(dataset), config, first, processes)
        return DataLoader(dataset, batch_sampler=batches, **options)
    share = config.batch_size // processes.count
    part = dataset.part(processes, first * config.gradient_accumulation * share)
    return DataLoader(part, batch_size=share, **options)


def loading(
    dataset: Dataset, num_workers: int | None, device: torch.device
) -> dict[str, int | bool]:
    """Options of a DataLoader.

    A GPU gets its pictures from workers, by default so many as there are cores, of `MOST_WORKERS`
    at most, and from pinned memory; on a CPU workers would take from the training. A stream has one
    at most, which keeps its order.
    """
    gpu = device.type == "cuda"
    cores = min(MOST_WORKERS, os.cpu_count() or 1) if gpu else 0
    workers = cores if num_workers is None else num_workers
    most = 1 if isinstance(dataset, StreamedPictures) else workers
    return {"num_workers": min(workers, most), "pin_memory": gpu}


def prepare(
    backbone: Backbone,
    pictures: dict[str, Any],
    config: PretrainConfig,
    part: int,
    processes: Processes = ALONE,
) -> EncoderBatch:
    """`make_batch` with random numbers drawn for the whole batch, of which this takes its share.

    part: the number of the batch, that of the step where one batch makes a step.
    """
    generator, T = stream(config.seed, part, 1), len(backbone.alphas_cumprod)

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
