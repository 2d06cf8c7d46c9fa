"""The settings of `pretrain`."""

from dataclasses import dataclass

from dte_lab.common.errors import DTEError
from dte_lab.common.schedule import trapezoid
from dte_lab.common.settings import check_number, check_one_of, check_whole

PREDICTIONS = "predictions.jsonl"
VALIDATION = "validation.jsonl"
PRETRAIN_FREE_TO_CHANGE = {  # between two pieces of one run
    "steps", "num_workers", "log_every", "checkpoint_every", "sample_every", "predict_every",
    "max_minutes", "validate_every",
}  # fmt: skip


@dataclass
class PretrainConfig:
    """Values are ours, not the paper's.

    The learning rate rises over `warmup_steps`, stays, and falls linearly to zero over the last
    `decay_fraction` of `steps`. `batch_size` is that of all processes together, and a
    step is made of `gradient_accumulation` batches, each with its own negatives. With
    `shared_timestep_probability` the UNet features of a sample come from the noisy target at the
    loss's timestep, as in the paper; otherwise from the noisy concept picture at a timestep of its
    own, which is what `personalize` does. `max_minutes` ends this call, with a checkpoint, to be
    continued by the next. `num_workers` read pictures, None as many as suit the machine.
    `optimizer_8bit` takes AdamW8bit of bitsandbytes.

    Raises DTEError for a value with which nothing can be trained.
    """

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.2
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    shared_timestep_probability: float = 0.5
    seed: int = 0
    gradient_accumulation: int = 1
    mixed_precision: str = "no"
    optimizer_8bit: bool = False
    num_workers: int | None = None
    log_every: int = 20
    checkpoint_every: int = 250
    sample_every: int = 500
    predict_every: int = 20
    validate_every: int = 500
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "log_every", "checkpoint_every", "sample_every", "predict_every",
            "gradient_accumulation", "validate_every",
        ):  # fmt: skip
            check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.num_workers is not None:
            check_whole("num_workers", self.num_workers, 0)
        for name in ("learning_rate", "weight_decay"):
            check_number(name, getattr(self, name), 0)
        for name in ("decay_fraction", "ema_decay", "shared_timestep_probability"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        check_one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if not isinstance(self.optimizer_8bit, bool):
            raise DTEError(f"optimizer_8bit is true or false, not {self.optimizer_8bit!r}.")
        if self.max_minutes is not None:
            check_number("max_minutes", self.max_minutes, 0)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Trapezoid: linear warm-up, constant, linear decay to zero at `steps`."""
    factor = trapezoid(step, config.steps, config.warmup_steps, config.decay_fraction)
    return config.learning_rate * factor
