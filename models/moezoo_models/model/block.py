"""One block of the decoder, and the choice of its feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from moezoo.errors import InputError
from moezoo.experts.token_table import ReadsTokenRows
from moezoo.feed_forward import FeedForward, registered
from moezoo.routing.losses import masked_mean
from moezoo.token_context import Place
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention import Attention, SelfAttention
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.joint_attention import check_joint_backend
from moezoo_models.model.latent import LatentAttention
from moezoo_models.model.memories import build_memories, check_vocabulary, history_in
from moezoo_models.model.mixture_attention import MixtureAttention
from moezoo_models.model.norm import NORMS, Norm
from moezoo_models.model.persistent import JoinedSlots, build_slots

_PLACES: dict[str, tuple[str | None, ...]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Names of the norms before and after attention, before and after the feed-forward block."""

_BESIDE = {
    "one_norm": ("input_layernorm", None, "input_layernorm", None),
    "two_norms": ("input_layernorm", None, "post_attention_layernorm", None),
}
"""The same where both read what enters the block; GPT-NeoX calls the second norm so, too."""


BLOCKS_AHEAD = 4
"""Rows of offloaded tables are fetched so many blocks before they are read."""

Noted = tuple[dict[str, Tensor], Mapping[str, Tensor]]
"""Auxiliary losses and statistics of a layer."""


class TokensSeen(NamedTuple):
    """The tokens of a call of the decoder, as its blocks' layers may ask for them.

    Attributes:
        embeddings: ``(batch, sequence, hidden_size)``, as they enter the first block.
        ids: ``(batch, sequence)``; None if only embeddings are known.
        mask: true at real tokens; None if all are.
        all_ids: ``(batch, past + sequence)``, all tokens so far, for layers that look back.
        all_mask: of these.
    """

    embeddings: Tensor
    ids: Tensor | None
    mask: Tensor | None
    all_ids: Tensor | None
    all_mask: Tensor | None


