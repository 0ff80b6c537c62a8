"""One token after the other with a model's weights, without what only training wants.

A step of ``model(...)`` builds masks, grows a cache, enters contexts and collects losses; with a
small model that takes longer than reading the weights. Here a step is the arithmetic alone, on the
same weights: on CPUs attention, dense blocks and mixtures are one C++ call each
(:mod:`moezoo_kernels.token_step`). Elsewhere the queries', keys' and values' projections are one
matrix, and layers return hidden states only (:meth:`moezoo.feed_forward.FeedForward.infer`). The
cache has its final size from the beginning.

Shapes: B sequences, S tokens of a prompt, L positions, D hidden_size, V vocab_size, C head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache as ModelCache
from transformers.cache_utils import DynamicCache

from moezoo.feed_forward import FeedForward
from moezoo.layers.dense import DenseFFN
from moezoo_kernels.token_step import Angles, Cache
from moezoo_models.decoding.added import Added, Told
from moezoo_models.decoding.attending import Attending, signed
from moezoo_models.decoding.griffin import (
    Chosen,
    dense_blocks,
    one_prompt,
    reading_prompt,
)
from moezoo_models.decoding.native_steps import (
    native_attention,
    native_feed_forward,
    native_head,
)
from moezoo_models.model.attention import Attention
from moezoo_models.model.block import DecoderLayer
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.memories import earlier_values
from moezoo_models.model.norm import RMSNorm
from moezoo_models.model.persistent import JoinedSlots
from moezoo_models.model.rotary import RotaryEmbedding

_MOST_FUSED_BYTES = 1 << 28
"""Copies of projections up to this size: in larger models three products cost no more than one."""

_CHANGING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length so far."""


