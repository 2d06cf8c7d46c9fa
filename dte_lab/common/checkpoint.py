"""The state of a training run in one file, which is never half written.

Shared by the pre-training of the encoder and the training of the small base model. accelerate's
own `save_state` writes pickles, and several files one after the other.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import naming, temporary_beside, write_atomically
from dte_lab.common.resume import as_json, check_settings, cut_back
from dte_lab.common.weights import is_finite

if TYPE_CHECKING:
    from diffusers import ConfigMixin
    from transformers.utils import PushToHubMixin

State = dict[str, Tensor]
KNOWN_STATES = ("step", "exp_avg", "exp_avg_sq", "momentum")  # of optimizers
STATE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
CHECKPOINT = "checkpoint.safetensors"  # of a run, in its folder


class Checkpoint:
    """Weights, their average, optimizer and finished steps of a run, in `path`.

    kind: the command that the run belongs to. settings: those that `check_settings` compares; it
    leaves out the fields in `free`.
    """

    def __init__(self, path: Path, kind: str, settings: dict, free: Collection[str] = ()) -> None:
        self.path, self.kind, self.settings, self.free = path, kind, settings, free

    def save(self, model: nn.Module, average: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Write the whole state: last of all that a step writes, since it says: this is done."""
        parts = {"model": model.state_dict(), "ema": dict(average.named_parameters())}
        settings = json.dumps(as_json(self.settings))
        metadata = {"step": str(step), "kind": self.kind, "settings": settings}
        write_state(self.path, parts, optimizer, metadata)

    def load(self, model: nn.Module, average: nn.Module, optimizer: Optimizer) -> int:
        """Restore the state, and cut the logs beside it back to it; returns its step, 0 for none.

        Raises DTEError when the file is damaged, or holds another kind of run, one with other
        settings, or weights of another size.
        """
        step = self._restore(model, average, optimizer) if self.path.exists() else 0
        for log in self.path.parent.glob("*.jsonl"):
            cut_back(log, step)
        return step

    def _restore(self, model: nn.Module, average: nn.Module, optimizer: Optimizer) -> int:
        parts, metadata = read_state(self.path)
        if metadata.get("kind") != self.kind:
            raise DTEError(
                f"{self.path} belongs to {metadata.get('kind', 'another version')[:99]}, not to "
                f"{self.kind}: use another folder."
            )
        with _damage(self.path):
            before, step = json.loads(metadata["settings"]), int(metadata["step"])
            if not isinstance(before, dict) or step < 0:
                raise ValueError("its settings or its step are of another kind")
        check_settings(self.path.parent, before, self.settings, self.free)
        try:
            for name, weight in model.state_dict().items():
                found = parts["model"][name]  # none is made up, as those of batch norms would be
                if found.is_floating_point() != weight.is_floating_point():
                    raise KeyError(f"model.{name} is of {found.dtype}")
            model.load_state_dict(parts["model"])
            averaged = {name: parts["ema"][name] for name, _ in average.named_parameters()}
            average.load_state_dict(averaged, strict=False)
        except (KeyError, RuntimeError) as error:
            raise DTEError(
                f"The weights in {self.path} are of another model ({str(error).splitlines()[-1]}): "
                "use another folder."
            ) from error
        with _damage(self.path):
            restore_optimizer(optimizer, parts.get("optimizer", {}))
        return step


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What goes wrong inside is the file's fault."""
    try:
        yield
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise DTEError(
            f"{path} is damaged ({reason_of(error)}): remove it to begin the run again."
        ) from error


def write_state(
    path: Path, parts: dict[str, State], optimizer: Optimizer, metadata: dict[str, str]
) -> None:
    """Write parts {name: {key: tensor}}, the optimizer's state and metadata to `path`.

    The tensors are called "part.key", and "optimizer.index.key" with the parameter's index.
    """
    tensors = {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    write_atomically(path, save(tensors, metadata | {"tensors": str(len(tensors))}))


def read_state(path: Path) -> tuple[dict[str, State], dict[str, str]]:
    """Undo `write_state`: (parts, with the optimizer's as "optimizer"; metadata).

    Raises DTEError when the file is damaged or was not written by `write_state`.
    """
    with _damage(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()} if "step" in metadata else {}
    if not tensors:
        raise DTEError(f"{path} is no checkpoint of a training run: use another folder.")
    with _damage(path):
        if int(metadata.get("tensors", len(tensors))) != len(tensors):  # older ones do not say
            raise ValueError(f"it has {len(tensors)} of {metadata['tensors']} tensors")
        parts = {}
        for key, tensor in tensors.items():
            if not is_finite(tensor):
                raise ValueError(f"{key} holds values that are not finite")
            part, rest = key.split(".", 1)
            parts.setdefault(part, {})[rest] = tensor
    return parts, metadata


@torch.no_grad()
def restore_optimizer(optimizer: Optimizer, state: State) -> None:
    """Load {"index.key": tensor} into an optimizer of the same parameters.

    Raises DTEError or LookupError for tensors of other parameters, or of another kind.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    restored = {}
    for key, value in state.items():
        index, name = key.split(".", 1)
        if not index.isdecimal():
            raise DTEError(f"optimizer.{key} is of no parameter")
        parameter = parameters[int(index)]
        if value.shape != {"step": ()}.get(name, parameter.shape) and name in KNOWN_STATES:
            raise DTEError(f"optimizer.{key} has the shape {tuple(value.shape)}")
        if name in KNOWN_STATES and value.dtype not in STATE_DTYPES:
            raise DTEError(f"optimizer.{key} is of {value.dtype}")
        if value.shape == parameter.shape:  # fused AdamW takes for granted that strides agree
            value = torch.empty_like(parameter).copy_(value)
        restored.setdefault(int(index), {})[name] = value
    for index, names in restored.items():
        if "step" not in names or ("exp_avg" in names) != ("exp_avg_sq" in names):
            raise DTEError(f"optimizer.{index} lacks a tensor")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})


def save_folder(model: "ConfigMixin | PushToHubMixin", folder: Path) -> None:
    """`model.save_pretrained` to a folder in which no file is ever half written.

    model: or a tokenizer, a scheduler, an image processor, of diffusers or of transformers.
    Raises OSError when it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(folder), temporary_beside(folder) as temporary:
            temporary.mkdir()
            model.save_pretrained(temporary)
            for file in sorted(temporary.iterdir()):
                write_atomically(folder / file.name, file.read_bytes())
    except Exception as error:  # such as a full disk: safetensors' own, and tokenizers' plain one
        if type(error) not in (SafetensorError, Exception):
            raise
        raise OSError(f"{folder} cannot be written ({error}).") from error
