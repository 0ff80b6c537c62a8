"""Losses and slopes of logits in C++ (csrc/linear_cross_entropy.cpp), for fp32 and bf16.

A row of logits stays in a core's cache while its largest number, the sum of exponentials and the
slope are found, one after the other; the slope takes the logits' place.

Shapes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from moezoo_kernels import native


class Softmax:
    """As :class:`moezoo_kernels.linear_cross_entropy.plain.Softmax`; needs no memory."""

    def __init__(self, like: Tensor) -> None:
        pass

    def __call__(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        losses_C: Tensor,
        partitions_C: Tensor,
        z_loss: float,
        slopes: bool,
    ) -> Tensor:
        """Write losses and log-partitions; return slopes, or leave the logits as they are."""
        native.call(
            "moezoo_cross_entropy",
            logits_CV,
            native.dtype_code(logits_CV.dtype),
            labels_C.contiguous(),
            *logits_CV.shape,
            float(z_loss),
            slopes,
            losses_C,
            partitions_C,
        )
        return logits_CV
