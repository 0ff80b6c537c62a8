"""Which blocks of a model get which feed-forward layer, and what is added beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def block_rules(
    d_model: int,
    everywhere: FFNRule,
    exceptions: Sequence[FFNRule] | None,
    memory: Mapping[str, Any] | Sequence[Any] | None,
) -> dict[str, Any]:
    """Return the fields of the model's configuration that say what is in its blocks.

    Args:
        d_model: width of the model.
        everywhere: the feed-forward layer of every block.
        exceptions: from it.
        memory: of layers beside them: one rule, several, or none.
    """
    beside = [memory] if isinstance(memory, Mapping) else memory
    return {
        "ffn": [rule.config(d_model) for rule in (everywhere, *(exceptions or []))],
        "memory": [] if beside is None else beside,
    }
