"""The loss of a language model's head, from hidden states on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moezoo_kernels
from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Package,
    Peer,
    Problem,
    Setting,
    Target,
    Unavailable,
    Work,
    plain_torch,
)

LIGER = Package("liger_kernel", "pip install --no-deps liger-kernel")
CUT = Package(
    "cut_cross_entropy", "pip install --no-deps git+https://github.com/apple/ml-cross-entropy"
)


@dataclass(frozen=True)
class _Head:
    """Hidden states ``(T, D)``, the head's weight ``(V, D)``, labels ``(T,)``, and our op."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ours: Contender


def _build(setting: Setting) -> Problem:
    tokens, width, vocabulary = setting["T"], setting["d"], setting["V"]
    hidden = setting.normal(tokens, width).requires_grad_()
    weight = (setting.normal(vocabulary, width) * width**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=setting.device)
    ours = Contender(
        lambda: moezoo_kernels.linear_cross_entropy(hidden, weight, labels).loss,
        {"hidden": hidden, "weight": weight},
        constants=(labels,),
    )
    flops = 2.0 * tokens * weight.numel()
    given = hidden.nbytes + weight.nbytes
    work, step_work = Work(flops, given, 4), Work(3 * flops, given, given)
    return Problem(ours, work, step_work, _Head(hidden, weight, labels, ours))


def _cross_entropy(parts: _Head) -> Contender:
    return Contender(
        lambda: F.cross_entropy(F.linear(parts.hidden, parts.weight).float(), parts.labels),
        parts.ours.operands,
        constants=(parts.labels,),
    )


def _chunked(parts: _Head) -> Contender:
    """Torch's own, from 2.13 on: gradients in the forward, too."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("not installed; pip install 'torch>=2.13'")
    options = torch.nn.LinearCrossEntropyOptions()
    return Contender(
        lambda: F.linear_cross_entropy(parts.hidden, parts.weight, parts.labels, options=options),
        parts.ours.operands,
        constants=(parts.labels,),
    )


def _plain(parts: _Head) -> Contender:
    return plain_torch(parts.ours, "linear_cross_entropy")


def _liger(parts: _Head) -> Contender:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Any = LigerFusedLinearCrossEntropyLoss()
    return Contender(
        lambda: loss(parts.weight, parts.hidden, parts.labels),
        parts.ours.operands,
        constants=(parts.labels,),
    )


def _cut(parts: _Head) -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    return Contender(
        lambda: linear_cross_entropy(parts.hidden, parts.weight, parts.labels),
        parts.ours.operands,
        constants=(parts.labels,),
    )


_QUICK = {"T": 24, "d": 16, "V": 50}
_TARGET = Target(step=1.0, memory=0.6)


def _case(name: str, tokens: int, width: int, vocabulary: int, **changes: Any) -> Case:
    others = {
        "F.cross_entropy": Peer(_cross_entropy, target=_TARGET),
        "F.linear_cross_entropy": Peer(_chunked, target=Target(step=1.0)),
    }
    if changes.get("device") == "cuda":
        others |= {
            "liger": Peer(_liger, LIGER, target=Target(step=1.0)),
            "cut-cross-entropy": Peer(_cut, CUT, target=Target(step=1.0)),
        }
    return Case(
        name,
        "op",
        "head and loss",
        {"T": tokens, "d": width, "V": vocabulary},
        _QUICK,
        _build,
        {**others, PLAIN: Peer(_plain)},
        ops=("linear_cross_entropy",),
        **changes,
    )


CASES = [
    _case("head-32000", 2048, 512, 32000),
    _case("head-4096", 4096, 256, 4096),
    _case("head-32000-bf16", 2048, 512, 32000, dtype=torch.bfloat16),
    _case("head-128256", 8192, 4096, 128256, dtype=torch.bfloat16, device="cuda"),
]
