"""The tables of ``docs/sparse_training.md``: validation loss, density, and tokens per second.

``python docs/sparse_training/speed.py runs/drelu runs/l1_reglu`` reads what `moezoo fit` wrote, and
continues a prompt greedily with each model, by blocks that skip what zeros would multiply and by
the same blocks whole. ``--shape 2048 8192`` measures one block of that size instead, with random
weights, at several densities.

Times are of the CPU, of one thread, each way in turn; the table has medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo import DenseFFN
from moezoo.command.tables import markdown_lines
from moezoo_kernels import token_step
from moezoo_kernels.selective_mlp import NO_THRESHOLDS
from moezoo_kernels.token_step import Linear, Norm
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.decoding import native_steps
from moezoo_models.decoding.decoder import Decoder

_ALL = 1 << 30  # tokens that a text would need before zeros are skipped


def seconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median CPU time of each way, taken in turn after a first call of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            start = time.thread_time()
            run()
            if turn:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def decode(model: Any, ids: Tensor, new: int, skip: bool) -> tuple[list[int], float]:
    """Continue a prompt greedily; return the tokens, and the CPU time of a step."""
    least = native_steps._FEWEST_SKIPPING
    native_steps._FEWEST_SKIPPING = 0 if skip else _ALL
    try:
        decoder = Decoder(model, ids, torch.ones_like(ids), new)
    finally:
        native_steps._FEWEST_SKIPPING = least
    token = decoder.prefill().argmax(-1)
    written = [int(token)]
    start = time.thread_time()
    for _ in range(new - 1):
        token = decoder.step(token).argmax(-1)
        written.append(int(token))
    return written, (time.thread_time() - start) / (new - 1)


@torch.no_grad()
def density(model: Any, ids: Tensor) -> float:
    """Return the mean share of hidden values that are not zero, over all dense blocks."""
    shares: list[float] = []
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, given: shares.append(float((given[0] != 0).float().mean()))
        )
        for block in model.model.blocks()
        if isinstance(block.mlp, DenseFFN)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return statistics.mean(shares)


def row_of(run: Path, new: int, rounds: int) -> list[str]:
    """Return a line of the table for a run's directory."""
    model, tokenizer = load_checkpoint(run / "model")
    assert tokenizer is not None
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    ids = torch.tensor([tokenizer.encode("The king and all his men were")])
    times: dict[bool, list[float]] = {True: [], False: []}
    texts = {}
    for _ in range(rounds):
        for skip in times:
            texts[skip], taken = decode(model, ids, new, skip)
            times[skip].append(taken)
    skipping, whole = (statistics.median(times[skip]) for skip in (True, False))
    text = torch.tensor([[*ids[0].tolist(), *texts[False]]])
    return [
        run.name,
        f"{report['val_loss']:.3f}",
        f"{density(model, text):.1%}",
        f"{1 / whole:,.0f}",
        f"{1 / skipping:,.0f}",
        f"{whole / skipping:.2f}",
        "yes" if texts[True] == texts[False] else "no",
    ]


@torch.no_grad()
def block_row(width: int, hidden_width: int, share: float, rounds: int) -> list[str]:
    """Return a line for one block whose gate lets a share of its neurons through."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(1, width, generator=generator)
    norm = Norm(torch.ones(width), 1e-6)
    gate, up = (
        Linear(torch.randn(hidden_width, width, generator=generator) * width**-0.5, None)
        for _ in range(2)
    )
    down = torch.randn(width, hidden_width, generator=generator) * 1e-3 * hidden_width**-0.5
    x = torch.nn.functional.rms_norm(stream, (width,), None, norm.eps)
    values = torch.nn.functional.linear(x, gate.weight)[0]
    bias = torch.full((hidden_width,), -float(values.quantile(1 - share)))
    gate = Linear(gate.weight, bias)
    hidden = stream.clone()
    whole = token_step.dense_step(hidden, norm, gate, up, Linear(down, None), "relu")
    by_columns = Linear(down.t().contiguous().t(), None)
    skipping = token_step.selective_step(hidden, norm, gate, up, by_columns, NO_THRESHOLDS, "relu")
    ways: dict[str, Callable[[], object]] = {}
    for name, step in (("whole", whole), ("skipping", skipping)):
        ways[name] = lambda step=step: (hidden.copy_(stream), step())
    found = seconds(ways, rounds)
    ratio = found["whole"] / found["skipping"]
    milliseconds = (f"{1e3 * found[name]:.1f}" for name in ("whole", "skipping"))
    return [f"{share:.0%}", *milliseconds, f"{ratio:.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one of the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--shape", nargs=2, type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.shape:
        names = ["density", ">whole, ms", ">skipping, ms", ">ratio"]
        rows = [block_row(*given.shape, share, given.rounds) for share in (0.5, 0.25, 0.1, 0.03)]
    else:
        names = ["run", ">val loss", ">density", ">tokens/s whole", ">skipping zeros", ">ratio"]
        names.append("same text")
        rows = [row_of(run, given.tokens, given.rounds) for run in given.runs]
    print("\n".join(markdown_lines(names, rows)))


if __name__ == "__main__":
    main()
