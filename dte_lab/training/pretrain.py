"""Pre-training of the tuning encoder over many concepts, on any backbone and any pictures.

Every random number of step s comes from a generator seeded by (seed, s), and the dataset's items
are pure functions of their index. So weights, optimizer, EMA and s are the whole state, and a run
that was cut off goes on exactly as it would have. Several processes share a batch and see each
other's v* as negatives, so that the same settings give the same losses whatever their number:

    accelerate launch --multi_gpu --num_processes 2 -m dte_lab pretrain --out runs/encoder ...

What a step computes is step.py's, and what is written after it callbacks.py's.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone
from dte_lab.common.attention import short_attention
from dte_lab.common.files import prepare_folder
from dte_lab.common.resume import LOG
from dte_lab.common.schedule import ema_weight, update_ema
from dte_lab.encoder import EncoderPrediction, TuningEncoder
from dte_lab.memory_needs import out_of_memory_advised
from dte_lab.pipeline import DTEPipeline
from dte_lab.training.batches import batches_of, prepare
from dte_lab.training.callbacks import Log, Probe, SampleGrids, Save, StepResult
from dte_lab.training.config import PREDICTIONS, VALIDATION, PretrainConfig, learning_rate
from dte_lab.training.run import PretrainRun, set_up
from dte_lab.training.step import EncoderBatch, Frozen, Processes, training_step
from dte_lab.training.validation import Validation


def pretrain(
    backbone: Backbone,
    encoder: TuningEncoder,
    dataset: Dataset,
    config: PretrainConfig | None = None,
    out_dir: Path | str = "runs/encoder",
    eval_images: Sequence[Image.Image] = (),
    eval_prompts: Sequence[str] = ("a picture of S*",),
    probe_images: Sequence[Image.Image] = (),
    validation: Dataset | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = True,
    initialise: Callable[[TuningEncoder], None] | None = None,
) -> TuningEncoder:
    """Train `encoder` in place; continues from `out_dir` when that holds a checkpoint.

    dataset: `StreamedPictures`, or a map-style torch Dataset, whose item i is a pure function of i,
    either as a `CachedPictures` has them or a dict of image (3, H, W) in
    [-1, 1], prompt (str with "S*") and concept (int id), and perhaps target (3, H, W), where that
    is another picture, and `skipped`, the name of one in whose place another stands, or "".
    Writes to out_dir: log.jsonl, checkpoint.safetensors (the whole state), encoder/ (EMA weights,
    for `load_encoder`), samples/ (grids of eval_images with their predictions), of probe_images
    predictions.jsonl (see predictions.py), and of validation, like dataset but of other classes,
    validation.jsonl (see validation.py).
    callback: called with a dict of each log line, and with {"step", "grid"} for each sample grid.
    initialise: called with the fresh encoder, which it may change, where there is no checkpoint.
    Returns the encoder with its EMA weights loaded. Once all steps are done a call only does that.

    Raises DTEError when out_dir holds a run with other settings, the batch cannot be shared out
    evenly, bitsandbytes is missing or memory is used up, RuntimeError when the loss stops being
    finite (the last checkpoint stays).
    """
    config, out_dir, started = config or PretrainConfig(), Path(out_dir), time.monotonic()
    prepare_folder(out_dir)
    run = set_up(backbone, encoder, dataset, config, out_dir, initialise)
    hidden = not (progress and run.accelerator.is_main_process)
    bar = tqdm(total=config.steps, initial=run.first, desc="pretrain", disable=hidden)
    after_step = housekeeping(
        run, config, out_dir, bar, eval_images, eval_prompts, probe_images, validation, callback
    )
    batches = iter(batches_of(dataset, config, run.first, run.accelerator.device, run.processes))
    with out_of_memory_advised(backbone, "pre-training", config.batch_size // run.processes.count):
        for step in range(run.first, config.steps):
            result = take_step(run, batches, config, step, out_dir)
            weight = torch.tensor(ema_weight(step, config.ema_decay), device=backbone.device)
            update_ema(run.average, encoder, weight)
            result.last = out_of_time(run.accelerator, config, started) or step + 1 == config.steps
            for after in after_step:
                after(result)
            if result.last:
                break
    bar.close()
    run.accelerator.wait_for_everyone()
    encoder.load_state_dict(run.average.state_dict())
    return encoder.eval().requires_grad_(False)


def take_step(
    run: PretrainRun, batches: Iterator[dict], config: PretrainConfig, step: int, out_dir: Path
) -> StepResult:
    """One step on the next `gradient_accumulation` batches; their losses are averaged."""
    parts, skipped, rate = [], None, learning_rate(step, config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    for k in range(config.gradient_accumulation):
        pictures, part = next(batches), step * config.gradient_accumulation + k
        batch = prepare(run.frozen.backbone, pictures, config, part, run.processes)
        losses, prediction, grad_norm = train_step(
            run.accelerator, run.model, run.optimizer, run.frozen, batch, config.max_grad_norm
        )
        check_finite(run.accelerator, losses["loss"], grad_norm, step, out_dir)
        parts.append(losses)
        if "skipped" in pictures:
            skipped = (skipped or []) + [name for name in pictures["skipped"] if name]
    losses = {name: torch.stack([x[name] for x in parts]).mean() for name in losses}
    return StepResult(step + 1, losses, prediction, grad_norm, rate, skipped)


def housekeeping(
    run: PretrainRun,
    config: PretrainConfig,
    out_dir: Path,
    bar: tqdm,
    eval_images: Sequence[Image.Image],
    eval_prompts: Sequence[str],
    probe_images: Sequence[Image.Image],
    validation: Dataset | None,
    callback: Callable[[dict], None] | None,
) -> list[Callable[[StepResult], None]]:
    """The callbacks of this process, in the order in which they are called."""
    table = run.frozen.prompt_encoder.table
    log = Log(out_dir / LOG, config.log_every, run.accelerator, table, bar, callback)
    if not run.accelerator.is_main_process:
        return [log]
    out_dir.mkdir(parents=True, exist_ok=True)
    callbacks, pipe = [log], DTEPipeline(run.frozen.backbone, run.average)
    if len(probe_images):
        probe = Probe(out_dir / PREDICTIONS, config.predict_every, pipe, probe_images)
        if run.first == 0:
            probe.write(0)
        callbacks.append(probe)
    if validation is not None:
        path = out_dir / VALIDATION
        measure = Validation(path, config, run.frozen, run.average, validation)
        if run.first == 0:
            measure.write(0)
        callbacks.append(measure)
    if len(eval_images):
        folder = out_dir / "samples"
        grids = SampleGrids(folder, config.sample_every, pipe, eval_images, eval_prompts, callback)
        callbacks.append(grids)
    save = Save(
        out_dir / "encoder", config.checkpoint_every, run.checkpoint, run.encoder, run.average,
        run.optimizer,
    )  # fmt: skip
    if run.first >= config.steps:  # nothing else of it may be missing
        save.save_encoder()
    return [*callbacks, save]


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    frozen: Frozen,
    batch: EncoderBatch,
    max_grad_norm: float = 1.0,
) -> tuple[dict[str, Tensor], EncoderPrediction, Tensor]:
    """One batch of what `prepare` returned: (losses, prediction, gradient norm).

    The last batch of as many as the accelerator accumulates changes the weights; the norm of the
    others is 0.
    """
    encoder = accelerator.unwrap_model(model)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    with accelerator.accumulate(model):
        with (
            short_attention(frozen.backbone.device),
            training_step(encoder, frozen, batch, model, processes, accelerator.autocast()) as (
                losses,
                prediction,
            ),
        ):
            accelerator.backward(losses["loss"])
        grad_norm = torch.zeros(())
        if accelerator.sync_gradients:
            grad_norm = accelerator.clip_grad_norm_(encoder.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in losses.items()}, prediction, grad_norm


def check_finite(
    accelerator: Accelerator, loss: Tensor, grad_norm: Tensor, step: int, out_dir: Path
) -> None:
    """Raise RuntimeError for a loss or gradient that is not; in fp16 an overflow skips a step."""
    scaled = accelerator.scaler is not None
    if not (loss.isfinite() and (scaled or grad_norm.isfinite())):
        raise RuntimeError(
            f"The loss or its gradient at step {step} is not finite; the last checkpoint in "
            f"{out_dir} is good: lower learning_rate and start again."
        )


def out_of_time(accelerator: Accelerator, config: PretrainConfig, started: float) -> bool:
    """Whether time is up in any of the processes, so that all of them stop after the same step."""
    if config.max_minutes is None:
        return False
    if time.monotonic() - started > 60 * config.max_minutes:
        accelerator.set_trigger()
    return accelerator.check_trigger()
