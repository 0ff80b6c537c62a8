"""Initialising layers that a checkpoint has filled in part, and models one part after the other."""

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


class Drawn:
    """A model without numbers, and the random states that they are to be drawn from.

    What :meth:`fill` draws, part by part and in any order, is to the bit what the model would have
    been drawn as at once. No part is kept here.
    """

    def __init__(self) -> None:
        self._states: dict[nn.Module, tuple[Any, Tensor]] = {}

    def fill(self, part: nn.Module) -> None:
        """Give a part its numbers, on the CPU; what has some already keeps them."""
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
        """Remember how a model initialises a module, and drop what it then draws.

        Args:
            model: whose method initialises it.
            module: what is initialised.
            parts: what of it gets numbers.
        """
        self._states[module] = model, torch.get_rng_state()
        for part in parts:
            _replace(part, torch.device("meta"), torch.device("cpu"))
        yield
        for part in parts:
            drop(part)


_DRAWN: ContextVar[Drawn | None] = ContextVar("moezoo_drawn", default=None)


@contextmanager
def drawn_later(wanted: bool = True) -> Iterator[Drawn | None]:
    """Let models of ours that are built inside keep no numbers until they are filled.

    Everything is drawn once as ever, a block at a time, and dropped: the random state goes on as it
    would have.

    Args:
        wanted: else nothing is different, as where models have no memory anyway.

    Returns:
        What fills the model; None if not wanted.
    """
    drawn = Drawn() if wanted and torch.get_default_device().type != "meta" else None
    token = _DRAWN.set(drawn)
    try:
        yield drawn
    finally:
        _DRAWN.reset(token)


def filled_later() -> Drawn | None:
    """Return what will fill the model that is being built, if anything will."""
    return _DRAWN.get()


def drop(part: nn.Module) -> None:
    """Take a part's numbers away."""
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
