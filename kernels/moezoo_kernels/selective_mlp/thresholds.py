"""What a selective block leaves out: numbers whose size is no larger than a threshold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels.dtypes import at_least_fp32


class Thresholds(NamedTuple):
    """The sizes that numbers must exceed to be used, fp32; None keeps all.

    Of a block without a gate, ``input`` holds for up's input, ``gate`` and ``hidden`` for the
    activations, and ``up_input`` is None.

    Attributes:
        input: ``(D,)``, of the inputs of the first matrix.
        up_input: ``(D,)``, of the inputs of up, beside a gate.
        gate: ``(M,)``, of ``act(gate)``: whether a neuron goes on.
        hidden: ``(M,)``, of what down reads.
    """

    input: Tensor | None = None
    up_input: Tensor | None = None
    gate: Tensor | None = None
    hidden: Tensor | None = None


NO_THRESHOLDS = Thresholds()


def keeps(values: Tensor, thresholds: Tensor | None, dense: Tensor | None) -> Tensor | None:
    """Return which numbers are used, ``(T, K)`` bool; None for all. A NaN is, so that it is seen.

    Args:
        values: ``(T, K)``.
        thresholds: ``(K,)`` or None.
        dense: ``(T,)`` bool, tokens that keep everything; None if there are none.
    """
    if thresholds is None:
        return None
    passes = (at_least_fp32(values.detach()).abs() <= thresholds).logical_not()
    return passes if dense is None else passes | dense.unsqueeze(1)


def count_kept(kept: Tensor | None, values: Tensor) -> Tensor:
    """Return how many numbers of each token are used, ``(T,)`` int64.

    Args:
        kept: what :func:`keeps` returned.
        values: ``(T, K)``, what it was given.
    """
    if kept is not None:
        return kept.sum(1)
    return values.new_full((values.shape[0],), values.shape[1], dtype=torch.int64)
