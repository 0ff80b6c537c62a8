"""A token through a block that skips what is small, against the dense block and masked products."""

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
from moezoo.bench.inputs import decided
from moezoo_kernels import selective_mlp
from moezoo_kernels.layouts import column_major
from moezoo_kernels.selective_mlp import NO_THRESHOLDS, Thresholds, counted

_DROPPED = (0.25, 0.25, 0.6)
"""Shares of inputs, gates and hidden values that thresholds drop."""

_MARGIN = 1e-6  # of the largest number, beyond which rounding decides nothing


@dataclass(frozen=True)
class _Block:
    """Matrices gate, up and down, tokens and thresholds, and how the op is called."""

    weights: tuple[Tensor, Tensor, Tensor]
    x: Tensor
    thresholds: Thresholds
    ours: Contender


def _build(setting: Setting) -> Problem:
    tokens, width, hidden = (setting[name] for name in ("T", "d", "f"))
    gate, up = (setting.normal(hidden, width) * width**-0.5 for _ in range(2))
    down = setting.normal(width, hidden) * hidden**-0.5
    thresholds = _quantiles(setting.normal(256, width), gate, up)
    x = decided(
        lambda count: setting.normal(count, width),
        lambda drawn: _margins(drawn, gate, up, thresholds),
        tokens,
    )
    laid = (column_major(gate), up, column_major(down))
    ours = Contender(lambda: selective_mlp(x, *laid, thresholds), {})
    counts = counted(x, *laid, thresholds)[1]
    of_input, of_up, of_gate, of_hidden = counts.double().unbind(1)
    products = of_input * hidden + of_gate * of_up + of_hidden * width
    # What any token keeps is read; of up whole rows.
    most = counts.max(0).values.tolist()
    read = (most[0] * hidden + most[2] * width + most[3] * width) * setting.item
    work = Work(2 * float(products.sum()), read + x.nbytes, x.nbytes)
    return Problem(ours, work, work, _Block((gate, up, down), x, thresholds, ours))


def _quantiles(x: Tensor, gate: Tensor, up: Tensor) -> Thresholds:
    """Return thresholds, the same for all channels, that drop certain shares of some tokens."""

    def drop(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
        sizes = values.abs().flatten()
        least = sizes.kthvalue(max(1, round(share * len(sizes)))).values
        return values.where(values.abs() > least, 0.0), least.expand(values.shape[1]).contiguous()

    x, gate, up = x.float(), gate.float(), up.float()
    kept, of_input = drop(x, _DROPPED[0])
    inner, of_gate = drop(F.silu(kept @ gate.t()), _DROPPED[1])
    _, of_hidden = drop(inner * (kept @ up.t()), _DROPPED[2])
    return Thresholds(of_input, of_input, of_gate, of_hidden)


def _margins(x: Tensor, gate: Tensor, up: Tensor, thresholds: Thresholds) -> Tensor:
    """Return how far each token's numbers are from thresholds, beyond what rounding moves."""
    x = x.float()
    least = thresholds.input
    assert least is not None
    assert thresholds.gate is not None
    assert thresholds.hidden is not None
    kept = x.where(x.abs() > least, 0.0)
    inner = F.silu(kept @ gate.float().t())
    hidden = inner.where(inner.abs() > thresholds.gate, 0.0) * (kept @ up.float().t())
    clear = [
        (values.abs() - limit).abs().amin(1) > _MARGIN * values.abs().amax(1)
        for values, limit in ((inner, thresholds.gate), (hidden, thresholds.hidden))
    ]
    return torch.stack(clear).all(0).float()


def _dense(parts: _Block) -> Contender:
    """The same matrices, row by row, with nothing left out."""
    gate, up, down = parts.weights
    x = parts.x
    return Contender(
        lambda: selective_mlp(x, gate, up, down, NO_THRESHOLDS), {}, note="by the same op"
    )


def _linear(parts: _Block) -> Contender:
    """The dense block by torch's products."""
    gate, up, down = parts.weights
    x = parts.x
    return Contender(
        lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
        {},
        note="by torch's products",
    )


def _plain(parts: _Block) -> Contender:
    return plain_torch(parts.ours, "selective_mlp")


def _case(name: str, width: int, hidden: int, target: Target | None) -> Case:
    return Case(
        f"selective-mlp-{name}",
        "op",
        "selective block, one token",
        {"T": 1, "d": width, "f": hidden},
        {"T": 2, "d": 24, "f": 40},
        _build,
        {
            "dense": Peer(_dense, same=False, target=target),
            "dense, torch": Peer(_linear, same=False, target=target),
            PLAIN: Peer(_plain),
        },
        step=False,
        threads=1,
        ops=("selective_mlp",),
    )


# A layer of SmolLM2-135M may stay in a machine's caches, where nothing is saved; one of Llama 3.2's
# smallest does not.
CASES = [
    _case("576", 576, 1536, None),
    _case("2048", 2048, 8192, Target(forward=1.45)),
]
