"""The state of a pre-training run in one file, which is never half written."""

import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from dte_lab.files import write_atomically

FREE_TO_CHANGE = {  # between two pieces of one run
    "steps", "num_workers", "log_every", "checkpoint_every", "sample_every", "max_minutes",
}  # fmt: skip


@contextmanager
def ema_weights(ema, encoder):
    """The encoder with its EMA weights, inside the block."""
    parameters = list(encoder.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def save_checkpoint(out_dir, encoder, optimizer, ema, config, step):
    """Write the whole state to one file, and the EMA encoder to out_dir/encoder; atomically."""
    tensors = {f"model.{k}": v for k, v in encoder.state_dict().items()}
    tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"step": str(step), "config": json.dumps(_settings(encoder, config))}
    write_atomically(out_dir / "checkpoint.safetensors", save(tensors, metadata))

    final = out_dir / "encoder"
    final.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir) as folder, ema_weights(ema, encoder):
        encoder.save_pretrained(folder)
        for file in Path(folder).iterdir():
            os.replace(file, final / file.name)


def load_checkpoint(out_dir, encoder, optimizer, ema, config):
    """Restore the state from out_dir and return its step; 0 when there is none.

    Raises ValueError when settings other than `FREE_TO_CHANGE` have changed.
    """
    path = out_dir / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    step, before = int(metadata["step"]), json.loads(metadata["config"])
    now = json.loads(json.dumps(_settings(encoder, config)))
    if changed := [k for k, v in now.items() if k not in FREE_TO_CHANGE and v != before.get(k)]:
        raise ValueError(
            f"{out_dir} holds a run with other settings ({', '.join(changed)}): "
            "use them again, or another folder."
        )

    def part(prefix):
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    encoder.load_state_dict(part("model."))
    for i, value in part("ema.").items():
        ema.shadow_params[int(i)].copy_(value)
    ema.optimization_step = step
    state = {}
    for key, value in part("optimizer.").items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    log = out_dir / "log.jsonl"  # forget what was logged after the checkpoint
    if log.is_file():
        lines = [x for x in log.read_text().splitlines() if _step_of(x) <= step]
        write_atomically(log, "".join(x + "\n" for x in lines).encode())
    return step


def _settings(encoder, config):
    return {**asdict(config), **asdict(encoder.dte)}


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except ValueError:  # the run was killed while it wrote this line
        return float("inf")
