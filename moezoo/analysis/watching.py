"""Seeing what the layers inside any model are given, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward

Context = dict[str, Tensor | None]
"""What a layer is given beside hidden states, by name: ``_CONTEXT``."""

_CONTEXT = ("token_ids", "router_input", "mask", "positions", "router_state")

See = Callable[[str, FeedForward, Tensor, Context], None]
"""Told the name of a layer, the layer, its hidden states ``(..., d_model)``, and the context."""


@contextmanager
def watch(layers: Mapping[str, FeedForward], see: See) -> Iterator[None]:
    """Call ``see`` with what each layer is given, before each of its passes inside the block.

    Args:
        layers: by name, in evaluation mode.
        see: called without gradients.

    Raises:
        InputError: a layer is in training mode, where it may choose differently each time.
    """
    for name, layer in layers.items():
        if layer.training:
            raise InputError(f"layers: '{name}' is in training mode; call model.eval() first")
    hooks = [_listen(name, layer, see) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _listen(name: str, layer: FeedForward, see: See) -> torch.utils.hooks.RemovableHandle:
    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden"]
        context: Context = {name: kwargs[name] for name in _CONTEXT if name in kwargs}
        with torch.no_grad():
            see(name, layer, hidden, context)

    return layer.register_forward_pre_hook(before_forward, with_kwargs=True)


def input_of(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """Return the first argument with which a call of something around a module calls the module."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


def token_mask(hidden: Tensor, context: Context) -> Tensor:
    """Return a bool ``(T,)`` on the CPU, true at real tokens.

    Args:
        hidden: ``(..., d_model)`` with T tokens.
        context: what the layer was given beside it; of its ``mask`` the last tokens are these.
    """
    tokens = hidden[..., 0].numel()
    mask = context.get("mask")
    if mask is None:
        return torch.ones(tokens, dtype=torch.bool)
    # A layer that looks back gets the mask of all tokens so far; its own are the last.
    return mask[..., -hidden.shape[-2] :].reshape(-1).to("cpu", torch.bool)
