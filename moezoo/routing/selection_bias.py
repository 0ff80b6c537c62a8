"""The selection bias: a number per expert that chooses and does not weigh, and what moves it.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moezoo.routing import losses as L
from moezoo.routing.options import RouterOptions


class StepLoad:
    """What the micro-batches of one optimizer step said of the load.

    Attributes:
        counts: ``(E,)``, choices of each expert before any limit on capacity; None before the
            first micro-batch.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Add what a router's statistics say of one micro-batch."""
        counts_E = stats["expert_counts"].detach()
        self.counts = counts_E if self.counts is None else self.counts + counts_E


def move_bias(
    bias_E: Tensor, load: StepLoad, options: RouterOptions, num_identity: int = 0
) -> None:
    """Move a selection bias, in place, by the load of one optimizer step over all ranks.

    ``b_e += rate * sign(mean(c) - c_e)`` with c summed over ranks and micro-batches
    (arXiv:2408.15664, algorithm 1). With identity experts it is LongCat-Flash's
    ``b_e += rate * (1 / E - c_e / Σ c)`` (arXiv:2509.01322, section 2.1), for the experts that
    compute alone, so that those of identity take the rest: on average a token then has
    ``K (E - I) / E`` experts that compute.

    Args:
        bias_E: fp32.
        load: of the step; without any the bias stays.
        options: of the router.
        num_identity: identity experts I, the last ones of E.
    """
    if load.counts is None:
        return
    counts_E = L.sum_over_ranks(load.counts).float()
    direction_E = (counts_E.mean() - counts_E).sign()
    if num_identity:
        direction_E = 1 / len(counts_E) - counts_E / counts_E.sum().clamp(min=1)
        direction_E[-num_identity:] = 0.0
    bias_E += options.bias_update_rate * direction_E


def kept_in_fp32(before: Tensor, after: Tensor) -> Tensor:
    """Return a buffer that changed device, as :meth:`torch.nn.Module.to` left it, but not dtype.

    A bias moves by 1e-3 at a time, which bf16 rounds away.

    Args:
        before: the buffer, fp32.
        after: what was made of it.
    """
    return after.float() if before.is_meta else before.to(after.device)
