"""Neurons chosen once, by the prompt, for all that is generated after it.

GRIFFIN (Dong et al. 2024, arXiv:2404.01365, section 4.2): each prompt token's hidden activations
are brought to length one; a neuron's statistic is the length of its column; the neurons with the
largest are kept. The choice belongs to a sequence: it is no property of a checkpoint.

Shapes: S tokens of a prompt, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.errors import InputError, check_number


def kept_count(width: int, share: float) -> int:
    """Return how many of ``width`` neurons a share keeps, rounded, at least one.

    Raises:
        InputError: the share is not in (0, 1].
    """
    if not check_number("griffin", share, maximum=1.0):
        raise InputError("griffin: 0 keeps no neuron; give the share to keep, such as 0.5")
    return max(round(width * share), 1)


def prompt_statistic(hidden_SF: Tensor) -> Tensor:
    """Return GRIFFIN's statistic of every neuron, ``(F,)``: ``s_j = || [Z̄]_j ||_2`` (eq. 6).

    Args:
        hidden_SF: the hidden activations Z of a prompt's tokens, without padding. Z̄ has their
            rows at length one, in which every token counts alike; a row of zeros stays zero.
    """
    wide = hidden_SF.to(torch.promote_types(hidden_SF.dtype, torch.float32))
    lengths_S1 = wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    return (wide / lengths_S1).norm(dim=0)


def prompt_neurons(hidden_SF: Tensor, share: float) -> Tensor:
    """Return the neurons that a prompt keeps, ascending, ``(K,)`` int64.

    Args:
        hidden_SF: as of :func:`prompt_statistic`.
        share: of the neurons, in (0, 1].

    Raises:
        InputError: the share is out of range, or there is no token.
    """
    if not len(hidden_SF):
        raise InputError("prompt: it has no token to choose neurons by; give one")
    order = prompt_statistic(hidden_SF).argsort(descending=True, stable=True)
    return order[: kept_count(hidden_SF.shape[1], share)].sort().values
