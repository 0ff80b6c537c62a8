"""A table in shares of its rows, one on each rank, and the exchange of rows that tokens read.

Ranks hold equal runs of rows, of which the last may be short or empty, as ``DTensor`` has them. A
rank asks for each row that its tokens read once, however many of them read it, and the owner
returns it; in the backward pass its gradient takes the same way back, and the owner sums what came
from several ranks in the order of ranks.

Shapes: U rows that this rank reads, N rows that it is asked for, V width of a row, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn

from moezoo.parallel import divided_gradient, exchange, own
from moezoo_kernels import weighted_bag

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_FIELD = "moezoo_row_share"


@dataclass(frozen=True)
class RowShare:
    """Which rows of a table a plain parameter holds: one whose gradient is sparse.

    ``DTensor`` has no sparse gradients, so such a parameter is this rank's rows and no more, and
    its optimizer state likewise; state dicts hold :meth:`dtensor` of both.

    Attributes:
        mesh: the ranks that share the table.
        num_rows: of the whole table.
        copies: mesh of the ranks that hold the same rows, over which the gradient is still to be
            averaged; None: no other does.
    """

    mesh: DeviceMesh
    num_rows: int
    copies: DeviceMesh | None = None

    def dtensor(self, rows: Tensor) -> Tensor:
        """Return a ``DTensor`` of the whole table's shape on the storage of this rank's rows."""
        return _dtensor(rows.detach(), self.mesh, self.num_rows)

    def part(self, rows: Tensor) -> Tensor:
        """Return a ``DTensor`` of which some rows, as many as there are, are this rank's.

        Its shape is a fiction, since ranks may have different numbers of them; norms are right.
        """
        return _dtensor(rows, self.mesh, len(rows) * self.mesh.size())


def share_of(parameter: Tensor) -> RowShare | None:
    """Return the share that a plain parameter is; None if it is whole, or a ``DTensor``."""
    return getattr(parameter, _FIELD, None)


def set_copies(parameter: Tensor, copies: DeviceMesh | None) -> None:
    """Note on a share which other ranks hold the same rows."""
    share = share_of(parameter)
    assert share is not None
    setattr(parameter, _FIELD, replace(share, copies=copies))


def split_rows(parameter: nn.Parameter, mesh: DeviceMesh, sparse: bool) -> nn.Parameter:
    """Return this rank's rows of a table: a ``DTensor``, or a plain share if ``sparse``."""
    num_rows = parameter.shape[0]
    start, end = own_rows(num_rows, mesh)
    local = parameter.detach()[start:end].clone()
    if not sparse:
        local = _dtensor(local, mesh, num_rows)
    split = nn.Parameter(local, requires_grad=parameter.requires_grad)
    if sparse:
        setattr(split, _FIELD, RowShare(mesh, num_rows))
    return split


def own_rows(num_rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Return which rows this rank holds: the first, and the one behind the last."""
    each = _rows_of_a_rank(num_rows, mesh)
    start = min(num_rows, each * mesh.get_local_rank())
    return start, min(num_rows, start + each)


def _rows_of_a_rank(num_rows: int, mesh: DeviceMesh) -> int:
    """Return how many rows every rank holds but for the last."""
    return -(-num_rows // mesh.size())


def _dtensor(local: Tensor, mesh: DeviceMesh, num_rows: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((num_rows, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def exchanged_rows(weight: Tensor, rows_U: Tensor, num_rows: int, mesh: DeviceMesh) -> Tensor:
    """Return rows of a table that ranks share, ``(U, V)``; all ranks must call this together.

    The gradient of this rank's share is the mean over ranks: dense, or sparse for a plain share.

    Args:
        weight: from :func:`split_rows`.
        rows_U: int64, ascending; ranks may read different numbers of rows, none included.
        num_rows: of the whole table.
        mesh: the ranks.
    """
    ranks, each = mesh.size(), _rows_of_a_rank(num_rows, mesh)
    leaving_R = torch.bincount(rows_U // each, minlength=ranks)
    arriving_R = collectives.all_to_all_single(leaving_R, None, None, mesh)
    leaving, arriving = torch.stack([leaving_R, arriving_R]).tolist()
    asked_N = collectives.all_to_all_single(rows_U, arriving, leaving, mesh)
    places_N1 = (collectives.wait_tensor(asked_N) - each * mesh.get_local_rank()).unsqueeze(-1)
    sparse = share_of(weight) is not None
    held = divided_gradient(weight, ranks) if sparse else own(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    ones_N1 = torch.ones(places_N1.shape, dtype=wide, device=places_N1.device)
    answers_NV = weighted_bag(held, places_N1, ones_N1, sparse=sparse)
    return collectives.wait_tensor(exchange(answers_NV, arriving, leaving, mesh))


def load_share(state_dict: dict[str, Any], name: str, weight: Tensor) -> None:
    """Replace a whole table in a state dict, or a ``DTensor``, by what a share holds; in place."""
    share, given = share_of(weight), state_dict.get(name)
    if share is None or not isinstance(given, Tensor):
        return
    local: Any = getattr(given, "to_local", None)
    if local is not None:
        state_dict[name] = local()
    elif given.shape[0] == share.num_rows:
        start, _ = own_rows(share.num_rows, share.mesh)
        state_dict[name] = given.narrow(0, start, len(weight))
