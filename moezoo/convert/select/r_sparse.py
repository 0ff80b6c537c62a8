"""A matrix read by the strongest inputs, and at low rank by the others (R-Sparse).

Zhang et al. 2025, arXiv:2504.19449, section 3.3: of ``y = W x``, inputs with ``|x_j| ||W[:, j]|| >
t`` pass the matrix itself; the others pass the best approximation of W of rank R.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.errors import InputError, check_number
from moezoo_kernels.linear import linear


@dataclass(frozen=True)
class Split:
    """How a matrix's budget is divided.

    Attributes:
        channels: inputs that pass the matrix itself, on average.
        rank: R of the factors that the others pass; 0 drops them.
    """

    channels: int
    rank: int


def split_budget(outputs: int, inputs: int, sparsity: float, share: float) -> Split:
    """Divide what a sparsity leaves of a matrix between its own inputs and low-rank factors.

    Args:
        outputs: O.
        inputs: I.
        sparsity: s, the share of the matrix's numbers that a token does not read, in [0, 1).
        share: α, how much of the rest goes to inputs; ``channels = (1 - s) α I`` and
            ``rank = (1 - s) (1 - α) I O / (I + O)``.

    Raises:
        InputError: a number is out of range, or nothing is left.
    """
    check_number("share", share, maximum=1.0)
    if check_number("sparsity", sparsity, maximum=1.0) == 1.0:
        raise InputError("sparsity: 1 leaves nothing of a matrix; give less")
    left = 1.0 - sparsity
    channels = round(left * share * inputs)
    rank = int(left * (1.0 - share) * inputs * outputs / (inputs + outputs))
    if channels + rank == 0:
        raise InputError(f"sparsity: {sparsity:g} leaves nothing of a matrix; give less")
    return Split(channels, min(rank, inputs, outputs))


def channel_thresholds(weight_OI: Tensor, x_TI: Tensor, channels: int) -> Tensor:
    """Return the threshold on ``|x_j|`` of each input, ``(I,)`` fp32, that so many pass.

    The scores ``|x_j| ||W[:, j]||`` of all tokens have one quantile t; an input's threshold is
    ``t / ||W[:, j]||``. Inputs of a column of zeros never pass.

    Args:
        weight_OI: W.
        x_TI: calibration inputs, in the dtype of inference.
        channels: inputs that pass, on average over tokens; all of them for a threshold of zero.
    """
    inputs = weight_OI.shape[1]
    lengths_I = weight_OI.float().norm(dim=0)
    if channels >= inputs:
        return torch.zeros_like(lengths_I)
    scores = (x_TI.float().abs() * lengths_I).flatten()
    dropped = round(len(scores) * (1 - channels / inputs))
    most = torch.finfo(torch.float32).max  # a checkpoint holds finite numbers only
    limit = scores.kthvalue(max(dropped, 1)).values if dropped else scores.new_zeros(())
    return (limit / lengths_I).nan_to_num(nan=most, posinf=most)


def low_rank(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of W's best approximation of rank R, ``(O, R)`` and ``(R, I)``."""
    u, s, v = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    root = s[:rank].sqrt()
    left = u[:, :rank] * root
    right = root[:, None] * v[:rank]
    return left.to(weight_OI.dtype), right.to(weight_OI.dtype)


def r_sparse_linear(
    x_TI: Tensor, weight_OI: Tensor, limits_I: Tensor, factors: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return ``W (x·keep) + U V (x·(1 - keep))``, with ``keep = |x_j| > limit_j``, ``(T, O)``.

    Args:
        x_TI: inputs.
        weight_OI: W.
        limits_I: of :func:`channel_thresholds`.
        factors: U ``(O, R)`` and V ``(R, I)``; None drops the other inputs.
    """
    keep_TI = x_TI.abs() > limits_I
    output_TO = linear(x_TI.where(keep_TI, 0.0), weight_OI)
    if factors is None:
        return output_TO
    left_OR, right_RI = factors
    return output_TO + linear(linear(x_TI.where(~keep_TI, 0.0), right_RI), left_OR)
