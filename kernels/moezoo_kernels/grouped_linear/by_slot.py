"""The products of a handful of tokens on a CPU, in inference: slot by slot, without a sort.

A token that is decoded reads a few of many experts. Each of its slots takes one product of a row.

Shapes: T tokens, K choices, E experts, A and B widths, S = T K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import transforms

_FEW_SLOTS = 64


def is_few(indices: Tensor, num_experts: int) -> bool:
    """Return whether slots are so few that hardly two share an expert, and nobody looks on.

    Args:
        indices: ``(T, K)`` expert numbers.
        num_experts: E.
    """
    return (
        indices.device.type == "cpu"
        and indices.numel() <= min(_FEW_SLOTS, num_experts // 4)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transforms.is_transformed()
    )


def linear_by_slot(
    x: Tensor, w: Tensor, experts: list[int], bias: Tensor | None = None, choices: int = 1
) -> Tensor:
    """Return each slot's product ``w[e] @ row + bias[e]``, ``(S, B)``.

    Args:
        x: ``(S / choices, A)`` rows, each of which that many slots share.
        w: ``(E, B, A)``, ``x``'s dtype; may be a transposed view.
        experts: S expert numbers; a slot of one below 0 or of E or more gets zeros.
        bias: ``(E, B)`` or None.
        choices: slots of a row.
    """
    product = x.new_empty(len(experts), w.shape[1])
    rows, products = x.split(1), product.split(1)
    count = w.shape[0]
    for slot, expert in enumerate(experts):
        if not 0 <= expert < count:
            products[slot].zero_()
        elif bias is None:
            torch.mm(rows[slot // choices], w[expert].t(), out=products[slot])
        else:
            torch.addmm(bias[expert], rows[slot // choices], w[expert].t(), out=products[slot])
    return product


def sum_by_slot(rows: Tensor, weights: Tensor, experts: list[int], num_experts: int) -> Tensor:
    """Return the weighted sum of each token's slots, ``(T, B)``, added up in fp32 at least.

    Args:
        rows: ``(S, B)``.
        weights: ``(T, K)``.
        experts: as for :func:`linear_by_slot`; a slot of none adds nothing, whatever its row holds.
        num_experts: E.
    """
    accumulation = torch.promote_types(rows.dtype, torch.float32)
    missing = [slot for slot, expert in enumerate(experts) if not 0 <= expert < num_experts]
    if missing:
        rows = rows.index_fill(0, torch.tensor(missing), 0)
    by_token = rows.view(*weights.shape, rows.shape[1]).to(accumulation)
    summed = torch.bmm(weights.to(accumulation).unsqueeze(1), by_token).squeeze(1)
    return summed.to(rows.dtype)
