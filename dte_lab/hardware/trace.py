"""What a step takes, by running it on fake tensors, which have shapes and no data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

BLOCK = 512  # bytes that CUDA's allocator rounds up to
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _count_attention(formula: Callable, given: int, *args: Any, **_: Any) -> int:
    return formula(*(tensor.shape for tensor in args[:given]))


# torch's counter knows attention on a GPU, but not the kernel that a trace on the CPU goes through.
COUNTED = dict(flop_registry)
for kernel, formula, given in (
    (ATTENTION, sdpa_flop_count, 3),
    (ATTENTION_BACKWARD, sdpa_backward_flop_count, 4),
):
    COUNTED[kernel] = partial(_count_attention, formula, given)


class TracedMemory(TorchDispatchMode):
    """Counts the bytes of all live storages that appear while it is active, and their maximum.

    Also the FLOPs of matrix products, convolutions and attention, two for a product and its sum.
    Fake tensors hold no values; where the code asks for one number it gets 1 or True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # storage -> bytes
        self.now, self.peak, self.flops = 0, 0, 0

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        output = function(*args, **(kwargs or {}))
        if (count := COUNTED.get(function._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf.untyped_storage())
        return output

    def track(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.live:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live[storage._cdata] = size
        finalize(storage, self.forget, storage._cdata)
        self.add(size)

    def forget(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextmanager
    def measured(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Store the peak of the block in peaks[name], in bytes."""
        self.peak = self.now
        yield
        peaks[name] = self.peak


def traced_peak(step: Callable[[], object], frozen: Iterable[Tensor] = ()) -> int:
    """Peak bytes of all tensors that `step()` makes beyond the frozen ones; nothing is computed.

    frozen: tensors that `step` only reads, so that a view of one is not taken for a new tensor.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, TracedMemory() as memory:
        kept = [fake.from_tensor(tensor) for tensor in frozen]
        for tensor in kept:
            memory.track(tensor.untyped_storage())
        before = memory.now
        step()
    return memory.peak - before
