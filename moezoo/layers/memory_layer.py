"""What product-key memory and Memory+ share: options, lookup and accounting of the slots."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moezoo.errors import check_int
from moezoo.experts.memory import KeyValueMemory, default_num_keys
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    ParameterGroup,
    TokenContext,
    set_apart,
)
from moezoo.routing.product_key import KeyInit
from moezoo.routing.query_network import QueryNorm
from moezoo.routing.stats import SlotLoad


class MemoryLayer(FeedForward):
    """A layer around one :class:`moezoo.experts.memory.KeyValueMemory`.

    A subclass sets its paper's defaults, makes its projections, and returns in ``project`` what
    becomes of the values that were read. Its docstring describes the arguments.
    """

    reads_router_input: ClassVar[bool] = True
    most_keys: ClassVar[int]  # of a codebook, by default
    d_key_divisor: ClassVar[int]  # of d_model, by default
    key_init: ClassVar[KeyInit]

    def __init__(
        self,
        d_model: int,
        *,
        num_keys: int | None,
        num_heads: int,
        top_k: int,
        d_key: int | None,
        v_dim: int | None,
        query_norm: QueryNorm,
        query_bias: bool,
        value_pool: str | None,
        sparse: bool,
        value_lr_multiplier: float,
        clip_values_apart: bool,
    ) -> None:
        super().__init__(d_model)
        if num_keys is None:
            num_keys = default_num_keys(d_model, top_k, largest=self.most_keys)
        if d_key is None:
            d_key = 2 * -(-d_model // (2 * self.d_key_divisor))
        self.num_keys = check_int("num_keys", num_keys)
        self.num_heads = check_int("num_heads", num_heads)
        self.top_k = check_int("top_k", top_k)
        self.d_key = check_int("d_key", d_key)
        self.v_dim = d_model if v_dim is None else check_int("v_dim", v_dim)
        self.query_norm = query_norm
        self.query_bias = query_bias
        self.value_pool = value_pool
        self.sparse = sparse
        self.value_lr_multiplier = value_lr_multiplier
        self.clip_values_apart = clip_values_apart
        self.memory = KeyValueMemory(
            d_model,
            num_keys=num_keys,
            num_heads=num_heads,
            top_k=top_k,
            d_key=d_key,
            v_dim=self.v_dim,
            query_norm=query_norm,
            query_bias=query_bias,
            init=self.key_init,
            value_pool=value_pool,
            sparse=sparse,
            value_lr_multiplier=value_lr_multiplier,
            clip_values_apart=clip_values_apart,
        )

    @property
    def num_experts(self) -> int:
        """Number of slots, n²."""
        return self.memory.keys.num_slots

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Read each token's slots; by brute force, score all n² keys and weight all values."""
        x_TD, router_TD, mask_T = self._flatten(hidden, context)
        read_TV, stats = self.memory(router_TD, mask_T, brute_force)
        output = self.project(read_TV, x_TD)
        return FeedForwardOutput(output.reshape(hidden.shape), {}, stats)

    def project(self, read_TV: Tensor, x_TD: Tensor | None = None) -> Tensor:
        """Return the output ``(T, D)`` for what was read; linear in it.

        Args:
            read_TV: sums of values ``(T, V)``, V the width of a value.
            x_TD: the tokens that read them, ``(T, D)``; None leaves out a gate of theirs.
        """
        raise NotImplementedError

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up how often each slot is read, and its weight; ``shape`` is the keys' grid."""
        _, router_TD, mask_T = self._flatten(hidden, context)
        return self.memory.slot_load(router_TD, mask_T)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put the values apart: constant learning rate, no decay, perhaps sparse."""
        return set_apart(super().parameter_groups(), self.memory.parameter_groups())

    def cost(self) -> Cost:
        """``2 D H C + 2 H n C + 2 H K V`` FLOPs, and ``2 D V`` of each projection.

        A weighted sum of values counts as a product.
        """
        total = sum(p.numel() for p in self.parameters())
        projections = total - sum(p.numel() for p in self.memory.parameters())
        active = self.memory.active_parameters() + projections
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=self.memory.flops_per_token() + 2 * projections,
            bytes_per_token=active * self.memory.keys.keys.element_size(),
        )
