"""What the processes of a run share: a model laid out over them, objects, sparse gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from moezoo.experts.rank_one import RankOneExperts
from moezoo.experts.values import ValueTable

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from moezoo_models.model.initialization import DeferredInit

# Gloo raises plain RuntimeErrors.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Timed out waiting|Socket closed|Broken pipe|"
    r"Application timeout caused pair closure"
)


@dataclass(frozen=True)
class Layout:
    """How a model lies on processes.

    Attributes:
        dense: over which everything but shared experts is divided; two-dimensional if there are
            replicas, which come first.
        experts: ranks that share the experts of a layer; None if no layer is shared.
        beside_experts: over which each share of the experts is divided in turn; None if a share
            lies on one process.
        device: of this process.
    """

    dense: DeviceMesh
    experts: DeviceMesh | None
    beside_experts: DeviceMesh | None
    device: torch.device


def lay_out(
    model: PreTrainedModel, layout: Layout, deferred_init: DeferredInit | None = None
) -> None:
    """Divide a model's parameters, in place: by experts first, then by blocks (FSDP2).

    Parameters and buffers become those of the first process. Tables with sparse gradients stay
    whole on every process.

    Args:
        model: with parameters, or on the meta device.
        layout: the meshes.
        deferred_init: initializes a model on the meta device, each block just before it is sharded.

    Raises:
        InputError: the ranks do not divide what they are to share.
    """
    left_alone: set[nn.Parameter] = set()
    done: set[nn.Module] = set()
    decoder: Any = model.base_model
    for unit in (*decoder.layers, model):
        if deferred_init is not None:
            deferred_init.materialize(unit)
        fresh = [module for module in unit.modules() if module not in done]
        _divide(unit, fresh, layout, left_alone, experts=unit is not model)
        done.update(fresh)


def _divide(
    unit: nn.Module,
    fresh: list[nn.Module],
    layout: Layout,
    left_alone: set[nn.Parameter],
    experts: bool,
) -> None:
    """Divide a block, or the model around its blocks.

    Args:
        unit: what is gathered together when it computes.
        fresh: those of its modules that are not divided yet.
        layout: the meshes.
        left_alone: parameters that stay as they are; those of this unit are added.
        experts: whether it may have some, for ranks to share.
    """
    from torch.distributed.fsdp import fully_shard

    from moezoo.parallel import shard_experts

    own = [t for m in fresh for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    take_from_first(list(dict.fromkeys(own)), layout.device)
    left_alone.update(p for _, p in sparse_parameters(unit))
    shared: list[nn.Module] = []
    if layout.experts is not None and experts:
        shared = shard_experts(unit, layout.experts)
    for store in shared:
        if layout.beside_experts is None:
            left_alone.update(store.parameters())
        else:
            fully_shard(store, mesh=layout.beside_experts)
    # A table may be read by several blocks: it is gathered by itself.
    tables = [m for m in fresh if isinstance(m, ValueTable) and m not in shared and not m.sparse]
    for part in (*tables, unit):
        fully_shard(part, mesh=layout.dense, ignored_params=left_alone)


def take_from_first(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Overwrite tensors by those of the first process: seeds may differ between processes."""
    for tensor in tensors:
        sent = tensor.detach().to(device)
        dist.broadcast(sent, 0)
        tensor.detach().copy_(sent)


def sparse_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List the parameters that get sparse gradients, by name."""
    return [
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in model.named_modules()
        if isinstance(module, ValueTable | RankOneExperts) and module.sparse
        for name, parameter in module.named_parameters(recurse=False)
    ]


def keep_from_ddp(model: nn.Module, device: torch.device) -> None:
    """Tell DDP, which can not sum them, to leave parameters with sparse gradients alone."""
    sparse = dict(sparse_parameters(model))
    if sparse:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(sparse))
        take_from_first(list(sparse.values()), device)


@torch.no_grad()
def average_sparse_gradients(model: nn.Module) -> None:
    """Average sparse gradients over all processes, which data parallelism leaves alone.

    Each process sends the rows that it has. The mean is coalesced and the same everywhere, to the
    bit: rows are summed in the order of ranks.
    """
    for _, parameter in sparse_parameters(model):
        if process_count() > 1 and parameter.grad is not None:
            parameter.grad = _average(parameter.grad.coalesce())


def _average(gradient: Tensor) -> Tensor:
    indices = _gather_rows(gradient.indices()[0])
    values = _gather_rows(gradient.values()) / process_count()
    return torch.sparse_coo_tensor(indices[None], values, gradient.shape).coalesce()


def _gather_rows(own: Tensor) -> Tensor:
    """Concatenate the rows of all processes, of which there may be different numbers."""
    counts = [torch.zeros((), dtype=torch.int64, device=own.device) for _ in range(process_count())]
    dist.all_gather(counts, torch.tensor(len(own), device=own.device))
    longest = max(int(count) for count in counts)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[: int(count)] for rows, count in zip(gathered, counts, strict=True)])


def process_count() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_at_most(timeout: timedelta, mesh: DeviceMesh) -> None:
    """Let processes of a mesh wait so long for each other: torch would take its own default."""
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error says that another process ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


def gather_from_ranks(own: Any) -> list[Any]:
    """Collect every rank's object, in the order of ranks; all ranks must call this together."""
    if process_count() == 1:
        return [own]
    ranks: list[Any] = [None] * process_count()
    dist.all_gather_object(ranks, own)  # pickled, but only between the processes of one run
    return ranks
