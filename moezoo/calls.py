"""Checks of every call of a layer, before it computes and after."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moezoo.errors import InputError

R = TypeVar("R")


class Wide(Protocol):
    """A module that takes hidden states of one width, as every layer does."""

    d_model: int


def checked(method: Callable[..., R]) -> Callable[..., R]:
    """Wrap a layer's method that takes what ``forward`` takes, so that its arguments are checked.

    Raises:
        InputError: from the wrapped method: ``hidden``, ``router_input`` or ``embeddings`` is
            not floating point or not ``(..., d_model)``, or ``mask`` is of another shape,
            ``token_ids`` are no whole numbers, ``mask`` is not bool, ``positions`` are no whole
            numbers or of another shape, ``router_state`` is not floating point or of other tokens,
            or losses would be lost (see :func:`refuse_lost_losses`).
    """

    @functools.wraps(method)
    def call(self: Wide, hidden: Tensor, *args: Any, **context: Any) -> R:
        check_hidden(self, hidden)
        check_context(hidden, **context)
        output = method(self, hidden, *args, **context)
        if not torch.is_grad_enabled() and getattr(output, "losses", None):
            refuse_lost_losses(self)
        return output

    return call


def check_hidden(layer: Wide, hidden: Any) -> None:
    """Refuse what is no ``(..., d_model)`` of floating-point numbers.

    Raises:
        InputError: names the dtype or the shape.
    """
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        kind = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(f"hidden: {kind} is not floating point; give hidden states, e.g. float32")
    if not hidden.ndim:
        raise InputError(f"hidden: is one number; give (..., {layer.d_model}) of them")
    if hidden.shape[-1] != layer.d_model:
        raise InputError(
            f"hidden: last dimension is {hidden.shape[-1]}, the layer's d_model is {layer.d_model}"
        )


def check_context(
    hidden: Tensor,
    token_ids: Tensor | None = None,
    router_input: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    embeddings: Tensor | None = None,
    router_state: Tensor | None = None,
    **others: Any,
) -> None:
    """Refuse what is given beside the hidden states and does not fit them.

    The shapes of ``mask`` and ``token_ids`` are the layer's to check: it may read earlier tokens.

    Raises:
        InputError: names the argument, and its dtype or shape.
    """
    if token_ids is not None and token_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"token_ids: {token_ids.dtype} holds no token ids; give int64")
    for name, given in (("router_input", router_input), ("embeddings", embeddings)):
        if given is None:
            continue
        if not given.is_floating_point():
            raise InputError(f"{name}: {given.dtype} is not floating point; give hidden states")
        if given.shape != hidden.shape:
            raise InputError(
                f"{name}: shape {tuple(given.shape)} does not match hidden's {tuple(hidden.shape)}"
            )
    if router_state is not None:
        if not router_state.is_floating_point():
            raise InputError(
                f"router_state: {router_state.dtype} is not floating point; give the router_state "
                "that the layer before returned"
            )
        if router_state.shape[:-1] != hidden.shape[:-1]:
            raise InputError(
                f"router_state: shape {tuple(router_state.shape)} does not match hidden's "
                f"{tuple(hidden.shape)}: all but the last have to be equal"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(
            f"mask: {mask.dtype} is not bool; give torch.bool, true at real tokens (not a mask "
            "to be added)"
        )
    if positions is not None:
        if positions.dtype not in (torch.int64, torch.int32):
            raise InputError(f"positions: {positions.dtype} holds no positions; give int64")
        if positions.shape != hidden.shape[:-1]:
            raise InputError(
                f"positions: shape {tuple(positions.shape)} does not match hidden's "
                f"{tuple(hidden.shape[:-1])}"
            )


def flatten_tokens(
    layer: Wide, hidden: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Flatten ``(..., d_model)`` and its mask to ``(T, d_model)`` and ``(T,)``, checking both.

    Raises:
        InputError: ``hidden`` is not floating point, its last dimension is not ``d_model``, or the
            mask is not bool or has another shape.
    """
    check_hidden(layer, hidden)
    if mask is None:
        return hidden.reshape(-1, layer.d_model), None
    check_context(hidden, mask=mask)
    if mask.shape != hidden.shape[:-1]:
        raise InputError(
            f"mask: shape {tuple(mask.shape)} does not match hidden's {tuple(hidden.shape[:-1])}"
        )
    return hidden.reshape(-1, layer.d_model), mask.reshape(-1)


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def refuse_lost_losses(layer: object) -> None:
    """Refuse to return losses without a graph from inside an autograd function.

    Reentrant checkpointing runs a block there without a graph, and makes one for the tensors that
    the block returns; losses that are handed on in a dictionary, or caught on the way, stay
    without, and their gradients would be missing. A plain ``torch.no_grad()`` is no such function.

    Raises:
        InputError: names the layer and the fix.
    """
    if torch.compiler.is_compiling():  # which records checkpoints as such, whatever their kind
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            raise InputError(
                f"use_reentrant: reentrant checkpointing drops the gradients of "
                f"{type(layer).__name__}'s losses; checkpoint with use_reentrant=False"
            )
        frame = frame.f_back  # type: ignore[assignment]
