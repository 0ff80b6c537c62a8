"""A model's mode: evaluation for a while, and then what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and then back, errors or not."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
