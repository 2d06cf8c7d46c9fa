"""The optimizer of the encoder's pre-training: AdamW, or bitsandbytes' with an 8-bit state."""

from collections.abc import Iterable

import torch
from torch import nn

from dte_lab.common.errors import DTEError


def build_optimizer(
    parameters: Iterable[nn.Parameter], weight_decay: float, in_8_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW, whose rate is set before each step.

    in_8_bit: that of bitsandbytes; raises DTEError when that is missing.
    """
    adam = adamw_8bit() if in_8_bit else torch.optim.AdamW
    return adam(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay)


def adamw_8bit() -> type[torch.optim.Optimizer]:
    """AdamW8bit of bitsandbytes, whose state goes through `write_state` and `restore_optimizer`."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise DTEError(
            "The 8-bit optimizer is that of bitsandbytes, which is missing: "
            "pip install bitsandbytes, or leave the option out."
        ) from None

    class CheckpointedAdamW8bit(AdamW8bit):
        state_dict = torch.optim.Optimizer.state_dict  # one level; theirs nests it, for FSDP

        def load_state_dict(self, *args, **kwargs) -> None:
            super().load_state_dict(*args, **kwargs)
            for state in self.state.values():
                state["step"] = int(state["step"])
                for name in ("state1", "state2") if "qmap1" in state else ():
                    state[name] = state[name].to(torch.uint8)  # restored as the parameter's dtype

    return CheckpointedAdamW8bit
