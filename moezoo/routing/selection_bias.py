"""The selection bias: a number per expert that chooses and does not weigh, and what moves it.

Shapes: T tokens, E experts, H bins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moezoo.routing import losses as L
from moezoo.routing.margins import upper_quantile
from moezoo.routing.options import RouterOptions


class StepLoad:
    """What the micro-batches of one optimizer step said of the load.

    Attributes:
        counts: ``(E,)``, choices of each expert before any limit on capacity; None before the
            first micro-batch.
        margins: ``(E, H)``, a histogram of what :func:`selection_margins` gives; None where no
            rule asks for it.
        tokens: real tokens, a scalar int64.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.margins: Tensor | None = None
        self.tokens: Tensor | None = None

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Add what a router's statistics say of one micro-batch."""
        counts_E = stats["expert_counts"].detach()
        self.counts = counts_E if self.counts is None else self.counts + counts_E
        if "tokens" in stats:
            tokens = stats["tokens"].detach()
            self.tokens = tokens if self.tokens is None else self.tokens + tokens
        if "margins" in stats:
            margins = stats["margins"].detach().to(torch.int64)
            self.margins = margins if self.margins is None else self.margins + margins


def selection_margins(selection_TE: Tensor, top_k: int) -> Tensor:
    """Return by how much each expert was chosen, or missed: its number less the (k+1)-th largest.

    Args:
        selection_TE: what chooses, bias included.
        top_k: k; less than E, or the margins are zero: there is no other to choose.
    """
    if top_k == selection_TE.shape[1]:
        return torch.zeros_like(selection_TE)
    return selection_TE - selection_TE.topk(top_k + 1, dim=-1).values[:, -1:]


def move_bias(
    bias_E: Tensor, load: StepLoad, options: RouterOptions, top_k: int, num_idle: int = 0
) -> None:
    """Move a selection bias, in place, by the load of one optimizer step over all ranks.

    By ``sign``, ``b_e += rate * sign(mean(c) - c_e)`` with c summed over ranks and micro-batches
    (arXiv:2408.15664, algorithm 1). With experts that compute nothing it is LongCat-Flash's
    ``b_e += rate * (K_e / (K N) - c_e / Σ c)`` (arXiv:2509.01322, as its readers quote it), for
    the N = E - I experts that compute alone, so that the others take the rest: on average a
    token then has K_e experts that compute: ``expected_experts``, or ``K N / E``.

    By ``quantile`` (Su 2026), ``b_e = -Q_e`` with Q_e the number that a share k / E
    of the ``s_e - α`` exceed, α the (k+1)-th largest of a token's ``s + b``; then b is centred.
    That is one step of the dual of the linear program of an even load. The histogram is of
    ``s_e + b_e - α``, whose quantile is what b_e moves by and finds its bins finest near zero.

    Args:
        bias_E: fp32.
        load: of the step; without any the bias stays.
        options: of the router.
        top_k: experts per token k.
        num_idle: experts I that compute nothing, the last ones of E.
    """
    if options.bias_rule == "quantile":
        if load.margins is not None:
            histogram_EH = L.sum_over_ranks(load.margins)
            moved_E = bias_E - upper_quantile(histogram_EH, top_k / len(bias_E))
            bias_E.copy_(moved_E - moved_E.mean())
        return
    if load.counts is None:
        return
    counts_E = L.sum_over_ranks(load.counts).float()
    direction_E = (counts_E.mean() - counts_E).sign()
    if num_idle:
        computing = options.computing(len(counts_E), top_k, num_idle)
        share = float(computing / (top_k * (len(counts_E) - num_idle)))
        direction_E = share - counts_E / counts_E.sum().clamp(min=1)
        direction_E[-num_idle:] = 0.0
    bias_E += options.bias_update_rate * direction_E
    if options.bias_recentre:
        bias_E -= bias_E.mean()


def kept_in_fp32(before: Tensor, after: Tensor) -> Tensor:
    """Return a buffer on the device that a module was moved to, in fp32 whatever that was cast to.

    A bias moves by 1e-3 at a time, which bf16 rounds away.

    Args:
        before: the buffer.
        after: what was made of it.
    """
    return after.float() if before.is_meta else before.to(after.device).float()
