"""moezoo: feed-forward replacements for transformers behind one layer API.

Torch takes seconds to import, so the names below are loaded when one of them is first asked for,
all at once: whoever has one layer has every method registered.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moezoo.adopting import adopt
    from moezoo.errors import InputError
    from moezoo.experts import ExpertNormOptions, GLUOptions
    from moezoo.experts.values import shared_values
    from moezoo.fast_products import FastProducts, use_fast_products
    from moezoo.feed_forward import (
        Cost,
        FeedForward,
        FeedForwardOutput,
        Method,
        Paper,
        ParameterGroup,
        register,
        select_layers,
        zoo,
    )
    from moezoo.layers.carved_moe import CarvedMoE
    from moezoo.layers.dense import DenseFFN
    from moezoo.layers.engram import Engram
    from moezoo.layers.fast_feed_forward import FastFeedForward
    from moezoo.layers.finedeep import Finedeep
    from moezoo.layers.hash import HashLayer
    from moezoo.layers.l3 import L3
    from moezoo.layers.memory_plus import MemoryPlus
    from moezoo.layers.mole import MoLE
    from moezoo.layers.peer import PEER
    from moezoo.layers.per_layer_embedding import PerLayerEmbedding
    from moezoo.layers.persistent_memory import PersistentMemoryAttention
    from moezoo.layers.product_key_memory import ProductKeyMemory
    from moezoo.layers.selective_ffn import SelectiveFFN
    from moezoo.layers.sigma_moe import SigmaMoE
    from moezoo.layers.sparse_moe import SparseMoE
    from moezoo.layers.stem import STEM
    from moezoo.layers.top_k_ffn import TopKFFN
    from moezoo.layers.ultra_fast_fff import UltraFastFFF
    from moezoo.routing import (
        BalanceOptions,
        CapacityOptions,
        LogitOptions,
        RouterOptions,
        WeightOptions,
    )
    from moezoo.selection import Predictor, Thresholds
    from moezoo.stock_experts import register_experts
    from moezoo.swap_layers import swap

_NAMES: dict[str, tuple[str, ...]] = {
    "adopting": ("adopt",),
    "errors": ("InputError",),
    "experts": ("ExpertNormOptions", "GLUOptions"),
    "experts.values": ("shared_values",),
    "fast_products": ("FastProducts", "use_fast_products"),
    "feed_forward": (
        "Cost",
        "FeedForward",
        "FeedForwardOutput",
        "Method",
        "Paper",
        "ParameterGroup",
        "register",
        "select_layers",
        "zoo",
    ),
    "layers.mixtures": (),
    "layers.matrices": (),
    "layers.carved_moe": ("CarvedMoE",),
    "layers.dense": ("DenseFFN",),
    "layers.engram": ("Engram",),
    "layers.fast_feed_forward": ("FastFeedForward",),
    "layers.finedeep": ("Finedeep",),
    "layers.hash": ("HashLayer",),
    "layers.l3": ("L3",),
    "layers.memory_plus": ("MemoryPlus",),
    "layers.mole": ("MoLE",),
    "layers.peer": ("PEER",),
    "layers.per_layer_embedding": ("PerLayerEmbedding",),
    "layers.persistent_memory": ("PersistentMemoryAttention",),
    "layers.product_key_memory": ("ProductKeyMemory",),
    "layers.selective_ffn": ("SelectiveFFN",),
    "layers.sigma_moe": ("SigmaMoE",),
    "layers.sparse_moe": ("SparseMoE",),
    "layers.stem": ("STEM",),
    "layers.top_k_ffn": ("TopKFFN",),
    "layers.ultra_fast_fff": ("UltraFastFFF",),
    "routing": (
        "BalanceOptions",
        "CapacityOptions",
        "LogitOptions",
        "RouterOptions",
        "WeightOptions",
    ),
    "selection": ("Predictor", "Thresholds"),
    "stock_experts": ("register_experts",),
    "swap_layers": ("swap",),
}
"""Modules, and the public names that each has."""


def load() -> None:
    """Import every public name, which registers the methods of the zoo."""
    for module, names in _NAMES.items():
        members = vars(importlib.import_module(f"{__name__}.{module}"))
        for name in names:
            globals().setdefault(name, members[name])


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load a public name, or a module that has some (PEP 562)."""
        if name in __all__ or any(module.partition(".")[0] == name for module in _NAMES):
            load()
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List what is there and what can be loaded."""
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "L3",
    "PEER",
    "STEM",
    "BalanceOptions",
    "CapacityOptions",
    "CarvedMoE",
    "Cost",
    "DenseFFN",
    "Engram",
    "ExpertNormOptions",
    "FastFeedForward",
    "FastProducts",
    "FeedForward",
    "FeedForwardOutput",
    "Finedeep",
    "GLUOptions",
    "HashLayer",
    "InputError",
    "LogitOptions",
    "MemoryPlus",
    "Method",
    "MoLE",
    "Paper",
    "ParameterGroup",
    "PerLayerEmbedding",
    "PersistentMemoryAttention",
    "Predictor",
    "ProductKeyMemory",
    "RouterOptions",
    "SelectiveFFN",
    "SigmaMoE",
    "SparseMoE",
    "Thresholds",
    "TopKFFN",
    "UltraFastFFF",
    "WeightOptions",
    "adopt",
    "register",
    "register_experts",
    "select_layers",
    "shared_values",
    "swap",
    "use_fast_products",
    "zoo",
]
