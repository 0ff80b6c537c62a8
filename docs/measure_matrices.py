"""Prints the tables of training times in matrices.md: CPU time of blocks, relative to a plain one.

``python docs/measure_matrices.py``. All methods take turns in one process on one thread, so that
what else the machine does meets all of them. Of a method's turns the median counts, and in the
table of factors the shortest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

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

TOKENS, TURNS = 512, 25
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


FACTORS = ("plain", "`low_rank`", "`block_dense`", "`block_shuffle`", "`pixelfly` of size 16")

Times = dict[str, dict[str, list[float]]]


def works(width: int, options: Matrices | None) -> dict[str, Callable[[], object]]:
    """Return what is timed of a block: a training step, ``step()``, and evaluation."""
    torch.manual_seed(0)
    trained, evaluated = (DenseFFN(width, matrices=options) for _ in range(2))
    evaluated.eval()
    x = torch.randn(TOKENS, width, requires_grad=True)
    slope = torch.randn(TOKENS, width)

    def train() -> None:
        output = trained(x)
        loss = sum(output.losses.values(), (output.hidden * slope).sum())
        loss.backward()

    def evaluate() -> None:
        with torch.no_grad():
            evaluated(x)

    return {"training": train, "`step()`": lambda: trained.step(0.3), "evaluation": evaluate}


def measure(width: int, names: Iterable[str]) -> Times:
    """Return the milliseconds of the turns of each method's works."""
    blocks = {name: works(width, METHODS[name]) for name in names}
    times: Times = {name: {work: [] for work in each} for name, each in blocks.items()}
    for turn in range(TURNS + 2):
        for name, each in blocks.items():
            for work, function in each.items():
                begin = time.thread_time()
                function()
                if turn > 1:
                    times[name][work].append(1e3 * (time.thread_time() - begin))
    return times


def print_all(times: Times) -> None:
    """Print what each method's works take of the plain block's."""
    found = {
        name: {work: statistics.median(turns) for work, turns in each.items()}
        for name, each in times.items()
    }
    plain = found.pop("plain")
    print(f"plain: {plain['training']:.1f} ms training, {plain['evaluation']:.1f} ms evaluation\n")
    print("| method | training | `step()` | evaluation |\n|---|---|---|---|")
    for name, each in found.items():
        stepping = each["`step()`"] / plain["training"]
        shares = [each[work] / plain[work] for work in ("training", "evaluation")]
        print(f"| {name} | {shares[0]:.2f} | {stepping:.2f} | {shares[1]:.2f} |")


def print_factors(widths: dict[int, Times]) -> None:
    """Print what a training step takes of the plain block's, by width."""
    print(f"\n| method | {' | '.join(f'd_model {width}' for width in widths)} |")
    print("|---" * (1 + len(widths)) + "|")
    for name in FACTORS[1:]:
        shares = [
            min(times[name]["training"]) / min(times["plain"]["training"])
            for times in widths.values()
        ]
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.empty(1 << 23).fill_(0.0)  # as logits do: the allocator keeps memory from here on
    print_all(measure(512, METHODS))
    print_factors({width: measure(width, FACTORS) for width in (512, 1024)})
