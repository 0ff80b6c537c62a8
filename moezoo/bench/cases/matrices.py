"""Training steps of blocks whose matrices are factors, against the dense block's share of FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moezoo.bench.case import Case, Contender, Peer, Problem, Setting, Target, Work
from moezoo.layers.dense import DenseFFN
from moezoo.matrices import BlockDense, BlockShuffle, LowRank, Matrices, Pixelfly, shuffles
from moezoo.matrices.factored import BlockShuffleMatrix

_BEYOND = 1.15
"""Times its share of the dense block's FLOPs that a step may take."""


@dataclass(frozen=True)
class _Block:
    """A block, its tokens, and ours."""

    layer: DenseFFN
    x: Tensor
    ours: Contender


def _build(setting: Setting, options: Matrices) -> Problem:
    tokens, width = setting["T"], setting["d"]
    layer = DenseFFN(width, matrices=options).to(setting.device, setting.dtype)
    x = setting.normal(tokens, width).requires_grad_()
    ours = Contender(lambda: layer(x).hidden, {"x": x, **dict(layer.named_parameters())})
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    flops = float(tokens * layer.cost().flops_per_token)
    work = Work(flops, weights + x.nbytes, x.nbytes)
    step = Work(3 * flops, 2 * (weights + x.nbytes), weights + 2 * x.nbytes)
    return Problem(ours, work, step, _Block(layer, x, ours))


def _dense(parts: _Block) -> Contender:
    layer = parts.layer
    block = DenseFFN(layer.d_model, layer.d_ff).to(parts.x.device, parts.x.dtype)
    operands = {"x": parts.x, **dict(block.named_parameters())}
    return Contender(lambda: block(parts.x).hidden, operands, note="plain matrices")


def _batched(parts: _Block) -> Contender:
    """Multiply by batches, with a copy for each shuffle, as a GPU does."""
    layer, x = parts.layer, parts.x
    gate, up, down = layer.gate_proj, layer.up_proj, layer.down_proj
    assert isinstance(gate, BlockShuffleMatrix)
    assert isinstance(up, BlockShuffleMatrix)
    assert isinstance(down, BlockShuffleMatrix)

    def forward() -> Tensor:
        inner = shuffles.plain_unit(x, gate.factors, up.factors, layer.activation, layer.glu)
        return shuffles.plain(inner, down.factors)

    return Contender(forward, parts.ours.operands, note="torch.bmm, and copies")


def _case(name: str, options: Matrices, share: float | None, width: int) -> Case:
    target = None if share is None else Target(step=1 / (_BEYOND * share))
    peers = {"dense": Peer(_dense, same=False, target=target)}
    if isinstance(options, BlockShuffle):
        peers["batched"] = Peer(_batched)
    return Case(
        f"{name}-{width}",
        "layer",
        f"block of {name.replace('-', ' ')} matrices",
        {"T": 512, "d": width},
        {"T": 24, "d": 48},
        partial(_build, options=options),
        peers,
        threads=1,
    )


# Shares of the FLOPs at the default width of a gated block, 8/3 d.
CASES = [
    _case(name, options, share, width)
    for width in (512, 1024)
    for name, options, share in (
        ("low-rank", LowRank(), 0.344),
        ("block-dense", BlockDense(), 0.234),
        ("block-shuffle", BlockShuffle(), 0.344),
        ("pixelfly", Pixelfly(), None),
    )
]
