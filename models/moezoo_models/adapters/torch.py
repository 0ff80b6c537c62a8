"""Private names of torch, as of 2.13.

Shapes: B sequences, H heads, L queries, S keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class MovedModule(nn.Module):
    """A module that is told when it has been moved or cast.

    torch 2.13: ``to``, ``half``, ``cuda`` and the like are all ``_apply``, and there is no hook.
    Without it what has to stay in fp32 is cast with the model.
    """

    def moved(self) -> None:
        """Called when tensors of this module may have another device or dtype."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.moved()
        return self


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether calls of a module also run hooks that someone has registered on it.

    torch 2.13: hooks are registered in public and kept in private. Without it decoding, which calls
    no modules, would pass by them.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def kept_in(module: nn.Module, name: str) -> dict[str, Any]:
    """Return where a module keeps a parameter or buffer, to have it compute with another tensor.

    torch 2.13: assigning a tensor that is no parameter where one was is an error, and
    ``functional_call`` looks everything up at every call. Without it adopted layers would need
    copies of tensors that are views.

    Args:
        module: the module.
        name: of a parameter or buffer of its own.
    """
    place: dict[str, Any] = module._buffers if name in module._buffers else module._parameters
    return place


def flash_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by torch's fused operator for CPUs.

    torch 2.13: ``scaled_dot_product_attention`` calls it, and does not return the log-sum-exp.
    Without it attention with persistent memory has no fused form on CPUs.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, D)``.
        mask: added to the scores, broadcast to ``(B, H, L, S)``; None for none.
        causal: whether keys after a query are hidden.
        scale: factor on the scores.

    Returns:
        The attended values ``(B, H, L, D)``, and the log-sum-exp of each query's scores
        ``(B, H, L)``.
    """
    attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=causal, attn_mask=mask, scale=scale
    )
    return attended, lse


def flash_attention_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`flash_attention_cpu` for query, key and value.

    torch 2.13: autograd calls it, with the output and the log-sum-exp of the same operator. Here
    they are those of a joint softmax. Without it that has no fused backward pass on CPUs.

    Args:
        grad: ``(B, H, L, D)``, of the attended values.
        query: as above.
        key: as above.
        value: as above.
        attended: what was returned, or what a softmax over more keys than these returned.
        lse: likewise.
        mask: as above.
        causal: as above.
        scale: as above.
    """
    d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad,
        query,
        key,
        value,
        attended,
        lse,
        dropout_p=0.0,
        is_causal=causal,
        attn_mask=mask,
        scale=scale,
    )
    return d_query, d_key, d_value
