"""Tables whose rows token ids address: no search, so a row can be fetched before it is needed.

Shapes: T tokens, V width of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.experts.values import ValueTable
from moezoo.feed_forward import ParameterGroup, TokenContext
from moezoo.routing.hashing import addressed


class TokenTable(ValueTable):
    """Trained rows, read one by one, or summed as those of a :class:`ValueTable`.

    It may lie on another device than the ids: what is read comes back to theirs.

    Args:
        num_slots: number of rows.
        v_dim: their width V.
        width_name: the layer's option that V follows from.
        std: of fresh rows.
        sparse: as for :class:`ValueTable`.
    """

    def __init__(
        self,
        num_slots: int,
        v_dim: int,
        *,
        width_name: str = "v_dim",
        std: float = 1.0,
        sparse: bool = False,
    ) -> None:
        self.width_name = width_name
        self.std = std
        super().__init__(num_slots, v_dim, sparse=sparse)

    def reset_parameters(self) -> None:
        """Draw the rows from N(0, std²)."""
        nn.init.normal_(self.weight, std=self.std)

    def looked_up(self, indices_TH: Tensor) -> Tensor:
        """Return :meth:`rows` of no row -1, ``(T, H, V)``, without the checks of a bag."""
        if self.mesh is not None or self.weight.device != indices_TH.device:
            return self.rows(indices_TH)
        return F.embedding(indices_TH, self.weight)


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
