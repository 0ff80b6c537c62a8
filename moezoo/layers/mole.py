"""MoLE: experts that read the token's embedding only, and so become rows of a table.

``y = Shared(h) + Σ_e softmax(W_r h)_e E_e(RMSNorm(v[x]))`` with x the token id, h the hidden state
and v the embeddings (Jie et al. 2025, arXiv:2503.15798, section 3). All experts answer; what they
answer does not depend on the context, so that after training ``R[x, e] = E_e(RMSNorm(v[x]))`` takes
their place: E rows are read per token, and nothing of the experts is computed any more.

Shapes: T tokens, D d_model, E experts, V size of the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_flag, check_int, check_number
from moezoo.experts import MLPExperts
from moezoo.experts.token_table import (
    ReadsTokenRows,
    TokenTable,
    all_numbers,
    row_group,
    rows_of_tokens,
)
from moezoo.experts.values import pooled
from moezoo.feed_forward import (
    Cost,
    FeedForwardOutput,
    Method,
    Paper,
    ParameterGroup,
    TokenContext,
    register,
    set_apart,
)
from moezoo.init import output_std
from moezoo.layers.dense import Activation, DenseFFN, default_width
from moezoo.routing.deferred import statistics
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats
from moezoo.routing.wide_linear import wide_linear
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.dtypes import at_least_fp32

_FOLD_TOKENS = 4096


class MoLE(ReadsTokenRows):
    """A dense block beside experts of the token alone, which :meth:`fold` makes a table of.

    The paper's experts read the model's input embeddings. Here they read embeddings of their own,
    which layers of one ``embedding_pool`` share; folded, neither is there.

    Padding comes back as zeros. Its ``stats``: ``tokens``; ``usage``, the share of experts with
    weight, all of them; ``unevenness``, the divergence of the experts' weights from uniform, in
    nats; ``expert_counts`` (E,). It has no losses.

    Args:
        d_model: width of the residual stream.
        num_experts: number of experts E.
        d_expert: hidden width of one expert; default that of the dense block.
        d_ff: hidden width of the shared block; default that of the dense block.
        vocab_size: number of tokens V; the model's vocabulary must not be larger.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: gated linear units instead of MLPs.
        bias: whether the projections of experts and of the shared block have biases.
        embedding_pool: name of embeddings that the layers which name it share; see
            :func:`moezoo.shared_values`. By default a layer has its own.
        sparse: give embeddings or, folded, rows sparse gradients, so that a step moves only what
            was read; not under torch.compile.
        offload: keep them in main memory, from which what is read is fetched ahead; wants sparse
            gradients.
        table_lr_multiplier: learning rate of embeddings or rows, as a multiple of the run's. They
            do not decay.
        folded: hold the table of answers in place of embeddings and experts.
    """

    needs_token_ids: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 4,
        d_expert: int | None = None,
        d_ff: int | None = None,
        vocab_size: int = 32000,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        embedding_pool: str | None = None,
        sparse: bool = False,
        offload: bool = False,
        table_lr_multiplier: float = 1.0,
        folded: bool = False,
    ) -> None:
        super().__init__(d_model)
        usual = default_width(d_model, gated)
        self.num_experts = check_int("num_experts", num_experts)
        self.d_expert = usual if d_expert is None else check_int("d_expert", d_expert)
        self.d_ff = usual if d_ff is None else check_int("d_ff", d_ff)
        self.vocab_size = check_int("vocab_size", vocab_size)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated, self.bias = gated, bias
        if embedding_pool is not None and not (isinstance(embedding_pool, str) and embedding_pool):
            raise InputError(
                f"embedding_pool: {embedding_pool!r} is not a name; give a word or null"
            )
        self.embedding_pool = embedding_pool
        self.sparse, self.offload = sparse, offload
        self.table_lr_multiplier = check_number("table_lr_multiplier", table_lr_multiplier)
        self.folded = check_flag("folded", folded)
        self.shared = DenseFFN(d_model, self.d_ff, activation=activation, gated=gated, bias=bias)
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.owns_embedding = not folded
        kind: dict[str, Any] = {"sparse": sparse, "offload": offload}
        if folded:
            rows = vocab_size * num_experts
            self.table = TokenTable(rows, d_model, width_name="d_model", **kind)
        else:
            self.norm = nn.RMSNorm(d_model, eps=1e-6)
            self.experts = MLPExperts(
                d_model, self.d_expert, num_experts, activation=activation, gated=gated, bias=bias
            )
            kind |= {"num_slots": vocab_size, "v_dim": d_model}
            make = partial(TokenTable, width_name="d_model", std=d_model**-0.5, **kind)
            table, self.owns_embedding = pooled("embedding_pool", embedding_pool, make, kind)
            if self.owns_embedding:
                self.embedding = table
            else:
                # Inside a tuple a module is not registered: it is its owner's to hold and save.
                self._shared_embedding = (table,)
        self._reset_own()

    @property
    def embeddings(self) -> TokenTable:
        """What the experts read, own or shared; not in a folded layer."""
        return self.embedding if self.owns_embedding else self._shared_embedding[0]

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw everything as dense blocks and embeddings are; shared embeddings are their owner's.

        The embeddings' size does not count: they are normalised.
        """
        self.shared.reset_parameters(num_layers)
        if not self.folded and self.owns_embedding:
            self.embedding.reset_parameters()
        self._reset_own(num_layers)

    def _reset_own(self, num_layers: int = 1) -> None:
        nn.init.normal_(self.gate.weight, std=self.d_model**-0.5)
        if self.folded:
            nn.init.normal_(self.table.weight, std=output_std(1, num_layers))
        else:
            self.norm.reset_parameters()
            self.experts.reset_parameters(num_layers)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Run the shared block and all experts, or read their answers."""
        rows_TK, mask_T = self.rows_ahead(hidden, context)
        x_TD = hidden.reshape(-1, self.d_model)
        weights_TE = self.weigh(x_TD)
        experts_TE = self._experts_of(rows_TK[:, :1])
        if self.folded:
            answers = self.table.reference if brute_force else self.table
            if brute_force:
                weights_TE = weights_TE.masked_fill(rows_TK < 0, 0.0)
                rows_TK = rows_TK.clamp(min=0)
            routed_TD = answers(rows_TK, weights_TE, None)
        else:
            read = self.embeddings.reference_rows if brute_force else self.embeddings.rows
            e_TD = self.norm(read(rows_TK).squeeze(1)).to(x_TD.dtype)
            run = self.experts.reference if brute_force else self.experts
            bound = () if brute_force else (experts_TE.numel(),)
            routed_TD = run(e_TD, experts_TE, weights_TE, *bound)
        shared = self.shared.reference if brute_force else self.shared
        shared_TD = shared(x_TD).hidden
        output_TD = shared_TD + routed_TD.to(shared_TD.dtype)
        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        stats = statistics(self, slot_stats, experts_TE, weights_TE, self.num_experts, mask_T)
        return FeedForwardOutput(output_TD.reshape(hidden.shape), {}, stats)

    def rows_of(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Return the rows that each token reads, ``(T, 1)`` or, folded, ``(T, E)``, and the mask.

        Padding has the row -1.
        """
        rows_T1, mask_T = rows_of_tokens(hidden, context, self.vocab_size, "MoLE")
        if not self.folded:
            return rows_T1, mask_T
        every_E = torch.arange(self.num_experts, device=rows_T1.device)
        slots_TE = rows_T1 * self.num_experts + every_E
        return slots_TE.masked_fill(rows_T1 < 0, -1), mask_T

    def token_tables(self) -> list[TokenTable]:
        """Return the table of embeddings or, folded, of answers."""
        return [self.table if self.folded else self.embeddings]

    def weigh(self, x_TD: Tensor) -> Tensor:
        """Return the weights of all experts, ``(T, E)``, in fp32 at least."""
        return wide_linear(x_TD, self.gate.weight).softmax(dim=-1)

    def _experts_of(self, rows_T1: Tensor) -> Tensor:
        """Return all experts for each token, ``(T, E)``; -1 at padding."""
        every_E = torch.arange(self.num_experts, device=rows_T1.device)
        return every_E.expand(len(rows_T1), -1).masked_fill(rows_T1 < 0, -1)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up the weights of the experts."""
        rows_T1, _ = rows_of_tokens(hidden, context, self.vocab_size, "MoLE")
        weights_TE = self.weigh(hidden.reshape(-1, self.d_model))
        return slot_load(self._experts_of(rows_T1), weights_TE, self.num_experts)

    @torch.no_grad()
    def fold(self) -> MoLE:
        """Return the folded layer, which computes the same without experts.

        Raises:
            InputError: the layer is folded already, or its experts are shared with other ranks.
        """
        if self.folded:
            raise InputError("folded: the layer is folded already; leave it as it is")
        if self.experts.mesh is not None or self.embeddings.mesh is not None:
            raise InputError("fold: the layer is in parts; load it on one process and fold it")
        weight, device = self.embeddings.weight, self.gate.weight.device
        arguments = {**self.config()["init_args"], "folded": True}
        other = MoLE(**arguments).to(device=device, dtype=weight.dtype).train(self.training)
        other.shared.load_state_dict(self.shared.state_dict())
        other.gate.load_state_dict(self.gate.state_dict())
        answers_VED = other.table.weight.view(self.vocab_size, self.num_experts, self.d_model)
        for tokens in torch.arange(self.vocab_size, device=weight.device).split(_FOLD_TOKENS):
            e_ND = self.norm(weight[tokens].to(device))
            ones_N1 = torch.ones(len(tokens), 1, dtype=at_least_fp32(e_ND).dtype).to(device)
            for expert in range(self.num_experts):
                which_N1 = torch.full((len(tokens), 1), expert, device=device)
                answers_ND = self.experts(e_ND, which_N1, ones_N1, len(tokens))
                answers_VED[tokens, expert] = answers_ND.to(answers_VED.device)
        return other

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put embeddings or rows apart: a learning rate of their own, no decay, perhaps sparse."""
        (table,) = self.token_tables()
        owned = row_group(table, self.table_lr_multiplier) if self._owns_rows() else []
        return set_apart(super().parameter_groups(), owned)

    def _owns_rows(self) -> bool:
        return self.folded or self.owns_embedding

    def cost(self) -> Cost:
        """FLOPs of the shared block, ``2 D E`` of the weights, and all experts', or ``2 D E``.

        The former is what training takes; folded, a token's E rows count as a product each.
        """
        total = all_numbers(self)
        rows = self.vocab_size * self.d_model if self._owns_rows() else 0
        if self.folded:
            rows, read = rows * self.num_experts, self.num_experts
            computed = 0
        else:
            read, computed = 1, self.num_experts * self.experts.flops_per_assignment()
        active = total - rows + read * self.d_model
        flops = self.shared.cost().flops_per_token + 2 * self.gate.weight.numel()
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=flops + computed + 2 * read * self.d_model,
            bytes_per_token=active * self.gate.weight.element_size(),
        )


register(
    Method(
        "mole",
        MoLE,
        Paper("Jie et al.", 2025, "Mixture of Lookup Experts", "2503.15798"),
        {"embedding_pool": "embeddings"},
    )
)
