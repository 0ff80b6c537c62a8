"""Layers that a block adds to its residual stream beside its feed-forward block: its memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from moezoo.arguments import signature
from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward, registered, select_layers
from moezoo.token_context import History
from moezoo_models.model.config import MoezooConfig

_HISTORIES = "moezoo_histories"
"""Attribute of a cache: at which of its layers the histories are, by their names."""


class HasMemories(Protocol):
    """A block of the decoder, as its memories are read from it.

    Attributes:
        memory_rules: number of the rule of each memory.
        memories: the layers.
    """

    memory_rules: list[int]
    memories: nn.ModuleList


def build_memories(config: MoezooConfig, layer: int) -> list[tuple[int, FeedForward]]:
    """Build the memories of a block, each with the number of its rule, in the rules' order.

    Raises:
        InputError: arguments that a layer refuses, or a vocabulary that is smaller than the
            model's; names the rule.
    """
    return [
        (number, _build(rule, number, config))
        for number, rule in enumerate(config.memory)
        if layer in select_layers(rule["layers"], config.num_hidden_layers)
    ]


def _build(rule: Mapping[str, Any], number: int, config: MoezooConfig) -> FeedForward:
    kind = registered(rule["class_path"])
    arguments = {**kind.added_as, **rule["init_args"]}
    if "vocab_size" in signature(kind):
        arguments.setdefault("vocab_size", config.vocab_size)
    own = {"class_path": rule["class_path"], "init_args": arguments}
    try:
        layer = FeedForward.from_config(own, d_model=config.hidden_size)
        check_vocabulary(layer, config.vocab_size)
    except InputError as error:
        raise InputError(f"memory[{number}]: {error}") from error
    return layer


def check_vocabulary(layer: FeedForward, vocab_size: int) -> None:
    """Refuse a layer that reads token ids and knows fewer of them than the model.

    Raises:
        InputError: names both sizes.
    """
    room = getattr(layer, "vocab_size", vocab_size)
    if layer.needs_token_ids and room < vocab_size:
        raise InputError(
            f"{type(layer).__name__} has vocab_size {room}, the model {vocab_size}; "
            "give the layer at least as many"
        )


def recorded_memories(
    rules: Sequence[Mapping[str, Any]], blocks: Sequence[HasMemories]
) -> list[dict[str, Any]]:
    """Return the rules with all arguments of the layers that were built, defaults included.

    Args:
        rules: of a model's configuration.
        blocks: of the model.
    """
    found = [dict(rule) for rule in rules]
    for block in blocks:
        for number, layer in zip(block.memory_rules, cast(Any, block.memories), strict=True):
            found[number].update(layer.config())
            found[number]["init_args"].pop("d_model")
    return found


def history_in(cache: Cache | None, name: str, num_layers: int) -> History | None:
    """Return the history of one layer of the model in a cache; None without a cache.

    It is one more layer of the cache, behind those of attention, so that whatever reorders, cuts or
    repeats the cache does so to the history.

    Args:
        cache: of the call.
        name: of the layer in its model, unique.
        num_layers: how many layers of the cache are attention's.
    """
    if cache is None:
        return None

    def history(values: Tensor, reach: int) -> Tensor:
        places: dict[str, int] = getattr(cache, _HISTORIES, {})
        if name not in places:
            while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
                cache.layers.append(cache.layer_class_to_replicate())
            setattr(cache, _HISTORIES, places | {name: len(cache.layers)})
            cache.layers.append(DynamicSlidingWindowLayer(sliding_window=reach + 1))
        layer = cache.layers[getattr(cache, _HISTORIES)[name]]
        heads = values.unsqueeze(1)  # of which there is one
        found, _ = layer.update(heads, heads[..., :0])
        return found.squeeze(1)

    return history


def earlier_values(cache: Cache, name: str) -> Tensor:
    """Return what a cache holds of one layer's history, ``(B, E, W)``.

    Args:
        cache: of a call that the model has answered.
        name: of the layer, as for :func:`history_in`.
    """
    layer: Any = cache.layers[getattr(cache, _HISTORIES)[name]]
    values: Tensor = layer.keys.squeeze(1)
    return values
