"""The models' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class MoezooModelOutput(ModelOutput):
    """The output of the decoder without its output projection.

    Attributes:
        last_hidden_state: ``(batch, sequence, hidden_size)`` after the last norm.
        past_key_values: the key-value cache, if one is used.
        hidden_states: the input of each layer and the last state, ``(batch, sequence,
            hidden_size)`` each, if asked for.
        attentions: attention weights of each layer, ``(batch, heads, sequence, past + sequence)``,
            if asked for (eager backend only).
        aux_losses: auxiliary losses by name, fp32 scalars summed over layers.
        ffn_stats: statistics of each layer's feed-forward block by name, detached.
        memory_stats: the same of each layer that is added to blocks, in their order.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_losses: dict[str, Tensor] | None = None
    ffn_stats: tuple[Mapping[str, Tensor], ...] | None = None
    memory_stats: tuple[Mapping[str, Tensor], ...] | None = None


@dataclass
class MoezooOutput(ModelOutput):
    """The output of the language model.

    Attributes:
        loss: ``lm_loss`` plus all auxiliary losses, if there are labels; fp32.
        lm_loss: mean cross-entropy in nats per predicted token, if there are labels; fp32.
        logits: ``(batch, sequence, vocab_size)``, unless only the loss is asked for.
        past_key_values: the key-value cache, if one is used.
        hidden_states: the input of each layer and the last state, ``(batch, sequence,
            hidden_size)`` each, if asked for.
        attentions: attention weights of each layer, ``(batch, heads, sequence, past + sequence)``,
            if asked for (eager backend only).
        aux_losses: auxiliary losses by name, fp32 scalars summed over layers.
        ffn_stats: statistics of each layer's feed-forward block by name, detached.
        memory_stats: the same of each layer that is added to blocks, in their order.
        aux_loss: the sum of ``aux_losses``, fp32, in ``loss`` already; None without any. (That of
            transformers' mixtures is not weighted yet.)
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_losses: dict[str, Tensor] | None = None
    ffn_stats: tuple[Mapping[str, Tensor], ...] | None = None
    memory_stats: tuple[Mapping[str, Tensor], ...] | None = None
    aux_loss: Tensor | None = None
