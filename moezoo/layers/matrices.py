"""Methods of dense blocks whose projections are factored or sparse: `moezoo.matrices`."""

from __future__ import annotations

from moezoo.feed_forward import Method, Paper, register
from moezoo.layers.dense import DenseFFN
from moezoo.matrices import (
    NM,
    BlockDense,
    BlockShuffle,
    LowRank,
    Matrices,
    Pixelfly,
    Pruned,
    SoftNM,
    Transposable,
)

_STRUCTURED = Paper(
    "Wei et al.",
    2024,
    "Building on Efficient Foundations: Effective Training of LLMs with Structured Feedforward "
    "Layers",
    "2406.16450",
)
_GRADIENT_FLOW = Paper(
    "Bambhaniya et al.",
    2024,
    "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
    "2402.04744",
)


def _method(name: str, paper: Paper, matrices: Matrices) -> Method:
    return Method(name, DenseFFN, paper, {"matrices": matrices})


register(
    _method("low_rank", _STRUCTURED, LowRank()),
    _method("block_dense", _STRUCTURED, BlockDense()),
    _method("block_shuffle", _STRUCTURED, BlockShuffle()),
    _method(
        "pixelfly",
        Paper(
            "Dao et al.",
            2021,
            "Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network Models",
            "2112.00029",
        ),
        Pixelfly(),
    ),
    _method(
        "sr_ste",
        Paper(
            "Zhou et al.",
            2021,
            "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
            "2102.04010",
        ),
        NM(decay=2e-4),
    ),
    _method("sdgf", _GRADIENT_FLOW, NM(stages="step")),
    _method("mdgf", _GRADIENT_FLOW, NM(leak="linear", start=0.1, end=0.6)),
    _method(
        "fst",
        Paper(
            "Hu et al.",
            2024,
            "Accelerating Transformer Pre-training with 2:4 Sparsity",
            "2404.01847",
        ),
        Transposable(),
    ),
    _method(
        "s_ste",
        Paper(
            "Hu et al.",
            2024,
            "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training",
            "2409.09099",
        ),
        SoftNM(),
    ),
    _method(
        "spdf",
        Paper(
            "Thangarasa et al.",
            2023,
            "SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models",
            "2303.10464",
        ),
        Pruned(sparsity=0.75),
    ),
    _method(
        "rigl",
        Paper("Evci et al.", 2019, "Rigging the Lottery: Making All Tickets Winners", "1911.11134"),
        Pruned(sparsity=0.8, growth=0.3),
    ),
    _method(
        "gradual_pruning",
        Paper(
            "Zhu & Gupta",
            2017,
            "To prune, or not to prune: exploring the efficacy of pruning for model compression",
            "1710.01878",
        ),
        Pruned(sparsity=0.8, start=0.25, end=0.75, every=10),
    ),
    _method(
        "blast",
        Paper(
            "Okanovic et al.",
            2025,
            "BLaST: High Performance Inference and Pretraining using BLock Sparse Transformers",
            "2507.03117",
        ),
        Pruned(sparsity=0.8, block=8, end=0.75, growth=0.1),
    ),
)
