"""Mixtures whose experts a table of token ids names: DeepSeek-V4's first layers.

DeepSeek-AI 2026, arXiv:2606.19348, section 2.1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moezoo.arguments import plain, signature
from moezoo.errors import InputError
from moezoo.feed_forward import TokenContext
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import Router, Routing
from moezoo_models.adopt.aside import Aside
from moezoo_models.adopt.holding import Held


class TableRouter(Router):
    """A router that weighs experts which a table has chosen.

    Args:
        rows: number of token ids V.
        arguments: of a :class:`~moezoo.routing.Router`.
    """

    table: Tensor

    def __init__(self, *arguments: Any, rows: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("table", torch.empty(rows, self.top_k, dtype=torch.int64))
        self._rows_TK = Aside()

    def read(self, token_ids: Tensor | None) -> None:
        """Look up the experts of the tokens that are routed next; None to forget them."""
        self._rows_TK.put(None if token_ids is None else self.table[token_ids.reshape(-1)].long())

    def _choose(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        return self._rows_TK.look()


class TableMoE(SparseMoE):
    """A mixture with a :class:`TableRouter`, which reads ``token_ids``.

    Args:
        d_model: width of the residual stream.
        rows: number of token ids V.
        arguments: of a :class:`moezoo.SparseMoE`.
    """

    needs_token_ids: ClassVar[bool] = True

    def __init__(self, d_model: int, *, rows: int, **arguments: Any) -> None:
        super().__init__(d_model, **arguments)
        slots, options = self.gate.num_experts, {"options": self.router, "balance": self.balance}
        self.gate: TableRouter = TableRouter(d_model, slots, self.top_k, rows=rows, **options)

    def routed(
        self, hidden: Tensor, context: TokenContext, limited: bool
    ) -> tuple[Tensor, Routing, Tensor | None]:
        """Route by the table.

        Raises:
            InputError: there are no ``token_ids``.
        """
        if context.token_ids is None:
            raise InputError("token_ids: missing; a table of them chooses the experts, give them")
        self.gate.read(context.token_ids)
        try:
            return super().routed(hidden, context, limited)
        finally:
            self.gate.read(None)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Return the hidden states of a call alone."""
        self.gate.read(token_ids)
        try:
            given = {"token_ids": token_ids, "router_input": router_input, "mask": mask}
            return super().infer(hidden, **given)
        finally:
            self.gate.read(None)

    def config(self) -> dict[str, Any]:
        """Describe the layer. It is no method: ``from_config`` does not build it again."""
        arguments = {name: plain(getattr(self, name)) for name in signature(SparseMoE)}
        arguments["rows"] = len(self.gate.table)
        return {"class_path": f"{type(self).__module__}.TableMoE", "init_args": arguments}


class HeldByTable(Held):
    """A layer in the place of a block that is called with ``input_ids`` too."""

    def context_of(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return what the layer is given beside hidden states."""
        return {"token_ids": args[0] if args else kwargs["input_ids"]}

    def try_out(self, hidden: Tensor) -> Any:
        """Compute what the block does with some token ids."""
        return self(hidden, some_token_ids(hidden, self.layer))

    def theirs(self, hidden: Tensor) -> Any:
        """Compute the same by the block's own forward pass."""
        return type(self.block).forward(self.block, hidden, some_token_ids(hidden, self.layer))


def some_token_ids(hidden: Tensor, layer: Any) -> Tensor:
    """Return token ids ``(...)`` that follow from the number of tokens alone."""
    ids = torch.arange(hidden[..., 0].numel(), device=hidden.device).square()
    return (ids % len(layer.gate.table)).reshape(hidden.shape[:-1])
