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
from moezoo.layers import DenseFFN

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "DenseFFN",
    "FeedForward",
    "FeedForwardOutput",
    "InputError",
    "Method",
    "Paper",
    "ParameterGroup",
    "register",
    "select_layers",
    "zoo",
]
