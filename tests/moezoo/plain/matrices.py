"""Projections that are no plain matrix: factors, masks, and how their weights learn.

Every function reads a projection's tensors by name, and its options as ``config()`` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from plain.parts import Answer, Call, Options, Weights, activation, gated_unit
from torch import Tensor


def block_of_matrices(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """Apply a block whose projections are such; all tokens at once, as gradients are sampled."""
    rows = hidden.reshape(-1, hidden.shape[-1])

    def project(name: str, read: Tensor) -> Tensor:
        parts = {k.split(".", 1)[1]: t for k, t in weights.items() if k.startswith(f"{name}.")}
        made = KINDS[options["matrices"]["kind"]](parts, options["matrices"], read, call.training)
        return made + parts["bias"] if "bias" in parts else made

    inner = project("up_proj", rows)
    if options["gated"]:
        gate = project("gate_proj", rows)
        inner = gated_unit(options["activation"], gate, inner, options["glu"])
    else:
        inner = activation(options["activation"], inner)
    output = project("down_proj", inner).reshape(hidden.shape)
    losses = {}
    if call.training and options["matrices"].get("decay"):
        names = ["up_proj", "down_proj", *(["gate_proj"] if options["gated"] else [])]
        total = sum(
            value * value
            for name in names
            for row, kept in zip(
                weights[f"{name}.latent"], weights[f"{name}.mask"].tolist(), strict=True
            )
            for value, is_kept in zip(row, kept, strict=True)
            if not is_kept
        )
        losses["masked_decay"] = options["matrices"]["decay"] * total / 2
    return Answer(output, losses)


def guided(parts: Weights, options: Options, read: Tensor, made: Tensor, training: bool) -> Tensor:
    """Mix in the guide's part (arXiv:2406.16450, section 3.3)."""
    if not training or not options["guide"]:
        return made
    share = (1 + math.cos(math.pi * min(float(parts["progress"]) / options["guide"], 1.0))) / 2
    return share * (read @ parts["guide"].T) + (1 - share) * made


