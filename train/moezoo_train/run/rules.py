"""Which blocks of a model get which feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moezoo import FeedForward


@dataclass
class FFNRule:
    """Which blocks get which feed-forward layer.

    Attributes:
        layers: ``all``, ``every 2``, ``3`` or ``[3, 7]``; later rules win.
        ffn: the layer, built for a width.
    """

    layers: str | int | list[int]
    ffn: Callable[[int], FeedForward]

    def config(self, d_model: int) -> dict[str, Any]:
        """Write the rule down as the model's configuration holds it."""
        with torch.device("meta"):  # only to learn the arguments, defaults included
            config = self.ffn(d_model).config()
        config["init_args"].pop("d_model")
        return {"layers": self.layers, **config}
