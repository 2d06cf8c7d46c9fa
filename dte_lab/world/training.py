"""One training loop for all parts of the base model: log, EMA, samples, exact resume.

Every step draws all of its randomness from (seed, step), so a run that stops and goes on is the
same, bit for bit on one CPU machine, as one that never stopped. On a GPU a step is captured once as
a CUDA graph and replayed, as its thousands of small kernels take longer to launch than to run: so
`loss` must compute on the device alone, from data that lie there.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from dte_lab.common.attention import short_attention
from dte_lab.common.checkpoint import CHECKPOINT, Checkpoint
from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.common.muon import MuonAdamW, hidden_matrices
from dte_lab.common.resume import LOG, append_line
from dte_lab.common.schedule import average_of, ema_weight, trapezoid, update_ema
from dte_lab.common.settings import check_number, check_one_of, check_whole

CONFIG = "config.json"
WORD_TABLE = "token_embedding.weight"
EAGER_STEPS = 3  # before a GPU's step is captured, for what libraries set up at first use
TRAIN_FREE_TO_CHANGE = {"steps", "warmup_steps", "log_every", "sample_every", "checkpoint_minutes"}

# Gives the loss of one batch and scalars to log; the backward pass runs inside its block.
Loss = Callable[[nn.Module], AbstractContextManager[tuple[Tensor, dict[str, Tensor]]]]


@dataclass
class TrainConfig:
    """Recipe of one run; everything here is ours, not the paper's (which trains no base model).

    Raises DTEError for a value with which nothing can be trained.
    """

    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float | None = None  # of the hidden matrices; None: AdamW for them, too
    # {start of parameters' names: factor of their rates}; of several, the longest start counts
    rate_factors: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 200
    decay_fraction: float = 0.25  # last part of the run, in which the rate falls linearly to 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    # bf16 is 1.7 x as fast on a CPU with avx512_bf16 (lscpu), and many times slower without.
    mixed_precision: str = "no"
    seed: int = 0
    log_every: int = 50
    sample_every: int = 1000  # times 1, 2, 4, 8, ...: samples of so many steps, and of the last
    checkpoint_minutes: float = 5.0  # from one to the next, which is written with a line of the log

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "sample_every"):
            check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            check_whole(name, getattr(self, name), 0)
        for name in ("learning_rate", "weight_decay", "checkpoint_minutes"):
            check_number(name, getattr(self, name), 0)
        if self.muon_learning_rate is not None:
            check_number("muon_learning_rate", self.muon_learning_rate, 0)
        for factor in self.rate_factors.values():
            check_number("rate_factors", factor, 0)
        for name in ("decay_fraction", "ema_decay"):
            check_number(name, getattr(self, name), 0, 1)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise DTEError(f"betas are two numbers from 0 to 1, not {self.betas!r}.")
        for value in self.betas:
            check_number("betas", value, 0, 1)
        check_number("clip_norm", self.clip_norm, above=0)
        check_one_of("mixed_precision", self.mixed_precision, ("no", "bf16"))


def schedule(step: int, c: TrainConfig) -> float:
    """Factor of the learning rates: warm up, hold, decay linearly to zero at the last step."""
    return trapezoid(step, c.steps, c.warmup_steps, c.decay_fraction)


def muon_optimizer(model: nn.Module, c: TrainConfig, device: str = "cpu") -> MuonAdamW:
    """Groups with their peak rates as `peak`: hidden matrices, other matrices, and what is not
    decayed: vectors and the table of words, of which a batch holds few. Those with other
    `rate_factors` are groups of their own.
    """
    hidden = {id(p) for p in hidden_matrices(model)} if c.muon_learning_rate else set()
    members = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_muon, decays = id(p) in hidden, p.ndim > 1 and not name.endswith(WORD_TABLE)
            kind = (not is_muon, not decays, rate_factor(name, c.rate_factors))
            members.setdefault(kind, []).append(p)
    groups = []
    for (not_muon, undecayed, factor), params in sorted(members.items(), key=lambda item: item[0]):
        rate = c.learning_rate if not_muon else c.muon_learning_rate
        group = {"params": params, "muon": not not_muon, "peak": factor * rate}
        groups.append(group | ({"weight_decay": 0.0} if undecayed else {}))
    for group in groups:
        group["lr"] = torch.tensor(0.0, device=device)  # a tensor, which a captured step can read
    return MuonAdamW(
        groups,
        betas=c.betas,
        weight_decay=c.weight_decay,
        fused=True,
        capturable=on_gpu(device),
        dtype=torch.bfloat16 if c.mixed_precision == "bf16" else torch.float32,
    )


def rate_factor(name: str, factors: dict[str, float]) -> float:
    """Of a parameter: see `TrainConfig.rate_factors`; 1 where nothing is said."""
    starts = [start for start in factors if name.startswith(start)]
    return factors[max(starts, key=len)] if starts else 1.0


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step`, once traced, as one CUDA graph: the function replays the kernels that it launched."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class TrainStep:
    """Changes model, optimizer and average; gives what to log, in the order of `names`."""

    def __init__(
        self, model: nn.Module, average: nn.Module, optimizer: MuonAdamW, loss: Loss,
        config: TrainConfig, device: str,
    ) -> None:  # fmt: skip
        self.model, self.average, self.optimizer, self.loss = model, average, optimizer, loss
        self.config, self.device = config, device
        self.weight, self.names = torch.tensor(0.0, device=device), []

    def set(self, step: int) -> None:
        """Seed, learning rates and the average's weight of a step."""
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["peak"] * schedule(step, self.config))
        self.weight.fill_(ema_weight(step, self.config.ema_decay))

    def autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type,
            torch.bfloat16,
            enabled=enabled,
            cache_enabled=not on_gpu(self.device),  # a captured cast would not be repeated
        )

    def __call__(self) -> Float[Tensor, " values"]:
        with (
            short_attention(self.device),
            self.autocast(self.config.mixed_precision == "bf16"),
            self.loss(self.model) as (value, logs),
        ):
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast(False):
                value.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        update_ema(self.average, self.model, self.weight)
        self.names[:] = ["loss", "gradient_norm", *logs]
        return torch.stack([value.detach(), norm, *(x.detach() for x in logs.values())])


