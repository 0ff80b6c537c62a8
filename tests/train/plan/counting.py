"""Counts what collectives send; imported by processes that must not load Lightning."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 32
# What torch calls a collective, and which of its arguments is the whole.
WHOLE = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
}
WAITING = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


class CountingMode(TorchDispatchMode):
    """Adds up the bytes of every collective that passes torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and func._schema.name not in WAITING:
            kind, position = WHOLE[func._schema.name]  # an unknown collective fails the test
            whole = args[position]
            if kind == "all_to_all" and whole.shape[-1] != WIDTH:
                kind = "counts, indices and weights"
            for tensor in [whole] if isinstance(whole, torch.Tensor) else whole:
                self.bytes[kind] += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))
