"""The loss on classes that training never sees, in validation.jsonl.

At step 0 it is that of a fresh encoder, whose v* is a mixture of words and whose offsets are zero:
the start that a backbone without an encoder has. What training brings shows against that number.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset, default_collate

from dte_lab.common.resume import append_line
from dte_lab.encoder import TuningEncoder
from dte_lab.training.batches import prepare
from dte_lab.training.callbacks import StepResult
from dte_lab.training.config import PretrainConfig
from dte_lab.training.step import Frozen, training_step

ITEMS, MEASURED_AT_ONCE = 256, 16
SEED = 2**40  # of their noise, in every run
EVERY_CLASS = 20  # one of so many is held out


class Validation:
    """Lines {"step", "validation"}: the diffusion loss of the averaged encoder.

    The pictures, `ITEMS` spread over the dataset, their timesteps and their noise are always the
    same. The features see the noisy concept picture at a timestep of its own, as in `personalize`.
    """

    def __init__(
        self, path: Path, config: PretrainConfig, frozen: Frozen, average: TuningEncoder,
        dataset: Dataset,
    ) -> None:  # fmt: skip
        self.path, self.every, self.frozen, self.average = (
            path, config.validate_every, frozen, average,
        )  # fmt: skip
        self.config = replace(config, seed=SEED, shared_timestep_probability=0)
        self.dataset = dataset
        self.indices = torch.linspace(0, len(dataset) - 1, min(ITEMS, len(dataset))).long()

    def __call__(self, result: StepResult) -> None:
        if result.step % self.every == 0 or result.last:
            self.write(result.step)

    def write(self, step: int) -> None:
        """Append the loss of the encoder as it is now; step 0 begins the file anew."""
        if step == 0:
            self.path.unlink(missing_ok=True)
        append_line(self.path, {"step": step, "validation": self.loss()})

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over the pictures."""
        total = 0.0
        for k, indices in enumerate(self.indices.split(MEASURED_AT_ONCE)):
            pictures = default_collate([self.dataset[i] for i in indices.tolist()])
            batch = prepare(self.frozen.backbone, pictures, self.config, k)
            with training_step(self.average, self.frozen, batch, enqueue=False) as (losses, _):
                total += losses["diffusion"].item() * len(indices)
        return total / len(self.indices)


def hold_out(dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """What to train on, and each twentieth class; None where there are fewer classes.

    dataset: its `concepts` (n,) are the classes of its items.
    """
    held = torch.as_tensor(dataset.concepts) % EVERY_CLASS == EVERY_CLASS - 1
    if not held.any():
        return dataset, None
    train, held_out = (which.nonzero().flatten().tolist() for which in (~held, held))
    return Subset(dataset, train), Subset(dataset, held_out)