class MeanLog:
    """A log of means over the steps since the line before."""

    def __init__(self, out: Path) -> None:
        self.out, self.started = out, time.monotonic()
        self.total, self.count = 0, 0

    @property
    def minutes(self) -> float:
        return round((time.monotonic() - self.started) / 60, 3)

    def add(self, values: Float[Tensor, " values"]) -> None:
        self.total, self.count = self.total + values, self.count + 1

    def write(self, step: int, entry: dict[str, float]) -> None:
        append_line(self.out / LOG, {"step": step, "minutes": self.minutes, **entry})

    def write_means(self, step: int, names: list[str], rate: float) -> None:
        """Nothing where no step came since. A state behind one that is not finite is not saved."""
        if not self.count:
            return
        means = (self.total / self.count).tolist()
        self.total, self.count = 0, 0
        if not all(map(math.isfinite, means)):
            raise FloatingPointError(
                f"{self.out.name}: loss or gradient is not finite in the steps before {step}."
            )
        self.write(step, {**dict(zip(names, means, strict=True)), "learning_rate": rate})


def sample_due(step: int, config: TrainConfig) -> bool:
    """Whether samples are drawn after so many steps: see `TrainConfig`."""
    samples, rest = divmod(step, config.sample_every)
    return (rest == 0 and samples.bit_count() == 1) or step == config.steps


def train(
    out: Path,
    model: nn.Module,
    config: TrainConfig,
    loss: Loss,
    sample: Callable[[nn.Module, int], dict[str, float]],
    minutes: float | None = None,
    device: str = "cpu",
    settings: dict | None = None,
) -> nn.Module:
    """Train until `config.steps` or for `minutes`; go on from `out/checkpoint.safetensors`.

    loss: see `Loss`; it draws its batch with torch's random numbers. sample: of the average and the
    step, writes pictures into `out` and returns scalars to log. settings: what the run must have
    been begun with, besides `config`. Returns the average (EMA).

    Raises DTEError when `out` holds a run with other settings, and FloatingPointError, at the next
    line of the log, when the loss or its gradient was not finite.
    """
    model.to(device, memory_format=torch.channels_last).train()  # 1.3 x as fast on CPU
    average, optimizer = average_of(model), muon_optimizer(model, config, device)
    settings = {"train": config} | (settings or {})
    checkpoint = Checkpoint(out / CHECKPOINT, "dte world train", settings, TRAIN_FREE_TO_CHANGE)
    step = first = checkpoint.load(model, average, optimizer)
    write_atomically(out / CONFIG, json.dumps(asdict(config), indent=1).encode())
    one_step, log = TrainStep(model, average, optimizer, loss, config, device), MeanLog(out)
    progress = tqdm(total=config.steps, initial=step, desc=out.name, mininterval=5)

    def log_means() -> None:
        log.write_means(step, one_step.names, config.learning_rate * schedule(step - 1, config))

    run, saved = one_step, log.started
    with torch.cuda.stream(torch.cuda.Stream() if on_gpu(device) else None):
        while step < config.steps and not (minutes is not None and log.minutes >= minutes):
            one_step.set(step)
            if on_gpu(device) and step == first + EAGER_STEPS:
                run = captured(one_step)
            log.add(run())
            step += 1
            progress.update()
            line = step % config.log_every == 0 or step == config.steps
            if line:
                log_means()
            if sample_due(step, config):
                with torch.no_grad():
                    log.write(step, sample(average, step))
            if line and (time.monotonic() - saved) / 60 > config.checkpoint_minutes:
                checkpoint.save(model, average, optimizer, step)
                saved = time.monotonic()
        log_means()  # where time was up between two lines
        checkpoint.save(model, average, optimizer, step)  # and wait for the last step
    progress.close()
    return average
