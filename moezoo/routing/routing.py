"""What a router hands to the experts.

Shapes: T tokens, K choices per token, S shared experts, R width of a
router's MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """The experts each token is routed to, and their weights.

    Attributes:
        indices: ``(T, K)`` int64 experts, -1 for none. K is E where experts take tokens or
            round how many they have.
        weights: ``(T, K)`` in fp32 (fp64 for fp64 inputs), zero where there is no expert.
        losses: weighted scalars.
        stats: detached statistics.
        max_assignments: an upper bound on the number of indices that are not -1.
        shared_weights: ``(T, S)`` of the shared experts, where the router weighs these too.
        state: ``(T, R)``, what the router hands on to that of the next layer, if it does.
    """

    indices: Tensor
    weights: Tensor
    losses: dict[str, Tensor]
    stats: Mapping[str, Tensor]
    max_assignments: int
    shared_weights: Tensor | None = None
    state: Tensor | None = None
