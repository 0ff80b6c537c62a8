"""Sharding a model over ranks, averaging sparse gradients, and gathering objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.experts.mlp import MLPExperts
from moezoo.experts.rank_one import RankOneExperts
from moezoo.experts.row_shares import set_copies, share_of
from moezoo.experts.token_table import TokenTable
from moezoo.experts.values import ValueTable
from moezoo_train.adapters.torch_distributed import exclude_from_ddp, set_timeout

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard
    from transformers import PreTrainedModel

    from moezoo_models.model.initialization import DeferredInit

# Gloo raises plain RuntimeErrors.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Timed out waiting|Socket closed|Broken pipe|"
    r"Application timeout caused pair closure"
)


_PIECE_BYTES = 1 << 28


@dataclass(frozen=True)
class ParallelDims:
    """Device meshes of a parallelized model; axes are named as in torchtitan.

    Attributes:
        dp: shards everything but the experts under expert parallelism: Lightning's
            ``data_parallel`` axis, or ``("dp_replicate", "fsdp")`` with replicas.
        ep: ``("ep",)``: ranks that share the experts of a layer; None without expert parallelism.
        expert_dp: shards a rank's experts in turn: ``("fsdp",)`` or ``("dp_replicate", "fsdp")`` of
            the processes that have the same ones; None if one process does.
        device: of this process.
    """

    dp: DeviceMesh
    ep: DeviceMesh | None
    expert_dp: DeviceMesh | None
    device: torch.device


def parallelize(
    model: PreTrainedModel, dims: ParallelDims, deferred_init: DeferredInit | None = None
) -> None:
    """Shard a model's parameters in place: by expert parallelism first, then by FSDP2 per block.

    Parameters and buffers become rank 0's. Tables with sparse gradients are replicated; of tokens,
    their shares among the ranks that have the same experts.

    Args:
        model: with parameters, or on the meta device.
        dims: the meshes.
        deferred_init: initializes a model on the meta device, each block just before it is sharded.

    Raises:
        InputError: a number of experts is not a multiple of the ranks that share them, or a width
            not of those that have the same rows.
    """
    replicated: set[nn.Parameter] = set()
    done: set[nn.Module] = set()
    decoder: Any = model.base_model
    for unit in (*decoder.layers, model):
        if deferred_init is not None:
            deferred_init.materialize(unit)
        fresh = [module for module in unit.modules() if module not in done]
        _shard(unit, fresh, dims, replicated, experts=unit is not model)
        done.update(fresh)


def _shard(
    unit: nn.Module,
    fresh: list[nn.Module],
    dims: ParallelDims,
    replicated: set[nn.Parameter],
    experts: bool,
) -> None:
    """Shard a block, or the model around its blocks.

    Args:
        unit: module whose parameters are gathered together when it computes.
        fresh: those of its modules that are not sharded yet.
        dims: the meshes.
        replicated: parameters that are not sharded; those of this unit are added.
        experts: whether it may have experts for ranks to share.
    """
    from torch.distributed.fsdp import fully_shard

    from moezoo.parallel import shard_experts

    own = [t for m in fresh for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    broadcast_from_rank0(list(dict.fromkeys(own)), dims.device)
    shared: list[nn.Module] = []
    if dims.ep is not None and experts:
        shared = shard_experts(unit, dims.ep)
    replicated.update(p for _, p in sparse_parameters(unit))
    for store in shared:
        if isinstance(store, TokenTable) and store.sparse:
            set_copies(store.weight, dims.expert_dp)
        elif dims.expert_dp is None:
            replicated.update(store.parameters())
        else:
            placement = _placement(store, dims.expert_dp)
            fully_shard(store, mesh=dims.expert_dp, shard_placement_fn=placement)
    # A table may be read by several blocks: it is gathered by itself.
    tables = [m for m in fresh if isinstance(m, ValueTable) and m not in shared and not m.sparse]
    for part in (*tables, unit):
        fully_shard(
            part,
            mesh=dims.dp,
            ignored_params=replicated,
            shard_placement_fn=_placement(part, dims.dp),
        )


def _placement(unit: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    """Return which dimension of a parameter is sharded over the last axis of a mesh.

    Raises:
        InputError: the ranks do not divide the width of a table whose rows others share.
    """
    from torch.distributed.tensor import DTensor, Shard

    shards = mesh.size(mesh.ndim - 1)
    if isinstance(unit, TokenTable) and unit.mesh is not None:
        if unit.v_dim % shards:
            raise InputError(
                f"{unit.width_name}: rows of {unit.v_dim} are not a multiple of the {shards} "
                "processes that share them; change it, or set the layer's sparse to true"
            )
        return lambda parameter: Shard(1)
    stacks = {p for m in unit.modules() if isinstance(m, MLPExperts) for p in m.parameters()}

    def place(parameter: nn.Parameter) -> Shard:
        if parameter not in stacks:
            return Shard(0)
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(shard_dimension(own.shape, shards))

    return place


def shard_dimension(stack: Sequence[int], shards: int) -> int:
    """Return the dimension in which FSDP2 shards a stack of experts, ``(experts, rows, ...)``.

    Whole experts, where the shards divide them; if not, the rows of every expert, where the shards
    divide those: torch pads the first dimension alone. Where they divide neither, some processes
    get fewer experts than others, or none, and all hold and send as much as the first.

    Args:
        stack: shape of the experts that the shards have in common.
        shards: number of processes.
    """
    experts, rows = stack[:2]
    return 1 if experts % shards and rows % shards == 0 else 0


def broadcast_from_rank0(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Overwrite tensors with rank 0's: seeds may differ between processes."""
    for tensor in tensors:
        for part in _pieces(tensor.detach(), device):
            value = part.to(device)
            dist.broadcast(value, 0)
            part.copy_(value)


