"""A decoder whose feed-forward blocks are the zoo's.

Outside those blocks it is a Llama by default: pre-norm blocks with RMSNorm, rotary positions and
grouped-query attention, under Llama's tensor names. Other norms, places of norms, positions,
factors and latent attention are options, of which other families are made. Auxiliary losses and
statistics of the blocks are returned with the output and stored nowhere, so that activation
checkpointing, which runs a block twice, counts them once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.output_capturing import capture_outputs

from moezoo.errors import InputError
from moezoo.experts.values import shared_values
from moezoo.feed_forward import FeedForward
from moezoo_models.adapters.transformers import (
    attention_backend,
    initialize_unless_loaded,
    is_loaded,
)
from moezoo_models.files.loading import GatedLoading
from moezoo_models.model.attention import SelfAttention
from moezoo_models.model.attention_backends import check_backend
from moezoo_models.model.block import (
    DecoderLayer,
    TokensSeen,
    check_router_states,
    fetching_ahead,
)
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.initialization import current_deferred_init, drop, reset_feed_forward
from moezoo_models.model.inputs import check_positions, check_token_ids, scaled_embeddings
from moezoo_models.model.memories import recorded_memories
from moezoo_models.model.norm import NORMS, Norm
from moezoo_models.model.outputs import MoezooModelOutput
from moezoo_models.model.rotary import RotaryEmbedding, build_rotary


class MoezooPreTrainedModel(GatedLoading, PreTrainedModel):
    """The base of the models: configuration class, capabilities, initialisation, strict loading."""

    config_class = MoezooConfig
    config: MoezooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch at hand: it takes no token count from the trainer.
    accepts_loss_kwargs = False
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": SelfAttention}  # noqa: RUF012

    def __init__(self, config: MoezooConfig) -> None:
        config.check()
        check_backend(attention_backend(config), config.attn_logit_softcapping)
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; called for each, innermost first.

        The owner of a projection knows its scale, so bare linear layers are passed over.
        """
        if isinstance(module, FeedForward):
            reset_feed_forward(module, self.config.num_hidden_layers)
        elif isinstance(module, SelfAttention | Norm | RotaryEmbedding):
            module.reset_parameters()
        elif isinstance(module, MoezooModel):
            nn.init.normal_(module.embed_tokens.weight, std=self.config.initializer_range)
            if module.embed_positions is not None:
                nn.init.normal_(module.embed_positions.weight, std=self.config.initializer_range)
        elif isinstance(head := getattr(module, "lm_head", None), nn.Linear):
            nn.init.normal_(head.weight, std=self.config.initializer_range)

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        """Initialise a module unless that is done.

        transformers takes modules of other libraries without parameters of their own for
        initialised; here these are the owners that initialise what is inside them.
        """
        deferred = current_deferred_init()
        if deferred is None or is_loaded(module):
            initialize_unless_loaded(self, module)
            return
        with deferred.initializing(self, module, _filled_parts(module)):
            initialize_unless_loaded(self, module)

    def init_weights(self) -> None:
        """Initialise and tie the weights, or drop them if initialization is deferred."""
        if current_deferred_init() is not None:
            drop(self)
        super().init_weights()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations.

        ``use_reentrant`` is false where it is not given: torch's own default is true.

        Raises:
            InputError: ``use_reentrant`` is asked for, which loses the gradients of auxiliary
                losses.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.get("use_reentrant"):
            raise InputError(
                "use_reentrant: it drops gradients of auxiliary losses; set it to false"
            )
        options["use_reentrant"] = False
        super().activation_checkpointing_enable(options, *args, **kwargs)


