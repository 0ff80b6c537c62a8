"""moezoo: feed-forward replacements for transformers behind one layer API."""

from moezoo.errors import InputError
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
    DenseFFN,
    FastFeedForward,
    PersistentMemoryAttention,
    SparseMoE,
    UltraFastFFF,
)
from moezoo.routing import BalanceOptions, CapacityOptions, RouterOptions
from moezoo.swap import swap

__version__ = "0.1.0"

__all__ = [
    "BalanceOptions",
    "CapacityOptions",
    "Cost",
    "DenseFFN",
    "FastFeedForward",
    "FeedForward",
    "FeedForwardOutput",
    "InputError",
    "Method",
    "Paper",
    "ParameterGroup",
    "PersistentMemoryAttention",
    "RouterOptions",
    "SparseMoE",
    "UltraFastFFF",
    "register",
    "select_layers",
    "swap",
    "zoo",
]
