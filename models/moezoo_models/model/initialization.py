"""Initialization of partly loaded layers, and deferred initialization of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moezoo.feed_forward import FeedForward
from moezoo_models.adapters.transformers import initialize_again, is_loaded


def reset_feed_forward(layer: FeedForward, num_layers: int) -> None:
    """Initialise what no checkpoint has filled: all of a fresh layer, none of a loaded one.

    transformers marks the tensors it has loaded. A layer initialises itself as a whole and by any
    means, so loaded tensors are put back afterwards, and the random state with them. What remains
    new in a loaded layer are buffers that are not saved.
    """
    tensors = list(chain(layer.parameters(), layer.buffers()))
    loaded = [t for t in tensors if is_loaded(t)]
    if not loaded:
        layer.reset_parameters(num_layers=num_layers)
    elif len(loaded) < len(tensors):
        saved = [t.detach().clone() for t in loaded]
        with torch.random.fork_rng(devices={t.device for t in tensors if t.is_cuda}):
            layer.reset_parameters(num_layers=num_layers)
        with torch.no_grad():
            for tensor, value in zip(loaded, saved, strict=True):
                tensor.copy_(value)


class DeferredInit:
    """A model on the meta device, and the random states that its parameters are drawn from.

    :meth:`materialize` initializes part by part, in any order, bit for bit as the whole model would
    have been at once. No part is kept here.
    """

    def __init__(self) -> None:
        self._states: dict[nn.Module, tuple[Any, Tensor]] = {}

    def materialize(self, part: nn.Module) -> None:
        """Allocate and initialize a part on the CPU; tensors off the meta device stay."""
        _replace(part, torch.device("meta"), torch.device("cpu"))
        inside = set(part.modules())
        waiting = [module for module in self._states if module in inside]
        models = [module for module in waiting if isinstance(module, PreTrainedModel)]
        layers = [module for module in waiting if module not in models]
        with torch.random.fork_rng(devices=[]):
            # A head that is the embedding is drawn too, and then overwritten by the inner model.
            for module in (*layers, *reversed(models)):
                model, state = self._states.pop(module)
                torch.set_rng_state(state)
                initialize_again(model, module)

    @contextmanager
    def initializing(self, model: Any, module: nn.Module, parts: list[nn.Module]) -> Iterator[None]:
        """Remember how a model initializes a module, and drop what it then draws.

        Args:
            model: whose method initializes it.
            module: to initialize.
            parts: its parts that get values.
        """
        self._states[module] = model, torch.get_rng_state()
        for part in parts:
            _replace(part, torch.device("meta"), torch.device("cpu"))
        yield
        for part in parts:
            drop(part)


_DEFERRED: ContextVar[DeferredInit | None] = ContextVar("moezoo_deferred_init", default=None)


@contextmanager
def deferred_init(wanted: bool = True) -> Iterator[DeferredInit | None]:
    """Build models of ours on the meta device, to be materialized later.

    Everything is drawn once as ever, a block at a time, and dropped: the random state goes on as it
    would have.

    Args:
        wanted: else models are built as usual, as they are on the meta device anyway.

    Yields:
        The object that materializes the model; None if not wanted.
    """
    deferred = DeferredInit() if wanted and torch.get_default_device().type != "meta" else None
    token = _DEFERRED.set(deferred)
    try:
        yield deferred
    finally:
        _DEFERRED.reset(token)


def current_deferred_init() -> DeferredInit | None:
    """Return the deferred initialization of the model that is being built, if it is deferred."""
    return _DEFERRED.get()


def drop(part: nn.Module) -> None:
    """Move a part to the meta device."""
    _replace(part, torch.device("cpu"), torch.device("meta"))


def _replace(part: nn.Module, old: torch.device, new: torch.device) -> None:
    """Put fresh tensors in the place of those on a device; those that are one stay one."""
    known: dict[Tensor, Tensor] = {}
    for module in part.modules():
        named = (module.named_parameters, module.named_buffers)
        own = [pair for of in named for pair in of(recurse=False, remove_duplicate=False)]
        for name, tensor in own:
            if tensor.device.type != old.type:
                continue
            if tensor not in known:
                fresh = torch.empty_like(tensor, device=new, requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    fresh = nn.Parameter(fresh, tensor.requires_grad)
                known[tensor] = fresh
            setattr(module, name, known[tensor])
