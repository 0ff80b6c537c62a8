"""Put a layer of the zoo into a transformer somebody else built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.experts.values import shared_values
from moezoo.feed_forward import FeedForward, FeedForwardOutput, select_layers

_FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class Swapped(list[FeedForward]):
    """The layers that :func:`swap` put in, first to last; and what they return beside ``hidden``.

    A foreign decoder passes on hidden states only. Losses and statistics are caught for the
    duration of a ``with`` block::

        swapped = moezoo.swap(model, lambda d: moezoo.SparseMoE(d))
        with swapped.collect() as outputs:
            loss = model(**batch).loss
        loss = loss + sum(sum(o.losses.values()) for o in outputs)
    """

    def __init__(self, adapters: list[Adapter]) -> None:
        super().__init__(adapter.layer for adapter in adapters)
        self._adapters = adapters

    @contextmanager
    def collect(self) -> Iterator[list[FeedForwardOutput]]:
        """Catch the outputs of forward passes inside the block, in the order of the calls.

        A recomputation under activation checkpointing happens in the backward pass; run that
        after the block, and it is not counted twice.
        """
        caught: list[FeedForwardOutput] = []
        for adapter in self._adapters:
            adapter.caught = caught
        try:
            yield caught
        finally:
            for adapter in self._adapters:
                adapter.caught = None


class Adapter(nn.Module):
    """Give a foreign model the tensor it expects."""

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.layer = layer
        self.caught: list[FeedForwardOutput] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the layer; keep its losses and statistics if somebody collects them."""
        output = self.layer(hidden_states)
        if self.caught is not None:
            self.caught.append(output)
        return output.hidden


def swap(
    model: nn.Module,
    factory: Callable[[int], FeedForward] | str | Mapping[str, Any],
    where: str | int | list[int] | Callable[[int], bool] = "all",
) -> Swapped:
    """Replace the feed-forward blocks of a decoder, in place.

    Args:
        model: a transformers decoder (Llama, Mistral, Qwen, OLMo and others of that shape), with
            or without its language-model head: somewhere in it lies a ``ModuleList`` of blocks
            that each have an ``mlp``, ``feed_forward``, ``ffn`` or ``block_sparse_moe``.
        factory: builds a layer from d_model: a function, a class path such as
            ``"moezoo.SparseMoE"``, or ``{"class_path": …, "init_args": …}``.
        where: which layers: ``"all"``, ``"every 2"``, ``3``, ``[3, 7]`` or a function of the index.

    Returns:
        The new layers, with :meth:`Swapped.collect` to catch their losses. They take the device
        and dtype of the blocks they replace; nothing else in the model changes.

    Raises:
        InputError: no feed-forward blocks were found, the layer needs token ids (which a foreign
            decoder does not pass on) or is not causal, or ``where`` names no layer.
    """
    blocks, name = _decoder_blocks(model)
    if callable(where):
        chosen = [index for index in range(len(blocks)) if where(index)]
    else:
        chosen = select_layers(where, len(blocks))
    if not chosen:
        raise InputError(f"where: no layer of {len(blocks)} is chosen")
    d_model = _width(model, blocks)
    # Build all before replacing any, so that a mistake leaves the model as it was.
    with shared_values():
        adapters = {
            index: _adapter(factory, d_model, len(blocks), blocks[index].get_submodule(name))
            for index in chosen
        }
    for index, adapter in adapters.items():
        setattr(blocks[index], name, adapter)
    return Swapped(list(adapters.values()))


def _adapter(
    factory: Callable[[int], FeedForward] | str | Mapping[str, Any],
    d_model: int,
    num_layers: int,
    replaced: nn.Module,
) -> Adapter:
    if callable(factory):
        layer = factory(d_model)
    else:
        layer = FeedForward.from_config(factory, d_model=d_model)
    if layer.kind != "feed_forward":
        raise InputError(
            f"factory: {type(layer).__name__} is of kind '{layer.kind}', not feed_forward"
        )
    if layer.needs_token_ids or not layer.causal:
        why = "needs token ids" if layer.needs_token_ids else "is not causal"
        raise InputError(f"factory: {type(layer).__name__} {why}, so it can't be swapped in")
    layer.reset_parameters(num_layers)
    like = next((p for p in replaced.parameters() if p.is_floating_point()), torch.empty(0))
    adapter = Adapter(layer).train(replaced.training)
    return adapter.to(device=like.device, dtype=like.dtype)


def _decoder_blocks(model: nn.Module) -> tuple[nn.ModuleList, str]:
    candidates = [
        (module, name)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module)
        for name in _FFN_NAMES
        if all(isinstance(getattr(block, name, None), nn.Module) for block in module)
    ]
    if not candidates:
        raise InputError(
            f"model: {type(model).__name__} has no list of blocks with one of "
            f"{', '.join(_FFN_NAMES)}; replace the blocks by hand"
        )
    return max(candidates, key=lambda candidate: len(candidate[0]))


def _width(model: nn.Module, blocks: nn.ModuleList) -> int:
    config = getattr(model, "config", None)
    if isinstance(width := getattr(config, "hidden_size", None), int):
        return width
    for name, parameter in blocks.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            return parameter.numel()
    raise InputError("model: its width is unknown; give it a config with hidden_size")