class MoezooModel(MoezooPreTrainedModel):
    """The decoder without its output projection.

    Pre-norm blocks with RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864) and
    grouped-query attention (arXiv:2305.13245), as in Llama (arXiv:2302.13971).

    Args:
        config: as for :class:`MoezooForCausalLM`.

    Raises:
        InputError: as there.
    """

    def __init__(self, config: MoezooConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if config.positions == "learned":
            length = config.max_position_embeddings
            self.embed_positions = nn.Embedding(length, config.hidden_size)
        with shared_values():  # among the layers of this model, not with those of another
            self.layers = nn.ModuleList(
                _block(config, layer) for layer in range(config.num_hidden_layers)
            )
        check_router_states(list(self.blocks()))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = build_rotary(config)
        self.gradient_checkpointing = False
        self.record_ffn_arguments()
        self.post_init()

    def blocks(self) -> Iterator[DecoderLayer]:
        """Return an iterator over the blocks, from the first."""
        return cast("Iterator[DecoderLayer]", iter(self.layers))

    def looks_back(self) -> bool:
        """Return whether a layer routes on earlier tokens and so wants ``context_ids``."""
        return any(layer.needs_earlier_tokens for _, layer in self.added_layers())

    def added_layers(self) -> Iterator[tuple[int, FeedForward]]:
        """Yield each layer whose answer blocks add, with the number of its block."""
        for number, block in enumerate(self.blocks()):
            yield number, block.mlp
            yield from ((number, cast("FeedForward", layer)) for layer in block.memories)

    def record_ffn_arguments(self) -> None:
        """Write the blocks' defaults into the configuration, which then outlives their change."""
        rules = [dict(rule) for rule in self.config.ffn]
        for layer, block in enumerate(self.blocks()):
            number, _ = self.config.feed_forward(layer)
            rules[number].update(block.mlp.config())
            rules[number]["init_args"].pop("d_model")
        self.config.ffn = rules
        self.config.memory = recorded_memories(self.config.memory, list(self.blocks()))

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MoezooModelOutput:
        """Run the decoder.

        Args:
            input_ids: ``(batch, sequence)`` int64. With ``inputs_embeds`` also given, they only
                tell layers that route on the token which token it is.
            attention_mask: ``(batch, past + sequence)``, nonzero at real tokens; or masks that are
                already as the attention backend wants them, by layer type.
            position_ids: ``(batch, sequence)``; default: counted on from the cache's length.
            past_key_values: the cache of earlier positions, which is extended in place.
            inputs_embeds: ``(batch, sequence, hidden_size)`` in place of embedded ``input_ids``;
                ``embedding_multiplier`` is not applied to them.
            use_cache: make a cache if none is given, and return it; default: as configured, but
                never in training.
            token_mask: ``(batch, sequence)`` bool, true at real tokens, for the feed-forward
                blocks; default: the last columns of a two-dimensional ``attention_mask``.
            context_ids: ``(batch, past + sequence)``, all tokens so far, for layers that route on
                earlier tokens; wanted with a cache that is not empty. ``generate`` passes them.
            context_mask: of the shape of ``context_ids``, true at real tokens; default: a
                two-dimensional ``attention_mask``.
            kwargs: passed on to the attention backend.

        Raises:
            InputError: a token id outside the vocabulary, or a position without a learned embedding
                (checked on CPU only, where it is free), no input, or no ``input_ids`` or
                ``context_ids`` for a layer that routes on them.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("input_ids: missing; give input_ids or inputs_embeds")
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
                check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = scaled_embeddings(self.embed_tokens(input_ids), self.config)
        if input_ids is None:
            self._refuse_token_routing()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = inputs_embeds.shape[1]
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        if token_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -length:].to(torch.bool)
        if context_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            context_mask = attention_mask
        context = self._context(input_ids, token_mask, context_ids, context_mask, past_key_values)
        masks = self._attention_masks(attention_mask, inputs_embeds, position_ids, past_key_values)

        hidden = self._with_positions(inputs_embeds, position_ids)
        rotary = self._rotary(hidden, position_ids)
        losses: dict[str, list[Tensor]] = defaultdict(list)
        stats, memory_stats = [], []
        tokens = TokensSeen(inputs_embeds, input_ids, token_mask, *context)
        state: Tensor | None = None  # handed from router to router, in this pass alone
        blocks = fetching_ahead(self.blocks(), tokens)
        for kind, layer in zip(self.config.layer_types, blocks, strict=True):
            hidden, noted, state = layer(
                hidden,
                attention_mask=masks[kind],
                tokens=tokens,
                rotary=rotary.get(kind),
                position_ids=position_ids,
                past_key_values=past_key_values,
                router_state=state,
                **kwargs,
            )
            for name, loss in (item for own, _ in noted for item in own.items()):
                losses[name].append(loss)
            stats.append(noted[0][1])
            memory_stats += [found for _, found in noted[1:]]
        return MoezooModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values if use_cache else None,
            aux_losses={name: torch.stack(terms).sum() for name, terms in losses.items()},
            ffn_stats=tuple(stats),
            memory_stats=tuple(memory_stats),
        )

    def _with_positions(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """Add the embeddings of positions, where these are learned."""
        if self.embed_positions is None:
            return embedded
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_positions(position_ids, self.config.max_position_embeddings)
        return embedded + self.embed_positions(position_ids)

    def _rotary(
        self, hidden: Tensor, position_ids: Tensor
    ) -> Mapping[str, tuple[Tensor, Tensor] | None]:
        """Return cos and sin at the positions, by type of layers."""
        if self.rotary_emb is None:
            return {}
        found = self.rotary_emb(hidden, position_ids)
        return found if isinstance(found, dict) else dict.fromkeys(self.config.layer_types, found)

    def _refuse_token_routing(self) -> None:
        for number, layer in self.added_layers():
            if layer.needs_token_ids:
                raise InputError(
                    f"input_ids: layer {number} ({type(layer).__name__}) routes on token ids; "
                    "give input_ids beside inputs_embeds"
                )

    def _context(
        self,
        input_ids: Tensor | None,
        token_mask: Tensor | None,
        context_ids: Tensor | None,
        context_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return all tokens so far and their mask, for layers that route on earlier tokens."""
        if input_ids is None or not self.looks_back():
            return None, None
        if context_ids is None and (
            past_key_values is None or not past_key_values.get_seq_length()
        ):
            return input_ids, token_mask
        if context_ids is None:
            raise InputError(
                "context_ids: a layer routes on earlier tokens, which the cache does not hold; "
                "give all token ids so far as context_ids"
            )
        if context_mask is not None:
            if context_mask.shape != context_ids.shape:
                raise InputError(
                    f"context_mask: shape {tuple(context_mask.shape)} does not match context_ids' "
                    f"{tuple(context_ids.shape)}"
                )
            context_mask = context_mask.to(torch.bool)
        return context_ids, context_mask

    def _attention_masks(
        self,
        attention_mask: Tensor | Mapping[str, Any] | None,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None,
    ) -> Mapping[str, Any]:
        """Make the backend's mask for each type of layer that the model has."""
        if isinstance(attention_mask, Mapping):
            return attention_mask
        makers = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        return {
            kind: makers[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for kind in dict.fromkeys(self.config.layer_types)
        }


def _block(config: MoezooConfig, layer: int) -> DecoderLayer:
    block = DecoderLayer(config, layer)
    if current_deferred_init() is not None:
        drop(block)
    return block


def _filled_parts(module: nn.Module) -> list[nn.Module]:
    """List the modules that ``_init_weights`` gives numbers to."""
    if isinstance(module, FeedForward | SelfAttention | Norm | RotaryEmbedding):
        return [module]
    if isinstance(module, MoezooPreTrainedModel):
        return [part for part in module.children() if isinstance(part, nn.Embedding | nn.Linear)]
    return []
