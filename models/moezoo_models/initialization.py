"""Initialising layers that a checkpoint may have filled in part."""

from __future__ import annotations

from itertools import chain

import torch

from moezoo.feed_forward import FeedForward


def reset_feed_forward(layer: FeedForward, num_layers: int) -> None:
    """Initialise what no checkpoint has filled: all of a fresh layer, none of a loaded one.

    transformers marks the tensors it has loaded. A layer initialises itself as a whole and by any
    means, so loaded tensors are put back afterwards, and the random state with them. What remains
    new in a loaded layer are buffers that are not saved.
    """
    tensors = list(chain(layer.parameters(), layer.buffers()))
    loaded = [t for t in tensors if getattr(t, "_is_hf_initialized", False)]
    if not loaded:
        layer.reset_parameters(num_layers=num_layers)
    elif len(loaded) < len(tensors):
        saved = [t.detach().clone() for t in loaded]
        with torch.random.fork_rng(devices={t.device for t in tensors if t.is_cuda}):
            layer.reset_parameters(num_layers=num_layers)
        with torch.no_grad():
            for tensor, value in zip(loaded, saved, strict=True):
                tensor.copy_(value)
