"""What the processes of a run tell each other, apart from gradients."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_from_ranks(own: Any) -> list[Any]:
    """Collect every rank's object, in the order of ranks; all ranks must call this together."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)  # pickled, but only between the processes of one run
    return ranks
