"""Memory+: product-key memory with a gate on what is read, and values that layers share.

``y = (m(x) * silu(x W_1)) W_2`` with ``m`` the product-key lookup (Berges et al. 2024, *Memory
Layers at Scale*, arXiv:2412.09764, section 3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import check_int
from moezoo.experts.memory import KeyValueMemory, default_num_keys
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    ParameterGroup,
    flatten_tokens,
    register,
    set_apart,
)
from moezoo.init import init_linear
from moezoo.routing.product_key import QueryNorm
from moezoo.routing.stats import SlotLoad


class MemoryPlus(FeedForward):
    """Product-key memory with a silu gate, without batch norm.

    The paper puts three of them into a model, evenly spaced, all reading one table: name the
    same ``value_pool`` in each. Keys, queries, ``W_1`` and ``W_2`` are each layer's own.

    Args:
        d_model: width of the residual stream.
        num_keys: half-keys n per codebook, for n² slots; default d_model / 2, no fewer than
            top_k and no more than 1024, the paper's number.
        num_heads: queries per token, each with codebooks of its own.
        top_k: slots that each head reads.
        d_key: width of a query; default the even number nearest above d_model / 2.
        v_dim: width of a value; default d_model.
        query_norm: none, qk (queries and keys to unit length, for large memories in small
            models), layer or batch.
        query_bias: whether the query's linear map has a bias.
        value_pool: name of a value table that is shared by the layers that name it; see
            :func:`moezoo.shared_values`. By default a layer has its own.
        sparse: give the values sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        value_lr_multiplier: learning rate of the values, as a multiple of the run's (the authors
            set it to 1e-3). It follows no schedule, and they do not decay.
        clip_values_apart: clip the gradient of the values by a norm of its own, and the rest of the
            model by the norm of the rest, as the authors' trainer does.
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_keys: int | None = None,
        num_heads: int = 4,
        top_k: int = 32,
        d_key: int | None = None,
        v_dim: int | None = None,
        query_norm: QueryNorm = "none",
        query_bias: bool = False,
        value_pool: str | None = None,
        sparse: bool = False,
        value_lr_multiplier: float = 1.0,
        clip_values_apart: bool = True,
    ) -> None:
        super().__init__(d_model)
        if num_keys is None:
            num_keys = default_num_keys(d_model, top_k, largest=1024)
        self.num_keys = check_int("num_keys", num_keys)
        self.num_heads = check_int("num_heads", num_heads)
        self.top_k = check_int("top_k", top_k)
        self.d_key = 2 * -(-d_model // 4) if d_key is None else check_int("d_key", d_key)
        self.v_dim = d_model if v_dim is None else check_int("v_dim", v_dim)
        self.query_norm = query_norm
        self.query_bias = query_bias
        self.value_pool = value_pool
        self.sparse = sparse
        self.value_lr_multiplier = value_lr_multiplier
        self.clip_values_apart = clip_values_apart
        self.memory = KeyValueMemory(
            d_model,
            num_keys=self.num_keys,
            num_heads=num_heads,
            top_k=top_k,
            d_key=self.d_key,
            v_dim=self.v_dim,
            query_norm=query_norm,
            query_bias=query_bias,
            init="berges",
            value_pool=value_pool,
            sparse=sparse,
            value_lr_multiplier=value_lr_multiplier,
            clip_values_apart=clip_values_apart,
        )
        self.gate_proj = nn.Linear(d_model, self.v_dim, bias=False)
        self.out_proj = nn.Linear(self.v_dim, d_model, bias=False)
        self._reset_projections()

    @property
    def num_experts(self) -> int:
        """Number of slots, n²."""
        return self.memory.keys.num_slots

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise as the authors' code does, at any depth; a shared table is its owner's."""
        self.memory.reset_parameters()
        self._reset_projections()

    def _reset_projections(self) -> None:
        for projection in (self.gate_proj, self.out_proj):
            init_linear(projection, self.d_model**-0.5)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Read each token's slots, gate what was read, and project it.

        Returns:
            ``stats`` as those of :class:`moezoo.ProductKeyMemory`.
        """
        return self._compute(hidden, router_input, mask, brute_force=False)

    def reference(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Compare with all n² keys and multiply a dense matrix of weights with all values."""
        return self._compute(hidden, router_input, mask, brute_force=True)

    def _compute(
        self, hidden: Tensor, router_input: Tensor | None, mask: Tensor | None, brute_force: bool
    ) -> FeedForwardOutput:
        tokens, flat_mask = flatten_tokens(self, hidden, mask)
        asked = tokens if router_input is None else flatten_tokens(self, router_input, None)[0]
        read, stats = self.memory(asked, flat_mask, brute_force)
        output = self.out_proj(read * F.silu(self.gate_proj(tokens)))
        return FeedForwardOutput(output.reshape(hidden.shape), {}, stats)

    @torch.no_grad()
    def slot_load(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> SlotLoad:
        """Sum up how often each slot is read, and its weight; ``shape`` is the keys' grid."""
        asked = hidden if router_input is None else router_input
        return self.memory.slot_load(*flatten_tokens(self, asked, mask))

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put the values apart: constant learning rate, no decay, perhaps sparse."""
        return set_apart(super().parameter_groups(), self.memory.parameter_groups())

    def cost(self) -> Cost:
        """``2 D H C + 2 H n C + 2 H K V + 4 D V`` FLOPs; sums of values count as a product."""
        projections = self.gate_proj.weight.numel() + self.out_proj.weight.numel()
        active = self.memory.active_parameters() + projections
        return Cost(
            total_parameters=sum(p.numel() for p in self.parameters()),
            active_parameters=active,
            flops_per_token=self.memory.flops_per_token() + 2 * projections,
            bytes_per_token=active * self.memory.keys.keys.element_size(),
        )


register(
    Method(
        "memory_plus",
        MemoryPlus,
        Paper("Berges et al.", 2024, "Memory Layers at Scale", "2412.09764"),
        {"value_pool": "memory"},
    )
)
