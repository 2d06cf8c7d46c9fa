"""The housekeeping of `pretrain`, after each step: log, watched predictions, pictures, state.

Each callback is called with a `StepResult` and does its part when that is due. What belongs to a
step is written before the checkpoint that calls the step finished, so `Save` comes last: a run that
was killed anywhere and is called again writes whatever is missing, and ends as it would have.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.common.checkpoint import Checkpoint, save_folder
from dte_lab.common.images import save_png, to_pil
from dte_lab.common.resume import append_line
from dte_lab.encoder import EncoderPrediction, TuningEncoder
from dte_lab.pipeline import DTEPipeline
from dte_lab.tokens import TokenTable
from dte_lab.training.predictions import Predictions


@dataclass
class StepResult:
    """What a step leaves; `step` counts the finished ones, `last` of this call is the last.

    skipped: names of pictures that could not be read; None where the dataset does not say.
    """

    step: int
    losses: dict[str, Tensor]
    prediction: EncoderPrediction
    grad_norm: Tensor
    learning_rate: float
    skipped: Sequence[str] | None
    last: bool = False


class Log:
    """Lines of log.jsonl, the progress bar, and each line to the user's `callback`."""

    def __init__(
        self, path: Path, every: int, accelerator: Accelerator, table: TokenTable, bar: tqdm,
        callback: Callable[[dict], None] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.every, self.accelerator, self.table = path, every, accelerator, table
        self.bar, self.callback, self.started = bar, callback, time.monotonic()

    def __call__(self, result: StepResult) -> None:
        self.bar.update()
        if result.skipped is not None and (names := gather_object(list(result.skipped))):
            self.write({"step": result.step, "skipped": names})
        if result.step % self.every and not result.last:
            return
        line = {name: value.item() for name, value in result.losses.items()}
        line |= statistics(result.prediction, self.table)
        line = mean_over_processes(self.accelerator, line)
        line |= {"grad_norm": float(result.grad_norm), "learning_rate": result.learning_rate}
        self.bar.set_postfix(loss=f"{line['diffusion']:.4f}")
        self.write({"step": result.step, **line, "seconds": time.monotonic() - self.started})

    def write(self, line: dict) -> None:
        if self.accelerator.is_main_process:
            append_line(self.path, line)
            if self.callback is not None:
                self.callback(line)


class Probe:
    """Lines of predictions.jsonl, of pictures of other concepts each: see predictions.py."""

    def __init__(
        self, path: Path, every: int, pipe: DTEPipeline, images: Sequence[Image.Image]
    ) -> None:
        self.every, self.average = every, pipe.encoder
        self.predictions = Predictions(path, pipe, pipe.pixels(images))

    def __call__(self, result: StepResult) -> None:
        if result.step % self.every == 0 or result.last:
            self.write(result.step)

    def write(self, step: int) -> None:
        self.predictions.write(self.average, step)


class SampleGrids:
    """Pictures in `folder` from the average's predictions alone, and to the user's `callback`."""

    def __init__(
        self, folder: Path, every: int, pipe: DTEPipeline, images: Sequence[Image.Image],
        prompts: Sequence[str], callback: Callable[[dict], None] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.every, self.pipe = folder, every, pipe
        self.images, self.prompts, self.callback = images, prompts, callback

    def __call__(self, result: StepResult) -> None:
        if result.step % self.every == 0 or result.last:
            grid = sample_grid(self.pipe, self.images, self.prompts)
            save_png(grid, self.folder / f"{result.step:07d}.png")
            if self.callback is not None:
                self.callback({"step": result.step, "grid": grid})


class Save:
    """The averaged encoder, for `load_encoder`, and then the checkpoint."""

    def __init__(
        self, folder: Path, every: int, checkpoint: Checkpoint, encoder: TuningEncoder,
        average: TuningEncoder, optimizer: torch.optim.Optimizer,
    ) -> None:  # fmt: skip
        self.folder, self.every, self.checkpoint = folder, every, checkpoint
        self.state = encoder, average, optimizer

    def __call__(self, result: StepResult) -> None:
        if result.step % self.every == 0 or result.last:
            self.save_encoder()
            self.checkpoint.save(*self.state, result.step)

    def save_encoder(self) -> None:
        save_folder(self.state[1], self.folder)


def mean_over_processes(accelerator: Accelerator, line: dict[str, float]) -> dict[str, float]:
    """The means of {name: number} over the processes."""
    values = torch.tensor(list(line.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(line, accelerator.reduce(values, "mean").tolist(), strict=True))


@torch.no_grad()
def statistics(prediction: EncoderPrediction, table: TokenTable) -> dict[str, float]:
    """Norm of v* relative to words, cosine to the nearest word, and size of the offsets A B."""
    v = prediction.v_star
    pairs = prediction.offsets.values()
    return {
        "v_star_norm": (v.norm(dim=-1).mean() / table.mean_norm).item(),
        "nearest_cosine": table.nearest_rows(v)[0].mean().item(),
        "offset_rms": torch.stack([(a @ b).square().mean() for a, b in pairs]).mean().sqrt().item(),
    }


def sample_grid(
    pipe: DTEPipeline, images: Sequence[Image.Image], prompts: Sequence[str]
) -> Image.Image:
    """One row per picture: the input, then a sample of each prompt from the prediction alone."""
    cells = []
    for image in images:
        concept = pipe.personalize(image, num_steps=0, progress=False)
        samples = pipe.generate(concept, list(prompts), progress=False)
        cells += [*to_pil(pipe.pixels([image])), *(row[0] for row in samples)]
    return make_image_grid(cells, rows=len(images), cols=1 + len(prompts))