def low_rank(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    return guided(parts, options, read, product(parts, read), training)


def blocks_of(factor: Tensor, read: Tensor) -> list[list[Tensor]]:
    """Return what every block makes of its part: by block, by number, ``(T,)``."""
    width = factor.shape[2]
    return [
        [read[:, k * width : (k + 1) * width] @ row for row in block]
        for k, block in enumerate(factor)
    ]


def block_dense(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    middle = [value for made in blocks_of(parts["first"], read) for value in made]
    made = torch.stack(middle, -1) @ parts["second"].T
    return guided(parts, options, read, made, training)


def block_shuffle(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    made = read
    for name in ("first", "second"):
        by_block = blocks_of(parts[name], made)
        made = torch.stack([block[n] for n in range(len(by_block[0])) for block in by_block], -1)
    return guided(parts, options, read, made, training)


class Through(torch.autograd.Function):
    """Other values, whose gradient is that of the weights."""

    @staticmethod
    def forward(ctx, latent, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Sampled(torch.autograd.Function):
    """A product whose weights' gradient is made of two of four tokens' gradients."""

    @staticmethod
    def forward(ctx, read, matrix, starts):
        ctx.save_for_backward(read, matrix, starts)
        return read @ matrix.T

    @staticmethod
    def backward(ctx, gradient):
        read, matrix, starts = ctx.saved_tensors
        drawn = gradient.clone()
        for group, row in enumerate(starts.tolist()):
            for output, start in enumerate(row):
                four = slice(4 * group, 4 * group + 4)
                values = two_of_four(gradient[four, output].tolist(), start)
                drawn[four, output] = torch.tensor(values, dtype=gradient.dtype)
        return gradient @ matrix, drawn.T @ read, None


def two_of_four(values: list[float], start: float) -> list[float]:
    """Keep two by systematic sampling, each divided by its probability (arXiv:2203.10991)."""
    certain: set[int] = set()
    while True:
        others = sum(abs(v) for i, v in enumerate(values) if i not in certain)
        factor = (2 - len(certain)) / others if others else 0.0
        more = {i for i, v in enumerate(values) if i not in certain and factor * abs(v) > 1}
        if not more:
            break
        certain |= more
    kept, end = [], 0.0
    for i, value in enumerate(values):
        share = 1.0 if i in certain else factor * abs(value)
        begin, end = end, end + share
        hit = any(begin <= start + k < end for k in range(2))
        kept.append(value / share if hit else 0.0)
    return kept


def multiply(read: Tensor, matrix: Tensor, sampled: bool) -> Tensor:
    starts = torch.rand(len(read) // 4, len(matrix), dtype=torch.float64) if sampled else None
    return read @ matrix.T if starts is None else Sampled.apply(read, matrix, starts)


def n_m(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    """Zero what is not kept, or let a part of it through (arXiv:2402.04744)."""
    leaks = 0.0
    if options["leak"]:
        span = options["end"] - options["start"]
        done = min(max((float(parts["progress"]) - options["start"]) / span, 0.0), 1.0)
        leaks = 1 - done if options["leak"] == "linear" else math.exp(-5 * done) * (done < 1)
    values = torch.where(parts["mask"], parts["latent"], leaks * parts["latent"])
    return multiply(read, Through.apply(parts["latent"], values), False)


def transposable(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    values = torch.where(parts["mask"], parts["latent"], 0.0)
    sampled = training and options["sampled"]
    return multiply(read, Through.apply(parts["latent"], values), sampled)


def soft_n_m(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    """Subtract the (N+1)-th largest magnitude of every M (arXiv:2409.09099)."""
    rows, scale = [], float(parts["scale"])
    for row in parts["latent"].tolist():
        made = []
        for begin in range(0, len(row), options["m"]):
            group = row[begin : begin + options["m"]]
            limit = sorted((abs(v) for v in group), reverse=True)[options["n"]]
            made += [scale * math.copysign(max(abs(v) - limit, 0.0), v) for v in group]
        rows.append(made)
    values = torch.tensor(rows, dtype=torch.float64)
    matrix = Through.apply(parts["latent"], values)
    return multiply(read, matrix, training and options["sampled"])


def pruned(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    values = torch.where(parts["mask"], parts["latent"], 0.0)
    if options["growth"] and bool(parts["listening"]):
        values = Through.apply(parts["latent"], values)
    return read @ values.T


def nested(parts: Weights, name: str) -> Weights:
    """Return the tensors of a matrix that is a part of one."""
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in parts.items() if key.startswith(start)}


def product(parts: Weights, read: Tensor) -> Tensor:
    """Add up a product's terms of rank one."""
    pairs = zip(parts["first"], parts["second"].T, strict=True)
    return sum((read @ row)[:, None] * column for row, column in pairs)


def pixelfly(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    """Return the matrix whose rows of blocks read their own part and one across each stride.

    Pixelated Butterfly, arXiv:2112.00029.
    """
    width = read.shape[1] // options["size"]
    made = []
    for place, rows in enumerate(parts["blocks"]):
        places = [place, *(place ^ 2**factor for factor in range(options["factors"]))]
        seen = torch.cat([read[:, p * width : (p + 1) * width] for p in places], dim=1)
        made += [seen @ row for row in rows]
    share = parts["mix"] if options["mix"] == "learned" else 0.5
    return share * torch.stack(made, -1) + (1 - share) * product(parts, read)


def factorized(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    middle = pruned(nested(parts, "first"), options, read, training)
    return pruned(nested(parts, "second"), options, middle, training)


def doped(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    sparse = pruned(nested(parts, "sparse"), options, read, training)
    return sparse + product(parts, read)


def parallel(parts: Weights, options: Options, read: Tensor, training: bool) -> Tensor:
    """Apply each branch behind the units to the sum of all of them (arXiv:2303.11525, section 2).

    The matrices before them are pruned, row by row, with their branches one under the other.
    """
    if "branches.0.latent" not in parts:
        return pruned(parts, options, read, training)
    count = sum(name.endswith(".latent") for name in parts)
    width = read.shape[1] // count
    total = sum(read[:, j * width : (j + 1) * width] for j in range(count))
    each = [nested(parts, f"branches.{j}") for j in range(count)]
    return sum(pruned(branch, options, total, training) for branch in each)


KINDS: dict[str, Callable[[Weights, Options, Tensor, bool], Tensor]] = {
    "low_rank": low_rank,
    "block_dense": block_dense,
    "block_shuffle": block_shuffle,
    "n_m": n_m,
    "transposable": transposable,
    "soft_n_m": soft_n_m,
    "pruned": pruned,
    "pixelfly": pixelfly,
    "factorized": factorized,
    "doped": doped,
    "parallel": parallel,
}