def _pieces(tensor: Tensor, device: torch.device) -> Sequence[Tensor]:
    """Cut a tensor that may not fit on the device: that of a table in main memory."""
    if tensor.device.type == device.type or tensor.ndim < 2:
        return [tensor]
    return tensor.split(max(1, _PIECE_BYTES * len(tensor) // max(1, tensor.nbytes)))


def sparse_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List the parameters that get sparse gradients, by name."""
    return [
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in model.named_modules()
        if isinstance(module, ValueTable | RankOneExperts) and module.sparse
        for name, parameter in module.named_parameters(recurse=False)
    ]


def keep_from_ddp(model: nn.Module, device: torch.device) -> None:
    """Exclude parameters with sparse gradients from DDP, which cannot reduce them."""
    sparse = dict(sparse_parameters(model))
    if sparse:
        exclude_from_ddp(model, list(sparse))
        broadcast_from_rank0(list(sparse.values()), device)


@torch.no_grad()
def average_sparse_gradients(model: nn.Module, device: torch.device) -> None:
    """Average sparse gradients over all processes, which DDP and FSDP2 do not.

    Each process sends the rows that it has. The mean is coalesced and the same everywhere, to the
    bit: rows are summed in the order of ranks. Of a table that ranks share, that is left to do
    among those that have the same rows.

    Args:
        model: has the gradients.
        device: of this process; gradients of tables in main memory travel over it.
    """
    for _, parameter in sparse_parameters(model):
        if process_count() == 1 or parameter.grad is None:
            continue
        share = share_of(parameter)
        groups: Sequence[Any] = [None]
        if share is not None:
            groups = [] if share.copies is None else share.copies.get_all_groups()
        for group in groups:
            parameter.grad = _average(parameter.grad.coalesce(), group, device)


def _average(gradient: Tensor, group: Any, device: torch.device) -> Tensor:
    indices = _gather_rows(gradient.indices()[0], group, device)
    values = _gather_rows(gradient.values(), group, device) / dist.get_world_size(group)
    return torch.sparse_coo_tensor(indices[None], values, gradient.shape).coalesce()


def _gather_rows(own: Tensor, group: Any, device: torch.device) -> Tensor:
    """Concatenate the rows of a group's processes, of which there may be different numbers.

    They are where this process's were.
    """
    counts = [
        torch.zeros((), dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(counts, torch.tensor(len(own), device=device), group)
    longest = max(int(count) for count in counts)
    padded = torch.zeros(longest, *own.shape[1:], dtype=own.dtype, device=device)
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group)
    kept = [rows[: int(count)] for rows, count in zip(gathered, counts, strict=True)]
    return torch.cat(kept).to(own.device)


def process_count() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_at_most(timeout: timedelta, mesh: DeviceMesh) -> None:
    """Set the timeout of all process groups of a mesh, which torch creates with its default."""
    for group in mesh.get_all_groups():
        set_timeout(group, timeout)


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error says that another process ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


def gather_from_ranks(own: Any) -> list[Any]:
    """All-gather an object, in the order of ranks; all ranks must call this together."""
    if process_count() == 1:
        return [own]
    ranks: list[Any] = [None] * process_count()
    dist.all_gather_object(ranks, own)  # pickled, but only between the processes of one run
    return ranks
