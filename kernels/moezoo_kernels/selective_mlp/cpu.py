"""``selective_mlp`` for CPUs, in C++: what is kept is read where it lies, the rest is not.

Rows of up are read whole, for the neurons that go on. Of gate and down the columns are, where these
matrices lie column by column in memory; otherwise all of them is. With several tokens, what any of
them keeps is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo_kernels import backends, native
from moezoo_kernels.activations import ACTIVATION_CODES
from moezoo_kernels.layouts import is_column_major
from moezoo_kernels.selective_mlp.thresholds import Thresholds

# At most so many tokens are multiplied one by one as the weights are read: beyond, nearly all
# weights are kept by one of them, and whole products catch up, in bf16 sooner.
_FEW = {torch.float32: 16, torch.bfloat16: 2}


def is_few(tokens: int, dtype: torch.dtype) -> bool:
    """Return whether so few tokens are faster here than in whole products."""
    return tokens <= _FEW.get(dtype, 0)


def is_direct(x: Tensor, weight: Tensor) -> bool:
    """Return whether tokens ``(T, D)`` are few, and nothing but the kernel's output is wanted.

    Args:
        x: the tokens.
        weight: of the block, which stands for all.
    """
    return (
        not torch.is_grad_enabled()
        and (weight.dtype, weight.device) == (x.dtype, x.device)
        and is_few(len(x), x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and backends.forced() in (None, "cpu")
        and native.unusable(x.device, x.dtype) is None
    )


def selective_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds,
    biases: Sequence[Tensor | None],
    activation: str,
    glu: Sequence[float],
    dense: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output (T, D), in ``x``'s dtype, and counts (T, 4)."""
    (tokens, width), hidden_width = x.shape, w_up.shape[0]
    output = torch.empty(tokens, width, dtype=x.dtype)
    counts = torch.empty(tokens, 4, dtype=torch.int64)
    kind, *bounds = glu
    native.call(
        "moezoo_selective_mlp",
        x.contiguous(),
        output,
        *laid(w_gate, w_up, w_down),
        *(None if t is None else t.contiguous() for t in (*biases, *thresholds, dense)),
        counts,
        native.floats(tokens * (3 * width + 2 * hidden_width)),
        native.dtype_code(x.dtype),
        *(tokens, width, hidden_width, ACTIVATION_CODES[activation], int(kind)),
        *map(float, bounds),
        *layouts(w_gate, w_up, w_down),
    )
    return output, counts


def laid(*matrices: Tensor | None) -> list[Tensor | None]:
    """Return contiguous views of matrices as they lie in memory; copies of those in neither way."""
    return [w if w is None else (w.t() if is_column_major(w) else w.contiguous()) for w in matrices]


def layouts(*matrices: Tensor | None) -> list[int]:
    """Return for each matrix 1 if it lies column by column, else 0."""
    return [int(w is not None and is_column_major(w)) for w in matrices]