class DecoderLayer(GradientCheckpointingLayer):
    """One block: attention, then a feed-forward block of the zoo, with norms before them or after.

    In parallel blocks the feed-forward block reads what attention reads, ``y = x + Attn(N(x)) +
    FFN(N'(x))``, with one norm for both (GPT-J, Cohere) or one for each (GPT-NeoX).

    A layer of kind ``attention`` leaves attention alone in the block: no more norms, no second
    sum.

    Attributes:
        is_parallel: whether both read what enters the block.
        router_input: what the router of the feed-forward block reads.
        memories: layers that are added to the residual stream beside it.
        memory_rules: number of the rule of each.
    """

    def __init__(self, config: MoezooConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self._num_layers = layer_idx, config.num_hidden_layers
        latent = config.latent_attention is not None
        kind: type[Attention | LatentAttention] = LatentAttention if latent else Attention
        self.self_attn: SelfAttention = kind(config, layer_idx)
        self.mlp = build_feed_forward(config, layer_idx)
        if config.shares_experts(layer_idx):  # in attention's place, which is the first one
            self.self_attn = MixtureAttention(config, layer_idx, cast(Any, self.mlp))
        # In the order in which they answer.
        late = "after_feed_forward"
        memories = sorted(build_memories(config, layer_idx), key=lambda m: m[1].added == late)
        self.memory_rules = [number for number, _ in memories]
        self.memories = nn.ModuleList(layer for _, layer in memories)
        self.router_input = config.router_input(layer_idx)
        self.residual_multiplier = config.residual_multiplier
        joined = isinstance(self.mlp, JoinedSlots)
        if joined:
            check_joint_backend(attention_backend(config), config.attn_logit_softcapping)
        self.is_parallel = config.parallel != "none" and not joined
        places = _BESIDE[config.parallel] if self.is_parallel else _PLACES[config.norm_placement]
        self.places = places[: 2 if joined else 4]
        for name in dict.fromkeys(filter(None, self.places)):
            self.add_module(name, NORMS[config.norm](config.hidden_size, config.rms_norm_eps))

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Any,
        tokens: TokensSeen,
        rotary: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        router_state: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Noted], Tensor | None]:
        """Return the new hidden states, losses and statistics of the block's layers, and a state.

        Losses and statistics of the feed-forward block come first, then those of the memories. The
        state is what its router hands on, or what was given if it hands on nothing.
        """
        noted: list[Noted] = []
        given = (tokens, past_key_values, kwargs.get("position_ids"))
        hidden = self._with_memories("before_attention", hidden, noted, *given)
        normed = self._normed(0, hidden)
        attended, _, beside = self.self_attn(
            normed,
            rotary,
            attention_mask,
            past_key_values=past_key_values,
            **self._given_to_attention(tokens.mask),
            **kwargs,
        )
        entering, hidden = hidden, self.with_attended(hidden, attended)
        if isinstance(self.mlp, JoinedSlots):
            own: Noted = ({}, {"context_mass": _mean(beside, tokens.mask)})
        else:
            carried = {"router_state": router_state} if self.mlp.reads_router_state else {}
            answer = self.mlp(
                self._read_by_feed_forward(entering, normed, hidden),
                router_input=self._read_by_router(entering, hidden),
                **self._context(self.mlp, "mlp", *given),
                **carried,
            )
            hidden = self.with_answer(hidden, answer.hidden)
            if answer.router_state is not None:
                router_state = answer.router_state
            losses = answer.losses
            if isinstance(self.self_attn, MixtureAttention):
                losses = losses | {f"attention_{name}": loss for name, loss in beside.items()}
            own = (losses, answer.stats)
        hidden = self._with_memories("after_feed_forward", hidden, noted, *given)
        return hidden, [own, *noted], router_state

    def layers_ahead(self) -> list[ReadsTokenRows]:
        """Return the layers that read rows of offloaded tables."""
        layers = (self.mlp, *self.memories)
        return [layer for layer in layers if isinstance(layer, ReadsTokenRows) and layer.offload]

    def prefetch(self, tokens: TokensSeen) -> None:
        """Begin to fetch the rows that these layers will read in a call."""
        for layer in self.layers_ahead():
            both = (tokens.ids, tokens.mask), (tokens.all_ids, tokens.all_mask)
            token_ids, mask = both[layer.needs_earlier_tokens]
            layer.prefetch(tokens.embeddings, token_ids=token_ids, mask=mask)

    def _given_to_attention(self, token_mask: Tensor | None) -> dict[str, Any]:
        """Return what attention takes of the block: slots of a memory, or a mixture's experts."""
        if isinstance(self.mlp, JoinedSlots):
            return {"slots": self.mlp.slots}
        if isinstance(self.self_attn, MixtureAttention):
            return {"experts": self.mlp.experts, "token_mask": token_mask}
        return {}

    def feed_forward_input(self, attended: Tensor) -> Tensor:
        """Return what the feed-forward block reads of the residual stream after attention.

        In parallel blocks it reads the one before attention, which is to be given instead.
        """
        return self._normed(2, attended)

    def with_attended(self, entering: Tensor, attended: Tensor) -> Tensor:
        """Add attention's answer to the residual stream that enters the block."""
        return self._added(entering, self._normed(1, attended))

    def with_answer(self, attended: Tensor, answer: Tensor) -> Tensor:
        """Add the feed-forward block's answer to the residual stream after attention."""
        return self._added(attended, self._normed(3, answer))

    def norm_at(self, place: int) -> Norm | None:
        """Return a norm: 0 before attention, 1 after it, 2 before the feed-forward block, 3 after.

        None where there is none.
        """
        name = self.places[place] if place < len(self.places) else None
        return None if name is None else getattr(self, name)

    def _normed(self, place: int, x: Tensor) -> Tensor:
        norm = self.norm_at(place)
        return x if norm is None else norm(x)

    def _added(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + (x if self.residual_multiplier == 1.0 else x * self.residual_multiplier)

    def _with_memories(
        self,
        place: Place,
        hidden: Tensor,
        noted: list[Noted],
        tokens: TokensSeen,
        cache: Cache | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Add the memories of one place to the residual stream; note losses and statistics."""
        for number, layer in enumerate(cast("list[FeedForward]", self.memories)):
            if layer.added == place:
                context = self._context(layer, f"memories.{number}", tokens, cache, positions)
                answer = layer(hidden, **context)
                hidden = self._added(hidden, answer.hidden)
                noted.append((answer.losses, answer.stats))
        return hidden

    def _context(
        self,
        layer: FeedForward,
        name: str,
        tokens: TokensSeen,
        cache: Cache | None,
        positions: Tensor | None,
    ) -> dict[str, Any]:
        """Return what a layer reads beside hidden states: what it asks for, and no more."""
        earlier = layer.needs_earlier_tokens
        found: dict[str, Any] = {
            "token_ids": tokens.all_ids if earlier else tokens.ids,
            "mask": tokens.all_mask if earlier else tokens.mask,
        }
        if layer.reads_positions and positions is not None:
            found["positions"] = positions.expand(tokens.embeddings.shape[:2])
        if layer.reads_embeddings:
            found["embeddings"] = tokens.embeddings
        if layer.keeps_history:
            name = f"{self.layer_idx}.{name}"
            found["history"] = history_in(cache, name, self._num_layers)
        return found

    def _read_by_feed_forward(self, entering: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """Return what the experts read; ``normed`` is what attention has read."""
        if not self.is_parallel:
            return self.feed_forward_input(attended)
        shared = self.places[0] == self.places[2]
        return normed if shared else self.feed_forward_input(entering)

    def _read_by_router(self, entering: Tensor, attended: Tensor) -> Tensor | None:
        """Return what the router reads; None if that is what the experts read."""
        residuals = {"pre_attention": entering, "post_attention": attended}
        return residuals.get(self.router_input)


def fetching_ahead(blocks: Iterable[DecoderLayer], tokens: TokensSeen) -> Iterable[DecoderLayer]:
    """Go through blocks, and begin to fetch what the next ones will read of offloaded tables."""
    all_blocks = list(blocks)
    if torch.compiler.is_compiling() or not any(block.layers_ahead() for block in all_blocks):
        return all_blocks
    return _fetching(all_blocks, tokens)


def _fetching(blocks: list[DecoderLayer], tokens: TokensSeen) -> Iterator[DecoderLayer]:
    for block in blocks[:BLOCKS_AHEAD]:
        block.prefetch(tokens)
    for number, block in enumerate(blocks):
        if number + BLOCKS_AHEAD < len(blocks):
            blocks[number + BLOCKS_AHEAD].prefetch(tokens)
        yield block


def build_feed_forward(config: MoezooConfig, layer: int) -> FeedForward:
    """Build the feed-forward block that the configuration's rules choose for a layer.

    Raises:
        InputError: arguments that the layer refuses; a layer of kind ``attention`` that does not
            fit the model's; or one in which tokens see later tokens, unless ``allow_non_causal``.
    """
    number, rule = config.feed_forward(layer)
    try:
        if registered(rule["class_path"]).kind == "attention":
            return build_slots(rule, config)
        own = {key: rule[key] for key in ("class_path", "init_args")}
        block = FeedForward.from_config(own, d_model=config.hidden_size)
    except InputError as error:
        raise InputError(f"ffn[{number}]: {error}") from error
    name = type(block).__name__
    if not block.causal and not config.allow_non_causal:
        raise InputError(
            f"ffn[{number}]: {name} as configured is not causal: a token would see later tokens; "
            "choose another routing, or set allow_non_causal: true"
        )
    try:
        check_vocabulary(block, config.vocab_size)
    except InputError as error:
        raise InputError(f"ffn[{number}]: {error}") from None
    return block


def check_router_states(blocks: Sequence[DecoderLayer]) -> None:
    """Refuse blocks whose router carries a state of another width than it is given.

    Raises:
        InputError: names the layers and both widths.
    """
    before: tuple[int, int] | None = None
    for number, block in enumerate(blocks):
        layer: Any = block.mlp
        width = getattr(layer, "router_state_width", 0)
        if width and before and layer.reads_router_state and before[1] != width:
            raise InputError(
                f"router.logits.mlp: layer {number} carries the state of layer {before[0]}, which "
                f"is {before[1]} wide, into an MLP of {width}; give both the same"
            )
        before = (number, width) if width else before


def _mean(context_share: Tensor, token_mask: Tensor | None) -> Tensor:
    """Average ``(batch, heads, sequence)`` over heads and real tokens."""
    flat_mask = None if token_mask is None else token_mask.flatten()
    return masked_mean(context_share.detach().mean(1).flatten(), flat_mask)
