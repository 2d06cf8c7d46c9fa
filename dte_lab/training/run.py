"""What `pretrain` works with: the processes, and a run that is fresh or goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import Dataset

from dte_lab.backbone import Backbone
from dte_lab.common.checkpoint import CHECKPOINT, Checkpoint
from dte_lab.common.errors import DTEError
from dte_lab.common.schedule import average_of
from dte_lab.encoder import TuningEncoder
from dte_lab.training.config import PRETRAIN_FREE_TO_CHANGE, PretrainConfig
from dte_lab.training.optimizer import build_optimizer
from dte_lab.training.step import Frozen, Processes
from dte_lab.training.streams import StreamedPictures


@dataclass
class PretrainRun:
    """What a call of `pretrain` works with; `model` is the encoder as the processes share it."""

    accelerator: Accelerator
    processes: Processes
    checkpoint: Checkpoint
    frozen: Frozen
    encoder: TuningEncoder
    model: nn.Module
    average: TuningEncoder
    optimizer: torch.optim.Optimizer
    first: int  # steps that are finished


def set_up(
    backbone: Backbone,
    encoder: TuningEncoder,
    dataset: Dataset,
    config: PretrainConfig,
    out_dir: Path,
    initialise: Callable[[TuningEncoder], None] | None = None,
) -> PretrainRun:
    """A fresh run, or the one that `out_dir` holds: see `pretrain`."""
    accelerator = accelerator_for(backbone, config)
    if config.batch_size % accelerator.num_processes:
        raise DTEError(
            f"A batch of {config.batch_size} cannot be shared out evenly to "
            f"{accelerator.num_processes} processes."
        )
    backbone.to(accelerator.device)
    encoder.to(accelerator.device).train().requires_grad_(True)
    settings = {"train": config, "encoder": encoder.settings, "method": encoder.method}
    streamed = isinstance(dataset, StreamedPictures)
    pictures = dataset.source if streamed else len(dataset)
    settings |= {"model": type(encoder).__name__, "pictures": pictures}
    checkpoint = Checkpoint(out_dir / CHECKPOINT, "dte pretrain", settings, PRETRAIN_FREE_TO_CHANGE)
    if initialise is not None and not checkpoint.path.is_file():
        initialise(encoder)
    optimizer = build_optimizer(encoder.parameters(), config.weight_decay, config.optimizer_8bit)
    model, optimizer = accelerator.prepare(encoder, optimizer)
    average = average_of(encoder)  # now: `prepare` may put new buffers in the place of the old
    first = checkpoint.load(encoder, average, optimizer)
    accelerator.wait_for_everyone()  # all have read the logs that the first one is going to write
    return PretrainRun(
        accelerator=accelerator,
        processes=Processes(accelerator.process_index, accelerator.num_processes),
        checkpoint=checkpoint,
        frozen=Frozen.of(backbone, encoder),
        encoder=encoder,
        model=model,
        average=average,
        optimizer=optimizer,
        first=first,
    )


def accelerator_for(backbone: Backbone, config: PretrainConfig) -> Accelerator:
    """The processes of this launch.

    Buffers are not broadcast: words are the same in all processes, and the bank stays so, since
    each writes into it what it gathered from all.
    Raises DTEError where the launch would share out the encoder's weights.
    """
    AcceleratorState._reset_state()  # a run before, in this process, may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=backbone.device.type == "cpu",
        gradient_accumulation_steps=config.gradient_accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise DTEError(
            "The encoder is small enough for every process to hold it whole: launch without "
            "--use_fsdp or --use_deepspeed."
        )
    return accelerator
