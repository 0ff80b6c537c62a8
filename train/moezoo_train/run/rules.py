"""Which blocks of a model get which feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moezoo import FeedForward
from moezoo.router_input import FFN_INPUT, RouterInput


@dataclass
class FFNRule:
    """Which blocks get which feed-forward layer.

    Attributes:
        layers: ``all``, ``every 2``, ``3`` or ``[3, 7]``; later rules win.
        ffn: the layer, built for a width.
        router_input: what its router reads: ``ffn_input``, as the experts do; ``pre_attention``,
            the residual stream that enters the block; or ``post_attention``, that after attention.
    """

    layers: str | int | list[int]
    ffn: Callable[[int], FeedForward]
    router_input: RouterInput = FFN_INPUT

    def config(self, d_model: int) -> dict[str, Any]:
        """Write the rule down as the model's configuration holds it."""
        with torch.device("meta"):  # only to learn the arguments, defaults included
            config = self.ffn(d_model).config()
        config["init_args"].pop("d_model")
        return {"layers": self.layers, **config, "router_input": self.router_input}
