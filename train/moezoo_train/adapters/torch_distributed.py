"""Private API of torch.distributed, as of 2.13."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """Set how long the processes of a group wait for each other.

    Uses ``distributed_c10d._set_pg_timeout``: ``init_device_mesh`` makes groups with the default
    timeout, and takes no other. If moved: ImportError.
    """
    _set_pg_timeout(timeout, group)


def exclude_from_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """Keep DDP from reducing the gradients of these parameters, or broadcasting them.

    Uses ``DistributedDataParallel._set_params_and_buffers_to_ignore_for_model``: the constructor
    takes no such list. If renamed: AttributeError before training.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def shard_bounds(tensor: DTensor) -> list[tuple[int, int]]:
    """Return ``(start, length)`` of this process's shard of a tensor, by dimension.

    Uses ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``: public API
    shards a full tensor only by communication. If moved: ImportError.
    """
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return list(zip(offset, shape, strict=True))
