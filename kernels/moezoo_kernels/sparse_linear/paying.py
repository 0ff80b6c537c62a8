"""Where products without zeros are faster than whole ones, as measured; see kernels/README.md."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

from moezoo_kernels import backends, native
from moezoo_kernels.sparse_linear.matrices import BlockSparse, GroupSparse

MOST_GROUPED_TOKENS: Final = {torch.float32: 8, torch.bfloat16: 4}
"""Of more tokens, inputs that are picked out one by one cost what their absence saves."""

_LEAST_NUMBERS: Final = 1 << 18
"""Of smaller matrices the call costs more than the product."""

_SPARSE_GROUPS: Final = 0.25
"""N / M up to which groups in bf16 are faster without AVX-512's picking of sixteen numbers, too."""

_FEW: Final = 8
_DENSEST: Final = 0.6
_DENSEST_BF16: Final = 0.25
_DENSEST_AMX: Final = 0.1


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
        return tokens <= MOST_GROUPED_TOKENS[values.dtype] and _groups_pay(matrix)
    many_in_bf16 = values.dtype == torch.bfloat16 and tokens > _FEW
    return matrix.density <= (_densest_in_bf16() if many_in_bf16 else _DENSEST)


def _groups_pay(matrix: GroupSparse) -> bool:
    """Return whether groups are faster for a few tokens: in bf16 less of the time is reading."""
    library = native.load()
    wide = isinstance(library, native.Library) and library.name == "avx512"
    return matrix.values.dtype == torch.float32 or wide or matrix.density <= _SPARSE_GROUPS


@cache
def _densest_in_bf16() -> float:
    """Return the largest share of blocks for many tokens in bf16, which torch may multiply faster.

    Ours are computed in fp32. AMX was not at hand: it has about four times the speed of the bf16
    instructions that were measured with.
    """
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones have not
    return _DENSEST_AMX if known.get("amx_bf16") else _DENSEST_BF16
