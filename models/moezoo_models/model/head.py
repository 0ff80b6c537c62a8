"""The output projection of a language model, and its loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from moezoo_kernels import linear_cross_entropy
from moezoo_kernels.linear import Linear
from moezoo_models.model.attention_backends import soft_capped

IGNORED = -100
"""The label of positions that the loss leaves out."""


class Head(Linear):
    """A linear map from hidden states to logits, or, with labels, to their loss.

    The loss is computed in here so that what gathers a module's parameters when it is called
    (FSDP2, ZeRO stage 3, offloading) has gathered them.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, input: Tensor, next_tokens: Tensor | None = None) -> Tensor:
        """Return logits ``(..., vocab_size)``, or the mean cross-entropy without making them all.

        Args:
            input: hidden states, ``(..., hidden_size)``.
            next_tokens: ``(...)`` int64, -100 where ignored. With them the result is as
                :func:`next_token_loss` of the logits, and has no second derivative.
        """
        if next_tokens is None:
            return super().forward(input)
        if hasattr(self.weight, "device_mesh"):  # a parallel plan that leaves it sharded in here
            return next_token_loss(super().forward(input), next_tokens)
        return linear_cross_entropy(input, self.weight, next_tokens, ignore_index=IGNORED).loss


def shaped_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Scale what a head puts out, and cap it, as a configuration of ours or of a stock model says.

    Args:
        logits: ``(..., vocab_size)``.
        config: ``logits_scaling`` is Granite's, ``final_logit_softcapping`` Gemma's.
    """
    if (scaling := getattr(config, "logits_scaling", 1.0)) != 1.0:
        logits = logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else soft_capped(logits, cap)


def next_token_loss(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in fp32; 0 where every label is ignored.

    Args:
        logits: ``(batch, sequence, vocab_size)``.
        next_tokens: ``(batch, sequence)`` int64, -100 where ignored.
    """
    total = F.cross_entropy(
        logits.float().flatten(0, 1), next_tokens.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (next_tokens != IGNORED).sum().clamp(min=1)
