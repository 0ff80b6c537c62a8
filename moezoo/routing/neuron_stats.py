"""Statistics of a block's hidden neurons, of which many are zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moezoo.routing.losses import masked_mean
from moezoo.routing.stats import MOST_COUNTS, SlotLoad, kl_to_uniform, usage


def neuron_stats(
    load: SlotLoad,
    active_T: Tensor,
    mask_T: Tensor | None,
    densities: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the statistics of F neurons for T tokens, of what :func:`neuron_load` returned.

    Args:
        load: how often each neuron is not zero, and its summed magnitudes.
        active_T: how many each token has that are not zero.
        mask_T: bool, true at real tokens.
        densities: further shares of each token, ``(T,)``, by name, to be averaged as well.

    Returns:
        ``tokens``; ``density``, the share of neurons that are not zero; the further shares;
        ``usage``; ``unevenness``; and of up to 4096 neurons ``expert_counts`` (F,).
    """
    number = len(load.counts)
    tokens = load.counts.new_tensor(len(active_T)) if mask_T is None else mask_T.sum()
    shares = {"density": active_T / number, **(densities or {})}
    stats = {
        "tokens": tokens,
        **{name: masked_mean(each_T, mask_T) for name, each_T in shares.items()},
        "usage": usage(load.counts),
        "unevenness": kl_to_uniform(load.mass),
    }
    return {"expert_counts": load.counts, **stats} if number <= MOST_COUNTS else stats
