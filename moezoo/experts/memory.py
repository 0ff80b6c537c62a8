"""A key-value memory: queries, product keys, and the values of the best keys.

``m(x) = Σ_h Σ_{i in top-k} softmax(q_h(x)·K_i) V_i`` (Lample et al. 2019, arXiv:1907.05242,
eq. 2-4 and section 3.3): each head softmaxes over the k keys it retained, the values are common to
all heads, and the heads are summed.

Shapes: T tokens, D d_model, H heads, C d_key, K slots per head, N = n² slots, V v_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_int, check_number
from moezoo.experts.values import ValueTable, value_table
from moezoo.feed_forward import ParameterGroup
from moezoo.routing.deferred import statistics
from moezoo.routing.product_key import KeyInit, ProductKeys
from moezoo.routing.query_network import QueryNetwork, QueryNorm
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats, usage, used_weight


class KeyValueMemory(nn.Module):
    """Product-key lookup into a table of values.

    Args:
        d_model: width D of what queries are made from.
        num_keys: half-keys n per codebook.
        num_heads: heads H.
        top_k: slots per head K.
        d_key: width of a whole key C.
        v_dim: width of a value V.
        query_norm: how queries are normalised; ``qk`` normalises the keys as well.
        query_bias: whether the query network's linear map has a bias.
        init: distribution of keys and query network.
        value_pool: name of a table shared with other layers of the model.
        sparse: sparse gradients for the values.
        value_lr_multiplier: learning rate of the values, as a multiple of the run's.
        clip_values_apart: whether the values' gradient is clipped by its own norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_keys: int,
        num_heads: int,
        top_k: int,
        d_key: int,
        v_dim: int,
        query_norm: QueryNorm,
        query_bias: bool,
        init: KeyInit,
        value_pool: str | None,
        sparse: bool,
        value_lr_multiplier: float,
        clip_values_apart: bool,
    ) -> None:
        super().__init__()
        check_number("value_lr_multiplier", value_lr_multiplier)
        if value_pool is not None and not (isinstance(value_pool, str) and value_pool):
            raise InputError(f"value_pool: {value_pool!r} is not a name; give a word or null")
        self.v_dim = check_int("v_dim", v_dim)
        self.value_lr_multiplier = value_lr_multiplier
        self.clip_values_apart = clip_values_apart
        self.keys = ProductKeys(
            d_key,
            num_keys,
            num_heads=num_heads,
            top_k=top_k,
            init=init,
            normalize=query_norm == "qk",
        )
        self.query = QueryNetwork(
            d_model, num_heads, d_key, norm=query_norm, bias=query_bias, init=init
        )
        table, self.owns_values = value_table(self.keys.num_slots, v_dim, sparse, value_pool)
        if self.owns_values:
            self.values = table
        else:
            # Inside a tuple a module is not registered: it is its owner's to hold, save and move.
            self._shared_values = (table,)

    @property
    def table(self) -> ValueTable:
        """The values, own or shared."""
        return self.values if self.owns_values else self._shared_values[0]

    def reset_parameters(self) -> None:
        """Draw keys and queries anew, and the values if they are this memory's own."""
        self.keys.reset_parameters()
        self.query.reset_parameters()
        if self.owns_values:
            self.values.reset_parameters()

    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None, brute_force: bool = False
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Read the memory: ``(T, V)``, zero at padding, and statistics."""
        batch: dict[str, Tensor] = {}
        slots_THK, weights_THK = self._look_up(x_TD, mask_T, brute_force, batch)
        read = self.table.reference if brute_force else self.table
        y_TV = read(slots_THK.flatten(1), weights_THK.flatten(1), mask_T)
        stats = statistics(self, self._stats, slots_THK, weights_THK, mask_T)
        if batch:
            stats = {**stats, **batch}
        return y_TV.to(_output_dtype(x_TD)), stats

    def _look_up(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None,
        brute_force: bool,
        batch: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if brute_force:
            scores_THK, slots_THK = self.keys.reference(self.query.reference(x_TD, mask_T))
        else:
            scores_THK, slots_THK = self.keys(self.query(x_TD, mask_T, batch))
        return slots_THK, scores_THK.softmax(dim=-1)

    @torch.no_grad()
    def slot_load(self, x_TD: Tensor, mask_T: Tensor | None) -> SlotLoad:
        """Sum up how often, and with what weight, each value would be read."""
        slots_THK, weights_THK = self._look_up(x_TD, mask_T, brute_force=False)
        grid = (self.keys.num_keys, self.keys.num_keys)
        return slot_load(
            slots_THK,
            weights_THK,
            self.keys.num_slots,
            mask_T,
            kind="values",
            shape=grid,
            ranked=True,
        )

    def _stats(
        self, slots_THK: Tensor, weights_THK: Tensor, mask_T: Tensor | None
    ) -> dict[str, Tensor]:
        num_slots = self.keys.num_slots
        stats = slot_stats(slots_THK, weights_THK, num_slots, mask_T)
        # Heads that agree on their best slot can hide behind the others: tell both.
        stats["top1_usage"] = usage(
            used_weight(slots_THK[..., :1], None, num_slots, mask_T), num_slots
        )
        return stats

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the group of the values, if they are this memory's own and are trained."""
        if not (self.owns_values and self.values.weight.requires_grad):
            return []
        return [
            ParameterGroup(
                "values",
                [self.values.weight],
                lr_multiplier=self.value_lr_multiplier,
                weight_decay=False,
                schedule=False,
                sparse=self.values.sparse,
                clip_group="values" if self.clip_values_apart else "main",
            )
        ]

    def rows_per_token(self) -> int:
        """Return the number of values that a token reads, H K."""
        return self.keys.num_heads * self.keys.top_k

    def active_parameters(self) -> int:
        """Count query network, keys and the values that one token reads."""
        trained = [*self.query.parameters(), *self.keys.parameters()]
        return sum(p.numel() for p in trained) + self.rows_per_token() * self.v_dim

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token: ``2 D H C + 2 H n C + 2 H K V``."""
        lookup = self.query.flops_per_token() + self.keys.flops_per_token()
        return lookup + self.rows_per_token() * self.table.flops_per_row()


def default_num_keys(d_model: int, top_k: int, largest: int) -> int:
    """Return half-keys per codebook: d_model / 2, no fewer than top_k and no more than largest."""
    return max(check_int("top_k", top_k), min(d_model // 2, largest))


def _output_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
