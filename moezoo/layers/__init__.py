"""The zoo's members; a method is added by listing it here once."""

from moezoo.feed_forward import Method, Paper, register
from moezoo.layers.dense import DenseFFN

register(
    Method(
        "dense_mlp",
        DenseFFN,
        Paper("Vaswani et al.", 2017, "Attention Is All You Need", "1706.03762"),
        {"gated": False, "activation": "relu"},
    ),
    Method(
        "dense_glu",
        DenseFFN,
        Paper("Shazeer", 2020, "GLU Variants Improve Transformer", "2002.05202"),
    ),
)

__all__ = ["DenseFFN"]
