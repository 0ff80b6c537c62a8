"""Tables whose rows token ids address: no search, so a row can be fetched before it is needed.

Shapes: T tokens, K rows per token, V width of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_flag
from moezoo.experts.fetched_rows import RowFetches, distinct_rows, staying
from moezoo.experts.values import ValueTable
from moezoo.feed_forward import FeedForward, ParameterGroup, TokenContext, set_apart
from moezoo.routing.hashing import addressed
from moezoo.routing.stats import SlotLoad, slot_load
from moezoo_kernels import weighted_bag

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class TokenTable(ValueTable):
    """Trained rows, read one by one, or summed as those of a :class:`ValueTable`.

    It may lie on another device than the ids: what is read comes back to theirs. Ranks that share
    it hold rows each (:mod:`moezoo.experts.row_shares`).

    Args:
        num_slots: number of rows.
        v_dim: their width V.
        width_name: the layer's option that V follows from.
        std: of fresh rows.
        sparse: as for :class:`ValueTable`.
        offload: keep the table in main memory, wherever the module is moved to. The rows that are
            read are copied to the tokens' device, and :meth:`prefetch` begins that.

    Raises:
        InputError: it is offloaded, and gradients are not sparse.
    """

    def __init__(
        self,
        num_slots: int,
        v_dim: int,
        *,
        width_name: str = "v_dim",
        std: float = 1.0,
        sparse: bool = False,
        offload: bool = False,
    ) -> None:
        self.width_name = width_name
        self.std = std
        self.offload = check_flag("offload", offload)
        if offload and not sparse:
            raise InputError(
                "offload: a dense gradient would move the whole table; set sparse to true"
            )
        super().__init__(num_slots, v_dim, sparse=sparse)
        self._fetches = RowFetches()

    def reset_parameters(self) -> None:
        """Draw the rows from N(0, std²)."""
        nn.init.normal_(self.weight, std=self.std)

    def looked_up(self, indices_TH: Tensor) -> Tensor:
        """Return :meth:`rows` of no row -1, ``(T, H, V)``, without the checks of a bag."""
        if self.mesh is not None or self.weight.device != indices_TH.device:
            return self.rows(indices_TH)
        return F.embedding(indices_TH, self.weight)

    def forward(self, indices_TK: Tensor, weights_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        """Sum the weighted rows of each token, ``(T, V)``; see :class:`ValueTable`."""
        if self.mesh is None and not self.offload:
            return super().forward(indices_TK, weights_TK, mask_T)
        if mask_T is not None:
            indices_TK = indices_TK.masked_fill(~mask_T.unsqueeze(-1), -1)
        if self.offload:
            if torch.compiler.is_compiling():
                raise ValueError("offload: torch.compile has no sparse gradients; set it to false")
            read_UV, places_TK = self._fetches.read(self.weight, indices_TK)
        else:
            from moezoo.experts.row_shares import exchanged_rows

            assert self.mesh is not None
            rows_U, places_TK = distinct_rows(indices_TK, self.num_slots)
            read_UV = exchanged_rows(self.weight, rows_U, self.num_slots, self.mesh)
        return weighted_bag(read_UV, places_TK, weights_TK)

    def prefetch(self, indices_TK: Tensor) -> None:
        """Begin to fetch the rows that a layer will read, if the table is offloaded.

        Args:
            indices_TK: int64 on the tokens' device, -1 for none: the very tensor, unchanged, that
                the table will be called with; otherwise what was fetched is fetched again.
        """
        if self.offload and not self.weight.is_meta:
            self._fetches.begin(self.weight, indices_TK)

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this rank's rows; see :func:`moezoo.parallel.shard_experts`.

        Raises:
            InputError: the table is offloaded.
        """
        from moezoo.experts.row_shares import split_rows

        if self.offload:
            raise InputError("offload: what ranks share lies on their devices; set it to false")
        self.weight = split_rows(self.weight, mesh, self.sparse)
        self.mesh = mesh

    def _whole(self) -> Tensor:
        if self.mesh is None:
            return self.weight
        from moezoo.experts.row_shares import share_of
        from moezoo.parallel import whole

        share = share_of(self.weight)
        return whole(self.weight if share is None else share.dtensor(self.weight))

    def _where_to_read(self, indices: Tensor) -> torch.device:
        return indices.device if self.offload else super()._where_to_read(indices)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenTable:
        return super()._apply(staying(fn) if self.offload else fn, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mesh is not None and self.sparse:
            from moezoo.experts.row_shares import share_of

            share = share_of(self.weight)
            assert share is not None
            destination[f"{prefix}weight"] = share.dtensor(self.weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.mesh is not None and self.sparse:
            from moezoo.experts.row_shares import load_share

            load_share(state_dict, f"{prefix}weight", self.weight)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what is being fetched."""
        return {**self.__dict__, "_fetches": RowFetches()}


class _Call(NamedTuple):
    """What rows follow from, as it was."""

    shape: torch.Size
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, hidden: Tensor, *tensors: Tensor | None) -> _Call:
        versions = (0 if t is None or t.is_inference() else t._version for t in tensors)
        return cls(hidden.shape[:-1], tensors, tuple(versions))

    def is_of(self, hidden: Tensor, *tensors: Tensor | None) -> bool:
        """Return whether a call is of the same tensors, and none has changed."""
        other = _Call.of(hidden, *tensors)
        same = all(one is two for one, two in zip(self.tensors, tensors, strict=True))
        return same and self.shape == other.shape and self.versions == other.versions


class ReadsTokenRows(FeedForward):
    """A layer whose tables' rows follow from token ids, so that they can be fetched ahead.

    Attributes:
        immaterial: arguments on which no number depends; a run may be resumed with others.
        offload: whether the tables stay in main memory.
    """

    immaterial: ClassVar[frozenset[str]] = frozenset({"offload"})
    offload: bool
    _ahead: tuple[_Call, tuple[Tensor, Tensor | None]] | None = None

    def rows_of(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Return the rows that each token reads, ``(T, K)``, and the mask ``(T,)``.

        Padding has the row -1, and so has a token with fewer rows than others.

        Raises:
            InputError: token ids are missing or outside the vocabulary, or a shape does not match.
        """
        raise NotImplementedError

    def token_tables(self) -> list[TokenTable]:
        """Return the tables of which these are the rows."""
        raise NotImplementedError

    def prefetch(
        self, hidden: Tensor, *, token_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Begin to fetch the rows that a call will read, of tables that are offloaded.

        No result depends on it.

        Args:
            hidden: of the call's shape, whatever its values.
            token_ids: the very tensor of the call.
            mask: likewise.

        Raises:
            InputError: as :meth:`rows_of`.
        """
        tables = [table for table in self.token_tables() if table.offload]
        if tables and not torch.compiler.is_compiling():
            with torch.no_grad():
                rows, mask_T = self.rows_of(hidden, TokenContext(token_ids=token_ids, mask=mask))
            rows = rows.contiguous()  # the tables are to know it again
            self._ahead = _Call.of(hidden, token_ids, mask), (rows, mask_T)
            for table in tables:
                table.prefetch(rows)

    def rows_ahead(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Return :meth:`rows_of`, from :meth:`prefetch` if that was for this very call."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].is_of(hidden, context.token_ids, context.mask):
            return ahead[1]
        return self.rows_of(hidden, context)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what is being fetched."""
        return {**self.__dict__, "_ahead": None}


class ReadsOneRow(ReadsTokenRows):
    """A layer with one table, which has a row for each id, trained apart.

    Attributes:
        table: the rows.
        vocab_size: how many there are.
        table_lr_multiplier: learning rate of the table, as a multiple of the run's.
    """

    table: TokenTable
    vocab_size: int
    table_lr_multiplier: float

    def rows_of(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Return each token's row, ``(T, 1)``, -1 at padding, and the mask ``(T,)``."""
        return rows_of_tokens(hidden, context, self.vocab_size, type(self).__name__)

    def token_tables(self) -> list[TokenTable]:
        """Return the table."""
        return [self.table]

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Count how often each row is read."""
        rows_T1, _ = self.rows_of(hidden, context)
        return slot_load(rows_T1, None, self.vocab_size, kind="rows")

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put the table apart: a learning rate of its own, no decay, perhaps sparse."""
        table = row_group(self.table, self.table_lr_multiplier)
        return set_apart(super().parameter_groups(), table)


def row_group(table: ValueTable, lr_multiplier: float) -> list[ParameterGroup]:
    """Return the group of a table's rows, if they are trained: no decay, sparse if they are."""
    if not table.weight.requires_grad:
        return []
    return [
        ParameterGroup(
            "token rows",
            [table.weight],
            lr_multiplier=lr_multiplier,
            weight_decay=False,
            sparse=table.sparse,
        )
    ]


def rows_of_tokens(
    hidden: Tensor,
    context: TokenContext,
    vocab_size: int,
    layer: str,
    address: Callable[[Tensor, Tensor | None, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of a table that each token addresses, ``(T, C)``, and the mask, ``(T,)``.

    Padding has the row -1.

    Args:
        hidden: ``(..., d_model)``.
        context: of the call.
        vocab_size: ids are below it.
        layer: what messages call the layer.
        address: as of :func:`moezoo.routing.hashing.addressed`; None: a token's id is its row.

    Raises:
        InputError: token ids are missing or outside the vocabulary, or a shape does not match.
    """
    given = (context.token_ids, context.mask, vocab_size)
    rows_TC, mask_T = addressed(hidden, *given, address or rows_by_id, layer)
    if mask_T is not None:
        rows_TC = rows_TC.masked_fill(~mask_T.unsqueeze(-1), -1)
    return rows_TC, mask_T


def rows_by_id(token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Return the ids of the last tokens, ``(T, 1)``, whose rows are theirs."""
    return token_ids[..., token_ids.shape[-1] - length :].reshape(-1, 1).long()


def all_numbers(layer: nn.Module) -> int:
    """Count a layer's parameters; of tables that ranks share, also the rows that others hold."""
    tables = {m.weight: m for m in layer.modules() if isinstance(m, TokenTable)}
    return sum(
        tables[p].num_slots * tables[p].v_dim if p in tables else p.numel()
        for p in layer.parameters()
    )
