"""STEM: a gated linear unit whose linear factor is a row of a table that the token's id names.

``y = W_down (act(W_gate h) * U[x])`` with x the token id and h the hidden state (Sadhukhan et al.
2026, arXiv:2601.10639, section 3). The table U takes the place of the up projection: a third of
the block's products is gone, and what the block may hold grows with the vocabulary.

Shapes: T tokens, D d_model, F hidden width, V size of the vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from moezoo.errors import check_choice, check_int, check_number
from moezoo.experts.token_table import ReadsOneRow, TokenTable
from moezoo.feed_forward import (
    Cost,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense import Activation, default_width
from moezoo.routing.deferred import statistics
from moezoo.routing.stats import slot_stats
from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.linear import Linear


class STEM(ReadsOneRow):
    """A gated linear unit with a table of token rows for its up projection.

    A row says everything that this block knows of its token, so that editing it edits that. Padding
    comes back as zeros. The ``stats`` are those of the rows: ``tokens``; ``usage``, the share of
    rows that were read; ``unevenness``, KL(reads || uniform) in nats; and of up to 4096 rows,
    ``expert_counts`` (V,), how often each was read. It has no losses.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width F; default that of a dense gated linear unit.
        vocab_size: number of rows V; the model's vocabulary must not be larger.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        sparse: give the table sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        offload: keep the table in main memory, from which the rows that are read are fetched
            ahead; wants sparse gradients.
        table_lr_multiplier: learning rate of the table, as a multiple of the run's. Its rows do not
            decay.
    """

    needs_token_ids: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        vocab_size: int = 32000,
        activation: Activation = "silu",
        sparse: bool = False,
        offload: bool = False,
        table_lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(d_model)
        self.d_ff = default_width(d_model, gated=True) if d_ff is None else check_int("d_ff", d_ff)
        self.vocab_size = check_int("vocab_size", vocab_size)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.sparse, self.offload = sparse, offload
        self.table_lr_multiplier = check_number("table_lr_multiplier", table_lr_multiplier)
        self.gate_proj = Linear(d_model, self.d_ff, bias=False)
        # What an up projection of variance 1 / D returns for a normalised token has unit variance.
        self.table = TokenTable(
            vocab_size, self.d_ff, width_name="d_ff", sparse=sparse, offload=offload
        )
        self.down_proj = Linear(self.d_ff, d_model, bias=False)
        self._reset_projections()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw rows from N(0, 1), projections as those of a dense block."""
        self.table.reset_parameters()
        self._reset_projections(num_layers)

    def _reset_projections(self, num_layers: int = 1) -> None:
        init_linear(self.gate_proj, self.d_model**-0.5)
        init_linear(self.down_proj, output_std(self.d_ff, num_layers))

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Read each token's row; by brute force, by indexing."""
        rows_T1, mask_T = self.rows_ahead(hidden, context)
        read = self.table.reference_rows if brute_force else self.table.rows
        gate_TF = activate(self.gate_proj(hidden.reshape(-1, self.d_model)), self.activation, False)
        output_TD = self.down_proj(gate_TF * read(rows_T1).squeeze(1).to(gate_TF.dtype))
        stats = statistics(self, slot_stats, rows_T1, None, self.vocab_size, mask_T)
        return FeedForwardOutput(output_TD.reshape(hidden.shape), {}, stats)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Read each token's row, without checks and statistics."""
        if token_ids is None or token_ids.shape != hidden.shape[:-1]:
            return super().infer(hidden, token_ids=token_ids, mask=mask)
        gate = activate(self.gate_proj(hidden), self.activation, False)
        row = self.table.looked_up(token_ids).to(gate.dtype)
        if mask is not None:
            row = row.masked_fill(~mask.unsqueeze(-1), 0.0)
        output: Tensor = self.down_proj(gate * row)
        return output

    def cost(self) -> Cost:
        """``4 D F`` FLOPs, a third less than the dense block, and ``2 F`` for the row."""
        projections = 2 * self.d_model * self.d_ff
        active = projections + self.d_ff
        return Cost(
            total_parameters=projections + self.vocab_size * self.d_ff,
            active_parameters=active,
            flops_per_token=2 * projections + self.table.flops_per_row(),
            bytes_per_token=active * self.down_proj.weight.element_size(),
        )


register(
    Method(
        "stem",
        STEM,
        Paper(
            "Sadhukhan et al.",
            2026,
            "STEM: Scaling Transformers with Embedding Modules",
            "2601.10639",
        ),
    )
)
