"""Where products without zeros are faster than whole ones, as measured; see kernels/README.md."""

from __future__ import annotations

from typing import Final

import torch

from moezoo_kernels import backends, native
from moezoo_kernels.sparse_linear.matrices import BlockSparse, GroupSparse

MOST_GROUPED_TOKENS: Final = 4
"""Of more tokens, inputs that are picked out one by one cost what their absence saves."""

_LEAST_NUMBERS: Final = 1 << 16
"""Of smaller matrices the call costs more than the product."""

_FEW: Final = 8
_DENSEST: Final = {torch.float32: (0.7, 0.6), torch.bfloat16: (0.7, 0.2)}
"""The largest share of blocks for few tokens and for more."""


def pays(matrix: BlockSparse | GroupSparse, tokens: int) -> bool:
    """Return whether a packed matrix is faster than the whole one for so many tokens.

    On GPUs it is said to be where the backend is asked for alone, as none was timed.
    """
    rows, columns = matrix.shape
    values = matrix.values
    if rows * columns < _LEAST_NUMBERS or not tokens:
        return False
    if values.device.type != "cpu":
        wanted = "triton" if isinstance(matrix, BlockSparse) else "semi_structured"
        return backends.forced() == wanted
    if native.unusable(values.device, values.dtype) or backends.forced() not in (None, "cpu"):
        return False
    if isinstance(matrix, GroupSparse):
        return tokens <= MOST_GROUPED_TOKENS
    return matrix.density <= _DENSEST[values.dtype][tokens > _FEW]
