"""Rows of a table that n-grams of tokens are hashed to: no search, and the same on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moezoo_kernels import backends, native
from moezoo_kernels.ngram_rows import cpu, plain, reference


def ngram_rows(
    token_ids: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    multipliers: Tensor,
    sizes: Sequence[int],
    offsets: Sequence[int],
    *,
    orders: int,
    boundary: int | None,
    length: int,
) -> Tensor:
    """Hash the n-grams of orders 2 … O + 1 that end in each token, by several functions each.

    ``row_h = (m_0 c_t ⊕ m_1 c_{t-1} ⊕ …) mod size_h + offset_h`` (Cheng et al. 2026,
    arXiv:2601.07372, section 2.2), with the classes c of the tokens; without multipliers
    ``Σ_i c_{t-i} Vⁱ mod size_h + offset_h``. Padding, the end of a document, what stands before
    either, and what stands before the sequence, are of the class of no token; the end itself sees
    what precedes it, and so does a place of padding.

    Args:
        token_ids: ``(..., L)`` int64 or int32, from 0 to V - 1.
        mask: ``(..., L)`` bool, true at real tokens; None: all are.
        classes: ``(V + 1,)`` int64 from 0, of each token, the last of no token.
        multipliers: ``(O + 1,)`` int64, positive; their products with classes are below 2^63. Or
            none: polynomials in V.
        sizes: of the H heads, those of one order side by side; 2 to 2^32.
        offsets: of the heads; no row is 2^63 or more.
        orders: number of orders O, at most 8, each with ``H / O`` heads.
        boundary: the token that ends a document, or None.
        length: S; the last S tokens are addressed.

    Returns:
        ``(..., S, H)`` int64.

    Raises:
        ValueError: a token id is out of range, or a forced backend cannot run.
    """
    # Backends are named by floating dtypes; of whole numbers there is one kind here.
    run = backends.choose("ngram_rows", token_ids.device, torch.float32)
    return run(
        token_ids, mask, classes, multipliers, list(sizes), list(offsets), orders, boundary, length
    )


def _torch(token_ids: Tensor, *arguments: Any) -> Tensor:
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        native.warn_once()
    return plain.ngram_rows(token_ids, *arguments)


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "ngram_rows",
    backends.Backend("cpu", cpu.ngram_rows, native.unusable),
    backends.Backend("torch", _torch, _anywhere),
    backends.Backend("reference", reference.ngram_rows, _anywhere),
)

__all__ = ["ngram_rows"]
