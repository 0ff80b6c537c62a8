"""Auxiliary losses of learned routers, unweighted, in fp32 (or fp64 for fp64 inputs).

Shapes: T tokens, E experts, K choices per token. ``mask`` is ``(T,)``, true at real tokens; a loss
over no token at all is zero, not NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.routing.stats import expert_counts

_ALONE: list[bool] = []  # one per open alone(); torch.compile can read no ContextVar


def load_balancing_loss(counts_E: Tensor, p_E: Tensor) -> Tensor:
    """Compute Switch's loss ``E Σ_e f_e P_e`` (arXiv:2101.03961, eq. 4).

    Args:
        counts_E: assignments per expert; ``f`` is their share. No gradient flows into it.
        p_E: mean router probability of each expert.
    """
    f_E = counts_E.to(p_E.dtype) / counts_E.sum().clamp(min=1)
    return f_E.numel() * torch.dot(f_E, p_E)


def z_loss(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Compute ``mean_t (logsumexp_e logits)^2`` (arXiv:2202.08906, eq. 5), on un-noised logits."""
    return masked_mean(logits_TE.logsumexp(dim=-1).square(), mask_T)


def cv_squared(x_E: Tensor) -> Tensor:
    """Compute ``Var(x) / Mean(x)^2`` over experts (arXiv:1701.06538, eq. 7 and 11)."""
    if x_E.numel() == 1:
        return x_E.new_zeros(())
    return x_E.var(unbiased=False) / (x_E.mean().square() + 1e-10)


def sequence_balance_loss(
    indices_BSK: Tensor, probabilities_BSE: Tensor, mask_BS: Tensor | None
) -> Tensor:
    """Compute the mean over sequences of ``E Σ_e f_e P_e`` (arXiv:2412.19437, eq. 17-20).

    Args:
        indices_BSK: chosen experts, -1 for none.
        probabilities_BSE: scores divided by their sum over experts.
        mask_BS: true at real tokens; a sequence without any is left out.
    """
    num_sequences, _, num_experts = probabilities_BSE.shape
    sequence_B11 = torch.arange(num_sequences, device=indices_BSK.device).reshape(-1, 1, 1)
    slots = (indices_BSK + sequence_B11 * num_experts).masked_fill(indices_BSK < 0, -1)
    counts_BE = expert_counts(slots, num_sequences * num_experts).reshape(-1, num_experts)
    f_BE = counts_BE.to(probabilities_BSE.dtype) / counts_BE.sum(dim=-1, keepdim=True).clamp(min=1)
    if mask_BS is None:
        mask_BS = torch.ones_like(probabilities_BSE[..., 0], dtype=torch.bool)
    tokens_B = mask_BS.sum(dim=1)
    p_BE = (probabilities_BSE * mask_BS.unsqueeze(-1)).sum(1) / tokens_B.clamp(min=1).unsqueeze(-1)
    return masked_mean(num_experts * (f_BE * p_BE).sum(dim=-1), tokens_B > 0)


def expected_load(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int, mask_T: Tensor | None
) -> Tensor:
    """Estimate each expert's load smoothly: ``Σ_t P(e is chosen if its noise is redrawn)``.

    With all other experts' noise fixed, e is chosen when its logit passes the k-th largest of the
    others: the (k+1)-th largest of all if e was chosen, else the k-th (arXiv:1701.06538, eq. 9).

    Args:
        clean_TE: logits before noise.
        noisy_TE: logits after noise.
        std_TE: the noise's standard deviation.
        top_k: experts per token, less than E.
        mask_T: true at real tokens.

    Returns:
        ``(E,)``; sums to about ``T top_k``.
    """
    top = noisy_TE.topk(top_k + 1, dim=-1).values
    kth, next_one = top[:, -2:-1], top[:, -1:]
    threshold = torch.where(noisy_TE > next_one, next_one, kth)
    probability = torch.special.ndtr((clean_TE - threshold) / std_TE)
    if mask_T is not None:
        probability = probability * mask_T.unsqueeze(-1)
    return probability.sum(dim=0)


def negative_entropy(logits_TE: Tensor, mask_T: Tensor | None, over_ranks: bool) -> Tensor:
    """Compute ``Σ_e p_e log p_e`` of the mean softmax over tokens (arXiv:2310.10837, section 5).

    The mean is taken in log space: an expert that no token wants still has a finite log p.

    Args:
        logits_TE: router logits.
        mask_T: true at real tokens.
        over_ranks: take the mean over all data-parallel ranks. Every rank then has the same loss,
            and the ranks' gradients average to the gradient of that loss.
    """
    log_p_TE = logits_TE.log_softmax(dim=-1)
    if mask_T is not None:
        log_p_TE = log_p_TE.masked_fill(~mask_T.unsqueeze(-1), -torch.inf)
    log_sum_E = log_p_TE.logsumexp(dim=0).clamp(min=-1e4)  # no token at all: p = 0
    tokens = log_sum_E.new_tensor(len(log_p_TE))
    if mask_T is not None:
        tokens = mask_T.sum().to(log_sum_E.dtype)
    if over_ranks and world_size() > 1:
        tokens, log_sum_E = sum_over_ranks(tokens), _log_sum_over_ranks(log_sum_E)
    log_p_E = log_sum_E - tokens.clamp(min=1).log()
    return torch.dot(log_p_E.exp(), log_p_E)


def _log_sum_over_ranks(log_E: Tensor) -> Tensor:
    """Return ``log Σ_ranks exp``, whose gradients, averaged over ranks, are those of the sum."""
    largest_E = log_E.detach().clone()
    dist.all_reduce(largest_E, op=dist.ReduceOp.MAX)
    total_E = sum_over_ranks((log_E.detach() - largest_E).exp()).log() + largest_E
    share_E = (log_E.detach() - total_E).exp()
    return total_E + world_size() * share_E * (log_E - log_E.detach())


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average the first dimension over the real tokens; zero if there is none."""
    if mask is None:
        return x.sum(dim=0) / max(x.shape[0], 1)
    kept = x * mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return kept.sum(dim=0) / mask.sum().clamp(min=1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a detached tensor over all data-parallel ranks; itself in a single process."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


@contextmanager
def alone() -> Iterator[None]:
    """Run a model in this process alone: nothing is summed over ranks."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


def world_size() -> int:
    """Return the number of data-parallel ranks."""
    if _ALONE:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
