"""Private API of torch, without its distributed part, as of 2.13."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.optim._muon import _adjust_lr
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

COPY_TO_DTYPE = torch.ops.aten._to_copy.default
"""The operator by which autocast casts; there is no public name for it.

If it changes, ``moezoo plan`` counts low-precision parameters as activations, which
``tests/train/plan/test_memory.py`` notices.
"""


def adjusted_muon_lr(lr: float, adjust_lr_fn: str | None, shape: torch.Size) -> float:
    """Return Muon's learning rate for a matrix of this shape.

    Uses ``torch.optim._muon._adjust_lr``, lest ours differ from ``torch.optim.Muon``'s. If moved:
    ImportError.
    """
    return _adjust_lr(lr, adjust_lr_fn, shape)


def set_learning_rates(scheduler: LRScheduler, rates: Sequence[float | Tensor]) -> None:
    """Set the rates of the step to come, in the optimizer and as the scheduler reports them.

    Uses ``LRScheduler._last_lr``, of which only a getter is public. If renamed: the first step of a
    resumed run logs the rate of the earlier schedule.
    """
    scheduler._last_lr = list(rates)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def storage_id(tensor: Tensor) -> int:
    """Return a number that tensors share if they share a storage, an empty one too.

    Uses ``UntypedStorage._cdata``: data pointers of empty storages are all 0. If renamed:
    AttributeError.
    """
    return int(tensor.untyped_storage()._cdata)
