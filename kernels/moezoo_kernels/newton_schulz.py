"""Newton-Schulz iterations, which bring singular values near 1, in C++ (csrc/newton_schulz.cpp).

``X <- (a I + b G + c G²) X`` with ``G = X Xᵀ`` reads the long side of X twice in each iteration.
Several iterations at once are ``X <- Q X``, where Q is a product of polynomials in the first G, as
are all later Gs (up to rounding): only products of n × n matrices remain, n being the short side,
and as these are symmetric, half of each is computed. G is computed anew after three iterations;
without that, small singular values of ill-conditioned matrices lose digits.

A matrix is one thread's work, so its bits depend neither on the number of threads nor on which
others come with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo_kernels import backends, native, product_libraries


def unusable(matrix: Tensor) -> str | None:
    """Return why :func:`newton_schulz_` should not or cannot run on ``(..., R, C)``, or None."""
    if matrix.dtype != torch.float32:
        return "computes in fp32"
    if backends.forced() not in (None, "cpu"):
        return f"{backends.forced()} is asked for"
    short, long = sorted(matrix.shape[-2:])
    if short > 512 and long < 2 * short and not _has_wider_vectors():
        return "is slower than whole products for large, nearly square matrices"
    return native.unusable(matrix.device, matrix.dtype)


def _has_wider_vectors() -> bool:
    """Return whether the products here have AVX-512, and torch's, on this processor, AVX2."""
    library = native.load()
    ours = isinstance(library, native.Library) and library.name == "avx512"
    return ours and product_libraries.onednn_is_faster()


def newton_schulz_(
    matrices: Sequence[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    floor: float,
) -> None:
    """Divide each matrix by its norm and iterate, in place.

    Args:
        matrices: contiguous fp32 tensors ``(..., R, C)``, of one shape or of several.
        coefficients: a, b, c.
        steps: number of iterations.
        floor: smallest number that a matrix is divided by.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for tensor in matrices:
        assert tensor.is_contiguous()
        assert unusable(tensor) is None
        rows, columns = tensor.shape[-2:]
        size = rows * columns * tensor.element_size()
        addresses = by_shape.setdefault((rows, columns), [])
        count = tensor.numel() // (rows * columns) if size else 0
        addresses.extend(tensor.data_ptr() + number * size for number in range(count))
    for (rows, columns), addresses in by_shape.items():
        native.call(
            "moezoo_newton_schulz",
            torch.tensor(addresses, dtype=torch.int64, device="cpu"),
            len(addresses),
            rows,
            columns,
            torch.tensor(coefficients, dtype=torch.float32, device="cpu"),
            steps,
            floor,
        )
