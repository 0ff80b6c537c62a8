"""A table of value vectors, read as weighted bags, and shared by layers that name the same pool.

``y = Σ_k w_k V[i_k]``: no ``(T, K, V)`` tensor of gathered rows exists at any time, and neither
direction uses atomics on floats, so equal inputs give bit-identical gradients.

Shapes: T tokens, N slots, K slots read per token (all heads), V width of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_int
from moezoo.routing.memory_numbers import numbered_memories
from moezoo.routing.model_sparsity import shared_sparsity
from moezoo_kernels import weighted_bag

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


Table = TypeVar("Table", bound="ValueTable")


class ValueTable(nn.Module):
    """N trained vectors.

    Args:
        num_slots: number of vectors N.
        v_dim: their width V.
        sparse: give the weight a sparse gradient, which holds the rows that were read and no
            others (for ``torch.optim.SparseAdam`` or ``SGD``). Not under ``torch.compile``.

    Attributes:
        mesh: the ranks that share the values' width, after :meth:`shard`.
        width_name: what messages call the width.
    """

    can_shard = True
    width_name = "v_dim"

    def __init__(self, num_slots: int, v_dim: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.num_slots = check_int("num_slots", num_slots)
        self.v_dim = check_int("v_dim", v_dim)
        self.sparse = sparse
        self.mesh: DeviceMesh | None = None
        self.weight = nn.Parameter(torch.empty(num_slots, v_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the values from N(0, 1 / v_dim)."""
        nn.init.normal_(self.weight, std=self.v_dim**-0.5)

    def forward(self, indices_TK: Tensor, weights_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        """Sum the weighted values of each token, ``(T, V)`` in the table's dtype.

        Padding gets zeros and gives no gradient; where the gradient is sparse, it leaves no rows
        in it either, since an optimizer's momentum would move those.
        """
        if mask_T is not None:
            indices_TK = indices_TK.masked_fill(~mask_T.unsqueeze(-1), -1)
        if self.mesh is None:
            return weighted_bag(self.weight, indices_TK, weights_TK, sparse=self.sparse)
        from moezoo.parallel import TokenGather, own

        gather = TokenGather(len(indices_TK), self.mesh)
        read = gather.all_gather(indices_TK), gather.all_gather(weights_TK)
        columns_RTV = gather.scatter(weighted_bag(own(self.weight), *read))
        return columns_RTV.movedim(0, 1).flatten(1)

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this rank's columns of every value, as Memory Layers at Scale do (section 3.2).

        See :func:`moezoo.parallel.shard_experts`.

        Raises:
            InputError: the ranks do not divide the width, or gradients are sparse.
        """
        from moezoo.parallel import split_parameters

        if self.sparse:
            raise InputError("sparse: values that ranks share have no sparse gradients; set false")
        split_parameters(self, mesh, 1, self.width_name)
        self.mesh = mesh

    def reference(self, indices_TK: Tensor, weights_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        """Multiply a dense ``(T, N)`` matrix of weights with the whole table."""
        if mask_T is not None:
            weights_TK = weights_TK.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        weight = self._whole()
        weights_TK = weights_TK.to(weight)
        dense_TN = weights_TK.new_zeros(len(weights_TK), self.num_slots)
        dense_TN = dense_TN.scatter_add(1, indices_TK.to(weight.device), weights_TK)
        return (dense_TN @ weight).to(indices_TK.device)

    def rows(self, indices_TH: Tensor) -> Tensor:
        """Return single rows, ``(T, H, V)`` in the table's dtype; zeros for the index -1."""
        flat = indices_TH.reshape(-1, 1).to(self._where_to_read(indices_TH))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        read = self(flat, torch.ones(flat.shape, dtype=wide, device=flat.device), None)
        return read.reshape(*indices_TH.shape, read.shape[-1]).to(indices_TH.device)

    def reference_rows(self, indices_TH: Tensor) -> Tensor:
        """Return the same by indexing."""
        weight = self._whole()
        missing = (indices_TH < 0).unsqueeze(-1)
        read = weight[indices_TH.clamp(min=0).to(weight.device)]
        return read.to(indices_TH.device).masked_fill(missing, 0.0)

    def _whole(self) -> Tensor:
        """Return the whole table; with a mesh, all ranks must call this together."""
        if self.mesh is None:
            return self.weight
        from moezoo.parallel import whole

        return whole(self.weight)

    def _where_to_read(self, indices: Tensor) -> torch.device:
        """Return the device on which single rows are read."""
        return self.weight.device

    def flops_per_row(self) -> int:
        """Return the forward FLOPs of one value read."""
        return 2 * self.v_dim

    def extra_repr(self) -> str:
        """Show the size."""
        return f"num_slots={self.num_slots}, v_dim={self.v_dim}, sparse={self.sparse}"


_POOLS: ContextVar[dict[str, ValueTable] | None] = ContextVar("moezoo_value_pools", default=None)


@contextmanager
def shared_values() -> Iterator[None]:
    """Share the values of layers built inside that name the same ``value_pool``.

    Those with ``balance.sparsity_scope: model`` share one sparsity; memories of n-grams are
    numbered.

    The first layer of a pool owns the table: it alone holds it in ``parameters()``,
    ``state_dict()`` and ``cost()``. The others refer to it, and follow it when the model that
    holds them all is moved, copied or loaded. Each block is a world of its own, so two models never
    share::

        with moezoo.shared_values():
            layers = [moezoo.MemoryPlus(64, value_pool="memory") for _ in range(3)]

    The decoder and :func:`moezoo.swap` do this for their blocks. A layer built outside has a table
    of its own, whatever pool it names.

    Returns:
        A context manager that yields nothing.
    """
    token = _POOLS.set({})
    try:
        with shared_sparsity(), numbered_memories():
            yield
    finally:
        _POOLS.reset(token)


def value_table(
    num_slots: int, v_dim: int, sparse: bool, pool: str | None
) -> tuple[ValueTable, bool]:
    """Return the pool's table, made if there is none, and whether the caller owns it.

    Raises:
        InputError: the pool's table is of another size or kind.
    """
    options: dict[str, Any] = {"num_slots": num_slots, "v_dim": v_dim, "sparse": sparse}
    return pooled("value_pool", pool, partial(ValueTable, **options), options)


def pooled(
    field: str, pool: str | None, make: Callable[[], Table], options: Mapping[str, Any]
) -> tuple[Table, bool]:
    """Return the pool's table, made if there is none, and whether the caller owns it.

    Args:
        field: the layer's option that names the pool.
        pool: its name; None: the layer has a table of its own.
        make: makes the table.
        options: attributes in which the pool's table must be the wanted one.

    Raises:
        InputError: the pool's table is of another kind, or differs in an attribute.
    """
    pools = _POOLS.get()
    if pool is None or pools is None:
        return make(), True
    if pool not in pools:
        made = make()
        pools[pool] = made
        return made, True
    table: Any = pools[pool]
    for name, wanted in options.items():
        if wanted != getattr(table, name, None):
            raise InputError(
                f"{field}: layers of pool '{pool}' differ in {name} "
                f"({getattr(table, name, None)} and {wanted}); make them equal or name another pool"
            )
    return table, False
