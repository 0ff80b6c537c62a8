"""Per-layer embeddings: rows of the token scale a narrow layer behind the feed-forward block.

``y = RMSNorm(W_2 (act(W_1 h) * p))`` with ``p = (sqrt(P) U[x] + RMSNorm(W_e e / sqrt(D))) /
sqrt(2)``, x the token id, e its embedding as it enters the model and h the residual stream behind
the feed-forward block. It is a part of Gemma 3n (Gemma Team, Google DeepMind 2025) and of the small
models of Gemma 4; there is no paper of it, and the formula is that of their code in transformers.

Shapes: T tokens, D d_model, P width of a row, V size of the vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from moezoo.errors import check_choice, check_int, check_number
from moezoo.experts.token_table import (
    ReadsOneRow,
    TokenTable,
    all_numbers,
)
from moezoo.feed_forward import (
    Cost,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense import Activation
from moezoo.routing.deferred import statistics
from moezoo.routing.short_convolution import normalised
from moezoo.routing.stats import slot_stats
from moezoo.token_context import Place
from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.linear import Linear


class PerLayerEmbedding(ReadsOneRow):
    """A narrow gated layer whose linear factor is a token's own row and its embedding.

    As one of a model's ``memory`` it is added behind the feed-forward block. Without ``embeddings``
    it reads ``hidden`` in their place. Padding comes back as zeros. The ``stats`` are those of the
    rows: ``tokens``; ``usage``, the share of rows that were read; ``unevenness``, KL(reads ||
    uniform) in nats; and of up to 4096 rows, ``expert_counts`` (V,). It has no losses.

    Args:
        d_model: width of the residual stream.
        d_row: width P of a row; default an eighth of ``d_model``, as in Gemma 3n.
        vocab_size: number of rows V; the model's vocabulary must not be larger.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        norm_eps: added to mean squares in both norms.
        sparse: give the table sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        offload: keep the table in main memory, from which the rows that are read are fetched
            ahead; wants sparse gradients.
        table_lr_multiplier: learning rate of the table, as a multiple of the run's. Its rows do not
            decay.
    """

    needs_token_ids: ClassVar[bool] = True
    reads_embeddings: ClassVar[bool] = True
    added: ClassVar[Place | None] = "after_feed_forward"

    def __init__(
        self,
        d_model: int,
        *,
        d_row: int | None = None,
        vocab_size: int = 32000,
        activation: Activation = "gelu_tanh",
        norm_eps: float = 1e-6,
        sparse: bool = False,
        offload: bool = False,
        table_lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(d_model)
        self.d_row = max(1, d_model // 8) if d_row is None else check_int("d_row", d_row)
        self.vocab_size = check_int("vocab_size", vocab_size)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.norm_eps = check_number("norm_eps", norm_eps, maximum=1.0)
        self.sparse, self.offload = sparse, offload
        self.table_lr_multiplier = check_number("table_lr_multiplier", table_lr_multiplier)
        self.gate_proj = Linear(d_model, self.d_row, bias=False)
        # Rows are read times sqrt(P): as large then as what they are added to.
        kind: dict[str, Any] = {"std": self.d_row**-0.5, "sparse": sparse, "offload": offload}
        self.table = TokenTable(vocab_size, self.d_row, width_name="d_row", **kind)
        self.embedding_proj = Linear(d_model, self.d_row, bias=False)
        self.embedding_norm = nn.RMSNorm(self.d_row, eps=norm_eps)
        self.out_proj = Linear(self.d_row, d_model, bias=False)
        self.out_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self._reset_rest()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw rows from N(0, 1 / P), projections as those of a dense block.

        The last norm's weight begins at the size of what a branch of so deep a model adds.
        """
        self.table.reset_parameters()
        self._reset_rest(num_layers)

    def _reset_rest(self, num_layers: int = 1) -> None:
        for linear in (self.gate_proj, self.out_proj):
            init_linear(linear, linear.in_features**-0.5)
        init_linear(self.embedding_proj, 1.0)  # it is read over sqrt(D)
        self.embedding_norm.reset_parameters()
        nn.init.constant_(self.out_norm.weight, output_std(1, num_layers))

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Scale the narrow layer by each token's row; by brute force, read by indexing."""
        rows_T1, mask_T = self.rows_ahead(hidden, context)
        read = self.table.reference_rows if brute_force else self.table.rows
        output = self._answer(read(rows_T1), hidden, context.embeddings, mask_T)
        stats = statistics(self, slot_stats, rows_T1, None, self.vocab_size, mask_T)
        return FeedForwardOutput(output, {}, stats)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Scale the narrow layer by each token's row, without checks and statistics."""
        if token_ids is None or token_ids.shape != hidden.shape[:-1]:
            return super().infer(hidden, token_ids=token_ids, mask=mask, embeddings=embeddings)
        mask_T = None if mask is None else mask.reshape(-1)
        row_T1P = self.table.looked_up(token_ids.reshape(-1, 1))
        return self._answer(row_T1P, hidden, embeddings, mask_T)

    def _answer(
        self, row_T1P: Tensor, hidden: Tensor, embeddings: Tensor | None, mask_T: Tensor | None
    ) -> Tensor:
        """Return the output, ``(..., D)``, of each token's row."""
        x_TD = hidden.reshape(-1, self.d_model)
        e_TD = x_TD
        if embeddings is not None:
            e_TD = embeddings.reshape(-1, self.d_model).to(x_TD.dtype)
        gate_TP = activate(self.gate_proj(x_TD), self.activation, False)
        projected_TP = self.embedding_proj(e_TD) * self.d_model**-0.5
        row_TP = row_T1P.squeeze(1) * self.d_row**0.5
        normed_TP = normalised(self.embedding_norm, projected_TP)
        factor_TP = (normed_TP + row_TP.to(normed_TP.dtype)) * 0.5**0.5
        narrow_TD = self.out_proj(gate_TP * factor_TP.to(gate_TP.dtype))
        output_TD = normalised(self.out_norm, narrow_TD).to(narrow_TD.dtype)
        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        return output_TD.reshape(hidden.shape)

    def cost(self) -> Cost:
        """``6 D P`` FLOPs of the projections, and ``2 P`` for the row."""
        total = all_numbers(self)
        active = total - (self.vocab_size - 1) * self.d_row
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=6 * self.d_model * self.d_row + 2 * self.d_row,
            bytes_per_token=active * self.out_proj.weight.element_size(),
        )


register(
    Method(
        "per_layer_embedding",
        PerLayerEmbedding,
        Paper("Gemma Team, Google DeepMind", 2025, "Gemma 3n: per-layer embeddings, in code", ""),
    )
)