class Decoder:
    """The steps of a model's decoding, for one batch of prompts.

    It is made for one call and holds the weights as they were when it was made. Use it under
    ``torch.no_grad()``, with a model for which
    :func:`moezoo_models.decoding.eligible.ineligible` returns None.

    Args:
        model: the model, in evaluation mode.
        ids: ``(B, S)`` int64, the prompts.
        mask: ``(B, S)``, nonzero at real tokens.
        new_tokens: how many tokens follow at most; the cache has room for all but the last.
        griffin: share of a dense block's neurons that the prompt keeps for what follows; None for
            all of them.

    Raises:
        InputError: the share is out of range, there is no dense block, or prompts differ.
    """

    def __init__(
        self,
        model: MoezooForCausalLM,
        ids: Tensor,
        mask: Tensor,
        new_tokens: int,
        griffin: float | None = None,
    ) -> None:
        self._model, self._griffin = model, griffin
        if griffin is not None:
            dense_blocks(model, griffin)
            one_prompt(ids, mask)
        batch, length = ids.shape
        positions = length + new_tokens - 1
        self._at, self._prompt = length, (ids, mask)
        self._prompt_places = _positions(mask)
        self._next = self._prompt_places[:, -1] + 1  # (B,)
        self._mask = self._context = None  # (B, L)
        if not bool(mask.all()):
            self._mask = torch.ones(batch, positions, dtype=torch.bool, device=ids.device)
            self._mask[:, :length] = mask.to(torch.bool)
        if model.model.looks_back():
            self._context = ids.new_empty(batch, positions)
            self._context[:, :length] = ids
        embedding = model.model.embed_tokens.weight
        self._hidden = embedding.new_empty(batch, embedding.shape[1])
        self._angles: Angles | None = None
        self._turn = cast(RotaryEmbedding, model.model.rotary_emb)
        if self._turn.rope_type not in _CHANGING_ROPE and new_tokens > 1:
            last = int(self._next.max()) + new_tokens - 1
            every = torch.arange(last, device=ids.device)[None]
            cos, sin = self._turn(embedding, every)
            self._angles = Angles(cos[0].contiguous(), signed(sin[0]), self._next)
        self._blocks = self._build(positions, new_tokens)
        self._new_tokens = new_tokens
        self._reads_embeddings = any(
            layer.reads_embeddings for _, layer in model.model.added_layers()
        )
        last_norm = cast(RMSNorm, model.model.norm)
        self._norm = norm_of(last_norm)
        self._head = native_head(model.lm_head, last_norm, self._hidden)

    def _build(self, positions: int, new_tokens: int) -> list[_Block]:
        blocks = list(self._model.model.blocks())
        attentions = [cast("Attention", block.self_attn) for block in blocks]
        projections = sum(
            part.weight.nbytes
            for attention in attentions
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        fuse = projections <= _MOST_FUSED_BYTES
        begin = int(self._next.min())
        shared = (self._hidden, self._angles, self._mask, positions, begin, new_tokens, fuse)
        return [_Block(block, *shared) for block in blocks]

    def prefill(self) -> Tensor:
        """Read the prompts by the model's own forward pass; return the next logits ``(B, V)``."""
        ids, mask = self._prompt
        cache = DynamicCache(config=self._model.config)
        reading: AbstractContextManager[Chosen] = nullcontext({})
        if self._griffin is not None:
            reading = reading_prompt(self._model, self._griffin, mask)
        with reading as chosen:
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=self._prompt_places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        for number, neurons in chosen.items():
            self._blocks[number].keep(neurons)
        for number, block in enumerate(self._blocks):
            for name, added in block.remembering():
                earlier = earlier_values(cache, f"{number}.{name}")
                added.remember(earlier, self._new_tokens - 1)
        for block in self._blocks:
            layer: Any = cache.layers.pop(0)  # and with it its memory
            block.attending.remember(layer.keys, layer.values, self._at)
        return output.logits[:, -1]

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to each sequence, ``(B,)`` int64; return the next logits ``(B, V)``."""
        at, hidden = self._at, self._hidden
        torch.index_select(self._model.model.embed_tokens.weight, 0, token_ids, out=hidden)
        rotary: tuple[Tensor, Tensor] | None = None
        told = self._tell(token_ids[:, None])
        state: Tensor | None = None  # handed from router to router, for this token alone
        for block in self._blocks:
            for memory in block.before:
                hidden += memory.answer(hidden, told)
            if block.entering is not None:
                block.entering.copy_(hidden)
            if block.attend is not None:
                block.attend(at)
            else:
                rotary = rotary or self._rotary()
                normed = block.first_norm(hidden)
                hidden.copy_(block.attending.step(hidden, normed, at, rotary, self._mask))
            if block.feed is not None:
                block.feed()
            elif block.second_norm is not None:
                normed = block.second_norm(block.before_feed)
                answer, state = block.mlp.feed(normed, told, block.read, state)
                hidden += answer
            for memory in block.behind:
                hidden += memory.answer(hidden, told)
        self._at += 1
        self._next += 1
        if self._head is not None:
            return self._head()
        head = self._model.lm_head
        return F.linear(self._norm(hidden), head.weight, head.bias)

    def reread(self, token_ids: Tensor, begin: int) -> Tensor:
        """Read tokens by the model's own forward pass, over what steps have left of them.

        Args:
            token_ids: ``(B, S)`` int64, of prompts without padding.
            begin: place of the first one, up to which the cache holds what goes before.

        Returns:
            Logits ``(B, S, V)``. The keys and values of these tokens are now those of the pass.
        """
        end = begin + token_ids.shape[1]
        earlier: dict[str, Tensor] = {}
        if self._context is not None:
            self._context[:, begin:end] = token_ids
            earlier["context_ids"] = self._context[:, :end]
        held: list[Any] = [block.attending.in_place(begin) for block in self._blocks]
        output = self._model(
            input_ids=token_ids,
            position_ids=torch.arange(begin, end, device=token_ids.device)[None],
            past_key_values=ModelCache(held),
            use_cache=True,
            **earlier,
        )
        return output.logits

    def return_to(self, place: int) -> None:
        """Go on as if fewer tokens had been read: the next one is that at a place."""
        self._next += place - self._at
        self._at = place

    def _tell(self, token_ids: Tensor) -> Told:
        """Return what layers may ask of a step's tokens, ``(B, 1)``."""
        earlier = mask = None
        if self._context is not None:
            self._context[:, self._at : self._at + 1] = token_ids
            earlier = self._context[:, : self._at + 1]
            mask = None if self._mask is None else self._mask[:, : self._at + 1]
        embedded = self._hidden[:, None].clone() if self._reads_embeddings else None
        return Told(token_ids, self._next[:, None], earlier, mask, embedded)

    def _rotary(self) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of this step's positions, ``(B, 1, C)``."""
        if self._angles is not None:
            cos, sin, places = self._angles
            return cos.index_select(0, places)[:, None], sin.index_select(0, places)[:, None]
        cos, sin = self._turn(self._hidden, self._next[:, None])
        return cos, signed(sin)


class _Block:
    """One block's parts, looked up once, and their steps by the C++ kernels where there are some.

    Attributes:
        before: the memories that are added before attention.
        behind: those that are added behind the feed-forward block.
        attend: attention's step, in place, for the place in the cache; None if ``attending`` does.
        feed: the feed-forward block's, in place; None if ``mlp`` answers.
        entering: room for the residual stream before attention, if the router reads that, or the
            whole feed-forward block does.
        before_feed: the residual stream that the norm before the feed-forward block reads.
        read: what the router reads, ``(B, D)``; None if it reads what the experts read.
    """

    def __init__(
        self,
        block: DecoderLayer,
        hidden: Tensor,
        angles: Angles | None,
        mask: Tensor | None,
        positions: int,
        begin: int,
        new_tokens: int,
        fuse: bool,
    ) -> None:
        self.mlp = Added(block.mlp)
        self._memories = [Added(cast("FeedForward", layer)) for layer in block.memories]
        self.before, self.behind = (
            [memory for memory in self._memories if memory.layer.added == place]
            for place in ("before_attention", "after_feed_forward")
        )
        early = block.is_parallel or block.router_input == "pre_attention"
        self.entering = torch.empty_like(hidden) if early else None
        beside = self.entering if block.is_parallel else None
        self.before_feed = hidden if beside is None else beside
        self.read = {"pre_attention": self.entering, "post_attention": hidden}.get(
            block.router_input
        )
        first, second = (cast("RMSNorm | None", block.norm_at(place)) for place in (0, 2))
        assert first is not None
        self.first_norm = norm_of(first)
        attention, batch = cast("Attention", block.self_attn), len(hidden)
        width, kv_heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim
        keys, values = (hidden.new_empty(batch, kv_heads, positions, width) for _ in range(2))
        cache = Cache(keys, values, mask)
        slots = block.mlp if isinstance(block.mlp, JoinedSlots) else None
        self.attend: Callable[[int], None] | None = None
        if slots is None and angles is not None:
            self.attend = native_attention(attention, first, hidden, angles, cache)
        self.attending = Attending(attention, slots, cache, fuse and self.attend is None)
        self.second_norm = self.feed = None
        if second is not None:
            self.second_norm = norm_of(second)
            self._native = partial(
                native_feed_forward,
                norm=second,
                hidden=hidden,
                read=beside,
                new_tokens=new_tokens,
            )
            self.feed = self._native(block.mlp, router_input=self.read, first_position=begin)

    def keep(self, neurons: Tensor) -> None:
        """Go on with some neurons of a dense block, ``(K,)`` int64, whose weights are copied."""
        kept = cast("DenseFFN", self.mlp.layer).take(neurons)
        self.mlp, self.feed = Added(kept), self._native(kept)

    def remembering(self) -> Iterator[tuple[str, Added]]:
        """Yield the layers that read a history, each with its name in the block."""
        named = [("mlp", self.mlp)]
        named += [(f"memories.{number}", each) for number, each in enumerate(self._memories)]
        yield from (each for each in named if each[1].layer.keeps_history)


def norm_of(norm: RMSNorm) -> Callable[[Tensor], Tensor]:
    """Return the function that a norm computes, as one operator where that rounds no otherwise."""
    weight, shape, eps = norm.weight, norm.weight.shape, norm.eps
    if weight.dtype == torch.float64:  # its statistics are taken in fp32
        return norm
    if weight.dtype == torch.float32:
        return lambda x: F.rms_norm(x, shape, weight, eps) if x.dtype == weight.dtype else norm(x)
    return lambda x: weight * F.rms_norm(x, shape, None, eps)  # rounded before the weight


def _positions(mask: Tensor) -> Tensor:
    """Count real tokens from 0, as transformers does; padding stands at 0."""
    places = mask.long().cumsum(-1) - 1
    return places.masked_fill(mask == 0, 0)
