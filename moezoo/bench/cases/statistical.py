"""Activations above the Gaussian threshold of a row, as in Spark's feed-forward block."""

from __future__ import annotations

from statistics import NormalDist

from moezoo.bench.case import PLAIN, Case, Contender, Peer, Problem, Setting, Work, plain_torch
from moezoo_kernels import statistical_top_k


def _build(setting: Setting) -> Problem:
    tokens, width, k = (setting[name] for name in ("T", "f", "k"))
    pre, up = (setting.normal(tokens, width).requires_grad_() for _ in range(2))
    quantile = NormalDist().inv_cdf(1 - k / width)
    ours = Contender(
        lambda: statistical_top_k(pre, up, quantile=quantile, activation="gelu_tanh"),
        {"pre": pre, "up": up},
    )
    # No products. The gradient is read with both inputs, and theirs are written.
    work = Work(0, 2 * pre.nbytes, pre.nbytes)
    step_work = Work(0, work.read + 3 * pre.nbytes, work.written + 2 * pre.nbytes)
    return Problem(ours, work, step_work, ours)


def _plain(ours: Contender) -> Contender:
    return plain_torch(ours, "statistical_top_k")


CASES = [
    Case(
        f"statistical-top-k-{tokens}",
        "op",
        "Gaussian threshold of gated units",
        {"T": tokens, "f": 2048, "k": 164},
        {"T": 16, "f": 48, "k": 4},
        _build,
        {PLAIN: Peer(_plain)},
        ops=("statistical_top_k",),
    )
    for tokens in (1024, 8192)
]
