"""Linear maps without the zeros of their matrices, against the dense product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Peer,
    Problem,
    Setting,
    Target,
    Work,
    plain_torch,
)
from moezoo_kernels import sparse_linear
from moezoo_kernels.sparse_linear import BlockSparse, GroupSparse, pack_blocks, pack_groups


@dataclass(frozen=True)
class _Map:
    """A matrix with its zeros, tokens, and ours."""

    weight: Tensor
    x: Tensor
    ours: Contender


def _build(setting: Setting) -> Problem:
    tokens, width, rows = (setting[name] for name in ("T", "d", "f"))
    weight, matrix = _draw(setting, rows, width)
    x = setting.normal(tokens, width)
    ours = Contender(lambda: sparse_linear(x, matrix), {})
    read = x.nbytes + sum(tensor.nbytes for tensor in matrix.tensors if tensor is not None)
    written = tokens * rows * setting.item
    work = Work(2 * tokens * matrix.values.numel(), read, written)
    return Problem(ours, work, work, _Map(weight, x, ours))


def _draw(setting: Setting, rows: int, width: int) -> tuple[Tensor, BlockSparse | GroupSparse]:
    """Return a matrix of which every row of blocks keeps as many, or 2 of 4, and it packed."""
    weight, block = setting.normal(rows, width) * width**-0.5, setting["block"]
    if not block:
        groups = weight.view(rows, width // 4, 4)
        drawn = torch.rand(groups.shape, device=weight.device)
        weight = (groups * (drawn.argsort(-1) < 2)).view(rows, width)
        return weight, pack_groups(weight, 2, 4)
    kept = round((1 - setting["percent"] / 100) * width / block)
    drawn = torch.rand(rows // block, width // block, device=weight.device)
    blocks = drawn.argsort(-1) < max(kept, 1)
    weight = weight * blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return weight, pack_blocks(weight, block)


def _dense(parts: _Map) -> Contender:
    return Contender(lambda: F.linear(parts.x, parts.weight), {}, note="with all zeros")


def _plain(parts: _Map) -> Contender:
    return plain_torch(parts.ours, "block_sparse_linear")


def _case(name: str, block: int, percent: int, tokens: int, target: Target | None) -> Case:
    op = "block_sparse_linear" if block else "n_m_linear"
    sizes = {"T": tokens, "d": 1024, "f": 4096, "block": block, "percent": percent}
    quick = {"T": min(tokens, 7), "d": 96, "f": 160} if block else {"d": 24, "f": 40}
    return Case(
        f"sparse-linear-{name}-t{tokens}",
        "op",
        "linear map without blocks of zeros" if block else "linear map of 2 of 4 inputs",
        sizes,
        quick,
        _build,
        {"dense": Peer(_dense, target=target), PLAIN: Peer(_plain)},
        step=False,
        threads=1 if tokens == 1 else None,
        series=f"sparse-linear-{name}" if block else "",
        size="T" if block else "",
        ops=(op,),
    )


CASES = [
    *(
        _case(f"b{block}-{percent}", block, percent, tokens, Target(forward=forward))
        for block in (16, 32)
        for percent, forward in ((80, 2.5), (95, 5.0))
        for tokens in (1, 64, 2048)
    ),
    _case("2of4", 0, 50, 1, None),
]
