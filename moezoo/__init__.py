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
from moezoo.layers import mixtures as _mixtures  # noqa: F401 - it registers methods
from moezoo.layers.carved_moe import CarvedMoE
from moezoo.layers.dense import DenseFFN
from moezoo.layers.fast_feed_forward import FastFeedForward
from moezoo.layers.hash import HashLayer
from moezoo.layers.memory_plus import MemoryPlus
from moezoo.layers.peer import PEER
from moezoo.layers.persistent_memory import PersistentMemoryAttention
from moezoo.layers.product_key_memory import ProductKeyMemory
from moezoo.layers.sigma_moe import SigmaMoE
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.layers.top_k_ffn import TopKFFN
from moezoo.layers.ultra_fast_fff import UltraFastFFF
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
