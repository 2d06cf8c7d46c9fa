"""One training loop for the three parts of the base model: log, EMA, samples, exact resume.

Every step draws all of its randomness from (seed, step), so a run that stops and goes on is the
same, bit for bit on one CPU machine, as one that never stopped. On a GPU a step is captured once as
a CUDA graph and replayed, as its thousands of small kernels take longer to launch than to run: so
`loss` must compute on the device alone, from data that lie there.
"""

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dte_lab.common.attention import short_attention
from dte_lab.common.checkpoint import read_state, restore_optimizer, trapezoid, write_state
from dte_lab.common.files import write_atomically
from dte_lab.world.muon import MuonAdamW, hidden_matrices

EAGER_STEPS = 3  # before a GPU's step is captured, for what libraries set up at first use


@dataclass
class TrainConfig:
    """Recipe of one run; everything here is ours, not the paper's (which trains no base model)."""

    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float | None = None  # of the hidden matrices; None: AdamW for them, too
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
    checkpoint_minutes: float = 5.0


def schedule(step: int, c: TrainConfig) -> float:
    """Factor of the learning rates: warm up, hold, decay linearly to zero at the last step."""
    return trapezoid(step, c.steps, c.warmup_steps, c.decay_fraction)


def build_optimizer(model: nn.Module, c: TrainConfig, device: str = "cpu") -> MuonAdamW:
    """Groups with their peak rates as `peak`: hidden matrices, other matrices, vectors."""
    hidden = hidden_matrices(model) if c.muon_learning_rate else []
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids and p.requires_grad]
    groups = [
        {"params": hidden, "muon": True, "peak": c.muon_learning_rate},
        {"params": [p for p in rest if p.ndim > 1], "peak": c.learning_rate},
        {"params": [p for p in rest if p.ndim <= 1], "peak": c.learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
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


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """ema += weight (model - ema), all parameters at once."""
    old, new = list(ema.parameters()), list(model.parameters())
    difference = torch._foreach_sub(new, old)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(old, difference)


def ema_weight(step: int, decay: float) -> float:
    """Of the newest weights; large at first, so that the start is forgotten in short runs."""
    return 1 - min(decay, (1 + step) / (10 + step))


def save_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizer, step: int) -> None:
    """Model, EMA, optimiser state and step in one safetensors file, written atomically."""
    parts = {"model": model.state_dict(), "ema": ema.state_dict()}
    write_state(path, parts, optimizer, {"step": str(step)})


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizer) -> int:
    """Undo `save_checkpoint`; returns the number of finished steps."""
    parts, metadata = read_state(path)
    model.load_state_dict(parts["model"])
    ema.load_state_dict(parts["ema"])
    restore_optimizer(optimizer, parts.get("optimizer", {}))
    return int(metadata["step"])


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step`, once traced, as one CUDA graph: the function replays the kernels that it launched."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def train(
    out: Path,
    model: nn.Module,
    config: TrainConfig,
    loss: Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]],
    sample: Callable[[nn.Module, int], dict[str, float]],
    minutes: float | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Train until `config.steps` or for `minutes`; go on from `out/checkpoint.safetensors`.

    `loss(model)` returns the loss of one batch, drawn with torch's random numbers, and scalars to
    log; `sample(ema_model, step)` writes pictures into `out` and returns scalars to log. Returns
    the EMA model. Raises FloatingPointError, at the next line of the log, when the loss or its
    gradient was not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.to(device, memory_format=torch.channels_last).train()  # 1.3 x as fast on CPU
    ema = deepcopy(model).eval().requires_grad_(False)
    optimizer = build_optimizer(model, config, device)
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"
    step = load_checkpoint(checkpoint, model, ema, optimizer) if checkpoint.exists() else 0
    write_atomically(out / "config.json", json.dumps(asdict(config), indent=1).encode())
    start = saved = time.monotonic()
    progress = tqdm(total=config.steps, initial=step, desc=out.name, mininterval=5)
    weight, names = torch.tensor(0.0, device=device), []

    def one_step() -> Tensor:
        """Changes model, optimizer and EMA; returns what to log, in the order of `names`."""
        with (
            short_attention(device),
            torch.autocast(
                torch.device(device).type,
                torch.bfloat16,
                enabled=config.mixed_precision == "bf16",
                cache_enabled=not on_gpu(device),  # a captured cast would not be repeated
            ),
        ):
            value, logs = loss(model)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        update_ema(ema, model, weight)
        names[:] = ["loss", "gradient_norm", *logs]
        return torch.stack([value.detach(), norm, *(x.detach() for x in logs.values())])

    def write_log(entry: dict) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "minutes": _minutes(start), **entry}) + "\n")

    def log_means() -> None:
        """Of the steps since the last line; a state behind one that is not finite is not saved."""
        means = (total / count).tolist()
        if not all(map(math.isfinite, means)):
            raise FloatingPointError(
                f"{out.name}: loss or gradient is not finite in the steps before {step}."
            )
        rate = config.learning_rate * schedule(step - 1, config)
        write_log({**dict(zip(names, means, strict=True)), "learning_rate": rate})

    run, first, total, count = one_step, step, 0, 0
    with torch.cuda.stream(torch.cuda.Stream() if on_gpu(device) else None):
        while step < config.steps and not (minutes is not None and _minutes(start) >= minutes):
            torch.manual_seed(config.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"].fill_(group["peak"] * schedule(step, config))
            weight.fill_(ema_weight(step, config.ema_decay))
            if on_gpu(device) and step == first + EAGER_STEPS:
                run = captured(one_step)
            total, count = total + run(), count + 1
            step += 1
            progress.update()
            save = (time.monotonic() - saved) / 60 > config.checkpoint_minutes
            if step % config.log_every == 0 or step == config.steps or save:
                log_means()
                total, count = 0, 0
            samples, rest = divmod(step, config.sample_every)
            if (rest == 0 and samples.bit_count() == 1) or step == config.steps:
                with torch.no_grad():
                    write_log(sample(ema, step))
            if save:
                save_checkpoint(checkpoint, model, ema, optimizer, step)
                saved = time.monotonic()
        if count:  # time was up between two lines
            log_means()
        save_checkpoint(checkpoint, model, ema, optimizer, step)  # and wait for the last step
    progress.close()
    return ema


def _minutes(start: float) -> float:
    return round((time.monotonic() - start) / 60, 3)
