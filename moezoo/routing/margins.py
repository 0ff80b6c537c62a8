"""Quantiles of margins over all tokens of an optimizer step, from a histogram per expert.

A histogram is summed over micro-batches and ranks in whole numbers, so that the sum is the same in
any order. Its bins are the fp32 numbers that share a sign, an exponent and the first four bits of
the mantissa: fine about zero, where margins are that decide, a sixteenth wide relative to the
number elsewhere, and free of any range that would have to be known beforehand.

Shapes: T tokens, E experts, H bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 1024
"""Bins H: half of them below zero."""

_HALF = NUM_BINS // 2
_MANTISSA = 4
_LEAST = -26
"""Magnitudes below 2^-26 share the bins next to zero; those from 2^6 on, the outermost."""


def margin_histogram(margins_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Count each expert's margins by bin, ``(E, H)`` int32; bins are numbered upwards.

    Args:
        margins_TE: any floating dtype; rounded to fp32.
        mask_T: true at real tokens; others are not counted.
    """
    experts = margins_TE.shape[1]
    margins_TE = margins_TE.detach().float()
    # Bits of an fp32 number, read as an integer, are in the order of the magnitudes.
    bits_TE = margins_TE.abs().contiguous().view(torch.int32)
    first = (_LEAST + 127) << _MANTISSA
    size_TE = ((bits_TE >> (23 - _MANTISSA)) - first + 1).clamp(0, _HALF - 1)
    bins_TE = torch.where(margins_TE < 0, _HALF - 1 - size_TE, _HALF + size_TE).to(torch.int64)
    slots_TE = bins_TE + NUM_BINS * torch.arange(experts, device=bins_TE.device)
    counted_TE = torch.ones_like(slots_TE, dtype=torch.int32)
    if mask_T is not None:
        counted_TE = counted_TE * mask_T.unsqueeze(-1)
    histogram = torch.zeros(experts * NUM_BINS, dtype=torch.int32, device=bins_TE.device)
    histogram.scatter_add_(0, slots_TE.reshape(-1), counted_TE.reshape(-1))
    return histogram.reshape(experts, NUM_BINS)


def upper_quantile(histogram_EH: Tensor, share: float) -> Tensor:
    """Return the number that a share of each expert's margins exceed, ``(E,)`` fp64.

    Linear within a bin, so off by no more than the bin is wide; zero without any margin.

    Args:
        histogram_EH: from :func:`margin_histogram`, summed as needed.
        share: above 0 and below 1.
    """
    counts_EH = histogram_EH.to(_widest(histogram_EH.device))
    wanted_E1 = share * counts_EH.sum(dim=-1, keepdim=True)
    above_EH = counts_EH.flip(-1).cumsum(-1).flip(-1)  # in the bin and above it
    place_E1 = (above_EH >= wanted_E1).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    inside_E1 = counts_EH.gather(1, place_E1)
    missing_E1 = wanted_E1 - (above_EH.gather(1, place_E1) - inside_E1)
    low_H, high_H = bin_edges(histogram_EH.device)
    low_E1, high_E1 = low_H[place_E1], high_H[place_E1]
    quantile_E1 = high_E1 - (high_E1 - low_E1) * missing_E1 / inside_E1.clamp(min=1)
    return torch.where(wanted_E1 > 0, quantile_E1, 0.0).squeeze(-1)


def bin_edges(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the lower and upper edge of every bin, ``(H,)`` fp64 each.

    Those next to zero are 0 to 0, so that margins that are all zero have a quantile of zero.
    """
    steps = torch.arange(_HALF, dtype=_widest(device), device=device)
    exponent, fraction = (steps / 2**_MANTISSA).floor(), steps.remainder(2**_MANTISSA)
    at = (1 + fraction / 2**_MANTISSA) * 2.0 ** (exponent + _LEAST)
    zero = at.new_zeros(1)
    low, high = torch.cat([zero, at[:-1]]), torch.cat([zero, at[1:]])
    return torch.cat([-high.flip(0), low]), torch.cat([-low.flip(0), high])


def _widest(device: torch.device | None) -> torch.dtype:
    return torch.float32 if device is not None and device.type == "mps" else torch.float64
