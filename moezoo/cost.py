"""The cost of a layer, by formula."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of one layer, by formula.

    Attributes:
        total_parameters: trained numbers the layer holds.
        active_parameters: those that one token touches.
        flops_per_token: forward floating-point operations of one token; a multiply-add counts two.
            Matrix products only, as torch's FLOP counter counts them.
        bytes_per_token: bytes of parameters that one token reads when it comes alone (decoding),
            at the layer's own dtype.
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: int
    bytes_per_token: int
