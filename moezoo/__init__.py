"""moezoo: feed-forward replacements for transformers behind one layer API."""

from moezoo.errors import InputError
from moezoo.experts.values import shared_values
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
from moezoo.layers import (
    PEER,
    CarvedMoE,
    DenseFFN,
    FastFeedForward,
    HashLayer,
    MemoryPlus,
    PersistentMemoryAttention,
    ProductKeyMemory,
    SigmaMoE,
    SparseMoE,
    TopKFFN,
    UltraFastFFF,
)
from moezoo.routing import BalanceOptions, CapacityOptions, RouterOptions
from moezoo.swap import swap

__version__ = "0.1.0"

__all__ = [
    "PEER",
    "BalanceOptions",
    "CapacityOptions",
    "CarvedMoE",
    "Cost",
    "DenseFFN",
    "FastFeedForward",
    "FeedForward",
    "FeedForwardOutput",
    "HashLayer",
    "InputError",
    "MemoryPlus",
    "Method",
    "Paper",
    "ParameterGroup",
    "PersistentMemoryAttention",
    "ProductKeyMemory",
    "RouterOptions",
    "SigmaMoE",
    "SparseMoE",
    "TopKFFN",
    "UltraFastFFF",
    "register",
    "select_layers",
    "shared_values",
    "swap",
    "zoo",
]
