"""Prints the table "What it saves" of matrices.md: CPU time of blocks, relative to a plain one.

``python docs/measure_matrices.py``. All methods take turns in one process on one thread, so that
what else the machine does meets all of them; of a method's turns the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from moezoo import DenseFFN
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

WIDTH, TOKENS, TURNS = 512, 512, 25
METHODS: dict[str, Matrices | None] = {
    "plain": None,
    "`low_rank`": LowRank(),
    "`low_rank` with a guide": LowRank(guide=0.5),
    "`block_dense`": BlockDense(),
    "`block_shuffle`": BlockShuffle(),
    "`pixelfly` of size 16": Pixelfly(size=16),
    "`sr_ste`": NM(decay=2e-4),
    "`sdgf`": NM(stages="step"),
    "`mdgf`": NM(leak="linear", start=0.1, end=0.6),
    "`fst`": Transposable(),
    "`fst` with `sampled: false`": Transposable(sampled=False),
    "`s_ste`": SoftNM(),
    "`spdf`": Pruned(sparsity=0.75),
    "`rigl`": Pruned(sparsity=0.8, growth=0.3),
    "`gradual_pruning`": Pruned(sparsity=0.8, start=0.25, end=0.75, every=10),
    "`blast`": Pruned(sparsity=0.8, block=8, end=0.75, growth=0.1),
}


def works(options: Matrices | None) -> dict[str, Callable[[], object]]:
    """Return what is timed of a block: a training step, ``step()``, and evaluation."""
    torch.manual_seed(0)
    trained, evaluated = (DenseFFN(WIDTH, matrices=options) for _ in range(2))
    evaluated.eval()
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    slope = torch.randn(TOKENS, WIDTH)

    def train() -> None:
        output = trained(x)
        loss = sum(output.losses.values(), (output.hidden * slope).sum())
        loss.backward()

    def evaluate() -> None:
        with torch.no_grad():
            evaluated(x)

    return {"training": train, "`step()`": lambda: trained.step(0.3), "evaluation": evaluate}


def measure() -> dict[str, dict[str, float]]:
    """Return the milliseconds of each method's works."""
    torch.set_num_threads(1)
    blocks = {name: works(options) for name, options in METHODS.items()}
    times = {name: {work: [0.0] * 0 for work in each} for name, each in blocks.items()}
    for turn in range(TURNS + 2):
        for name, each in blocks.items():
            for work, function in each.items():
                begin = time.thread_time()
                function()
                if turn > 1:
                    times[name][work].append(1e3 * (time.thread_time() - begin))
    return {
        name: {work: statistics.median(found) for work, found in each.items()}
        for name, each in times.items()
    }


if __name__ == "__main__":
    found = measure()
    plain = found["plain"]
    print(f"plain: {plain['training']:.1f} ms training, {plain['evaluation']:.1f} ms evaluation\n")
    print("| method | training | `step()` | evaluation |\n|---|---|---|---|")
    for name, each in found.items():
        shares = (
            each["training"] / plain["training"],
            each["`step()`"] / plain["training"],
            each["evaluation"] / plain["evaluation"],
        )
        if name != "plain":
            print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
