"""Persistent slots: learned key-value pairs that attention reads beside its context.

A softmax over two sets of keys is the mean of a softmax over each, weighted by how much of the
joint denominator each holds. So attention reads the slots by themselves, and :func:`join` merges
this output with that of the context by the log-sum-exps of both.

Shapes: B sequences, H heads, T queries, C width of a head, N slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import check_int
from moezoo.routing.tree import at_least_fp32


class PersistentSlots(nn.Module):
    """N key-value pairs per head, ``sqrt(C) K`` and ``sqrt(N) V`` of the tensors stored.

    The roots give the stored tensors unit variance in use and multiply their learning rates
    (Sukhbaatar et al. 2019, arXiv:1907.01470, section 4.1).

    Args:
        num_heads: heads H, each with slots of its own.
        num_slots: slots N per head.
        head_width: width C of a key and of a value.
    """

    def __init__(self, num_heads: int, num_slots: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = check_int("num_heads", num_heads)
        self.num_slots = check_int("num_slots", num_slots)
        self.head_width = check_int("head_width", head_width)
        self.keys = nn.Parameter(torch.empty(num_heads, num_slots, head_width))
        self.values = nn.Parameter(torch.empty(num_heads, num_slots, head_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw keys from N(0, 1/C) and values from N(0, 1/N)."""
        nn.init.normal_(self.keys, std=self.head_width**-0.5)
        nn.init.normal_(self.values, std=self.num_slots**-0.5)

    def forward(self, query_BHTC: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Attend to the slots as if there were no context.

        Args:
            query_BHTC: queries without positions; slots have none either.
            dropout: probability of dropping a weight.

        Returns:
            The outputs ``(B, H, T, C)``, and ``(B, H, T, 1)`` log-sum-exps of the scores, in fp32
            at least.
        """
        # 1/sqrt(C) on the scores and sqrt(C) on the keys cancel.
        scores_BHTN = at_least_fp32(query_BHTC @ self.keys.to(query_BHTC.dtype).mT)
        weights = F.dropout(scores_BHTN.softmax(-1), dropout)
        values = (self.num_slots**0.5 * self.values).to(query_BHTC.dtype)
        return weights.to(query_BHTC.dtype) @ values, scores_BHTN.logsumexp(-1, keepdim=True)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as attention would read them, each ``(H, N, C)``."""
        return self.head_width**0.5 * self.keys, self.num_slots**0.5 * self.values

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token, ``4 H N C``."""
        return 2 * (self.keys.numel() + self.values.numel())

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{self.num_heads}, num_slots={self.num_slots}, head_width={self.head_width}"


def join(
    context: Tensor, context_lse: Tensor, answer: Tensor, answer_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge the outputs over two sets of keys into that of one softmax over both.

    Args:
        context: ``(B, H, T, C)``.
        context_lse: its log-sum-exp of scores, ``(B, H, T, 1)``.
        answer: the output over the other set.
        answer_lse: its log-sum-exp.

    Returns:
        ``(B, H, T, C)`` in the dtype of ``context``, and the context's share of the weights,
        ``(B, H, T, 1)``.
    """
    mass = (context_lse - answer_lse).sigmoid()
    merged = mass * context + (answer_lse - context_lse).sigmoid() * answer
    return merged.to(context.dtype), mass
