"""Whether torch's operators are wanted for what they are, and not only for their numbers."""

from __future__ import annotations

import torch


def is_ordinary() -> bool:
    """Return whether nothing watches or transforms torch's operators: they have to be seen."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
