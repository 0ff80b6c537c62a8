"""All-attention: the feed-forward block as key-value pairs that every token may attend to.

One softmax runs over the context and N learned slots per head; there is no other feed-forward:
``y = W_o [softmax([q K_ctx^T, q (sqrt(d_h) K_p)^T] / sqrt(d_h)) [V_ctx; sqrt(N) V_p]]``
(Sukhbaatar et al. 2019, arXiv:1907.01470, section 4). The two roots give stored tensors of unit
use and multiply their learning rates.

Shapes: B sequences, T tokens, L keys of the context (cached ones included), D d_model, H heads,
C width of a head, N slots.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moezoo.errors import InputError, check_int
from moezoo.experts.slots import PersistentSlots, join
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    History,
    Method,
    Paper,
    flatten_tokens,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.routing.losses import masked_mean
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.linear import Linear


class PersistentMemoryAttention(FeedForward):
    """Causal self-attention with persistent slots: replaces attention and feed-forward at once.

    It is of kind ``attention``: tokens see earlier tokens. A decoder of ours that is told to use it
    lets its own attention read the slots and drops the block's feed-forward half. By itself the
    layer is as written here: the dimension before the last is the sequence, and keys and queries
    carry no positions.

    Args:
        d_model: width of the residual stream.
        num_heads: attention heads; default: of width 64 or the nearest below that divides, in a
            decoder the decoder's.
        num_slots: persistent key-value pairs N of each head; default 4 d_model, which gives them
            the parameters of the dense block.
        include_self: let a token see itself in the context (the authors' code: only earlier ones).
    """

    kind: ClassVar[str] = "attention"

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        num_slots: int | None = None,
        include_self: bool = True,
    ) -> None:
        super().__init__(d_model)
        self.num_heads = num_heads
        if num_heads is None:
            width = next(w for w in range(min(64, d_model), 0, -1) if d_model % w == 0)
            num_heads = d_model // width
        if d_model % check_int("num_heads", num_heads):
            raise InputError(
                f"num_heads: {num_heads} does not divide d_model={d_model}; give a divisor"
            )
        self.num_slots = check_int("num_slots", 4 * d_model if num_slots is None else num_slots)
        self.include_self = include_self
        self.head_width = d_model // num_heads
        self.q_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model, bias=False)
        self.o_proj = Linear(d_model, d_model, bias=False)
        self.slots = PersistentSlots(num_heads, self.num_slots, self.head_width)
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw slots from N(0, 1)/sqrt(C) and N(0, 1)/sqrt(N), projections from N(0, 1/fan_in)."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init_linear(projection, self.d_model**-0.5)
        init_linear(self.o_proj, output_std(self.d_model, num_layers))
        self.slots.reset_parameters()

    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
        history: History | None = None,
        past_key_values: Any = None,
        layer_idx: int = 0,
        key_mask: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Attend to context and slots apart, and merge by their log-sum-exps.

        Args:
            hidden: ``(..., T, d_model)``.
            token_ids: not used.
            router_input: not used.
            mask: ``(..., T)``, true at real tokens; padding is no key and comes back as zeros.
            positions: not used.
            embeddings: not used.
            history: not used.
            past_key_values: a cache with transformers' ``update(key, value, layer_idx)``; it gets
                the context's keys and values only.
            layer_idx: the layer's place in the cache.
            key_mask: ``(..., L)``, true at real tokens among all keys; with a cache it is wanted
                where ``mask`` is given.

        Returns:
            ``stats``: ``context_mass``, the share of attention that goes to the context.
        """
        q_BHTC, k_BHLC, v_BHLC, hidden_TL = self._project(
            hidden, mask, past_key_values, layer_idx, key_mask
        )
        scores = at_least_fp32(q_BHTC @ k_BHLC.transpose(-1, -2)) * self.head_width**-0.5
        # A finite value, so that a token without any context gets a weight of 0 and not NaN.
        scores = scores.masked_fill(hidden_TL, torch.finfo(scores.dtype).min)
        context = scores.softmax(-1).to(v_BHLC.dtype) @ v_BHLC
        answer, answer_lse = self.slots(q_BHTC)
        merged, mass_BHT1 = join(context, scores.logsumexp(-1, keepdim=True), answer, answer_lse)
        return self._output(hidden, merged, mass_BHT1.squeeze(-1), mask)

    def reference(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
        history: History | None = None,
        past_key_values: Any = None,
        layer_idx: int = 0,
        key_mask: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Append the slots to keys and values and take one softmax over all."""
        q_BHTC, k_BHLC, v_BHLC, hidden_TL = self._project(
            hidden, mask, past_key_values, layer_idx, key_mask
        )
        batch, length = q_BHTC.shape[0], k_BHLC.shape[2]
        slot_keys, slot_values = (pair.expand(batch, -1, -1, -1) for pair in self.slots.pairs())
        keys, values = torch.cat([k_BHLC, slot_keys], 2), torch.cat([v_BHLC, slot_values], 2)
        scores = (q_BHTC @ keys.transpose(-1, -2)) / self.head_width**0.5
        unseen = torch.nn.functional.pad(hidden_TL, (0, self.num_slots), value=False)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return self._output(hidden, weights @ values, weights[..., :length].sum(-1), mask)

    def _project(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        past_key_values: Any,
        layer_idx: int,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, all keys and values, and where a key is hidden: (B, 1, T, L)."""
        flatten_tokens(self, hidden, mask)
        if hidden.ndim < 2:
            raise InputError("hidden: give (..., sequence, d_model); attention needs a sequence")
        x_BTD = hidden.unsqueeze(0).flatten(0, -3)
        heads = (self.slots.num_heads, self.head_width)
        q, k, v = (
            projection(x_BTD).unflatten(-1, heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            if mask is not None and key_mask is None:
                raise InputError("key_mask: is missing; with a cache, say which keys are padding")
            k, v = past_key_values.update(k, v, layer_idx)
        if key_mask is None:
            key_mask = mask
        tokens, length = q.shape[2], k.shape[2]
        position_T1 = torch.arange(length - tokens, length, device=q.device).unsqueeze(-1)
        last_T1 = position_T1 if self.include_self else position_T1 - 1
        unseen = torch.arange(length, device=q.device) > last_T1
        unseen = unseen.expand(len(q), 1, tokens, length)
        if key_mask is not None:
            if key_mask.dtype != torch.bool or key_mask.numel() != len(q) * length:
                raise InputError(
                    f"key_mask: {key_mask.dtype} of shape {tuple(key_mask.shape)}; give bool for "
                    f"{length} keys of {len(q)} sequences"
                )
            unseen = unseen | ~key_mask.reshape(-1, 1, 1, length)
        return q, k, v, unseen

    def _output(
        self, hidden: Tensor, attended_BHTC: Tensor, mass_BHT: Tensor, mask: Tensor | None
    ) -> FeedForwardOutput:
        output = self.o_proj(attended_BHTC.transpose(1, 2).flatten(-2)).reshape(hidden.shape)
        flat_mask = None if mask is None else mask.reshape(-1).to(torch.bool)
        if mask is not None:
            output = output.masked_fill(~mask.to(torch.bool).unsqueeze(-1), 0.0)
        mass_T = mass_BHT.detach().mean(1).flatten()
        return FeedForwardOutput(output, {}, {"context_mass": masked_mean(mass_T, flat_mask)})

    def cost(self) -> Cost:
        """Four projections and the slots: ``8 d² + 4 N d`` FLOPs.

        The context's ``4 L d``, which no formula without L can hold, are left out.
        """
        slots, projections = 2 * self.num_slots * self.d_model, 4 * self.d_model**2
        parameters = slots + projections
        size = self.q_proj.weight.element_size()
        return Cost(parameters, parameters, 2 * parameters, parameters * size)


register(
    Method(
        "persistent_memory",
        PersistentMemoryAttention,
        Paper(
            "Sukhbaatar et al.",
            2019,
            "Augmenting Self-attention with Persistent Memory",
            "1907.01470",
        ),
    )
)
