"""Losses and slopes of logits on plain torch: any device and floating dtype.

Shapes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Softmax:
    """Turns logits into losses and slopes, in fp32 at least, with memory of its own.

    Args:
        like: ``(C, V)`` logits of the largest chunk.
    """

    def __init__(self, like: Tensor) -> None:
        precise = torch.promote_types(like.dtype, torch.float32)
        # The same memory for all chunks: fresh memory costs a page fault every 4 KiB.
        self._shares_CV = torch.empty_like(like, dtype=precise)

    def __call__(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        losses_C: Tensor,
        partitions_C: Tensor,
        z_loss: float,
        slopes: bool,
    ) -> Tensor:
        """Write losses and log-partitions; return the slope of ``loss + z_loss partition²``.

        Without ``slopes`` what is returned has no meaning.
        """
        shares_CV = self._shares_CV[: len(logits_CV)]
        place = (torch.arange(len(labels_C), device=labels_C.device), labels_C)
        torch.log_softmax(logits_CV, dim=-1, dtype=shares_CV.dtype, out=shares_CV)
        losses_C.copy_(-shares_CV[place])
        partitions_C.copy_(logits_CV[place] + losses_C)
        if not slopes:
            return logits_CV
        shares_CV.exp_()
        if z_loss:
            shares_CV.mul_(1 + 2 * z_loss * partitions_C.unsqueeze(-1))
        shares_CV[place] -= 1
        # In a lower precision, the products' operand takes the memory of the logits.
        same = shares_CV.dtype == logits_CV.dtype
        return shares_CV if same else logits_CV.copy_(shares_CV)
