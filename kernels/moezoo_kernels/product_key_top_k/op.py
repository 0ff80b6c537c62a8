"""``product_key_top_k`` as one opaque op with a backward op: what autograd and compile see.

A score is the sum of two half scores, so its gradient is added to both; the op saves the slots.

Shapes: T tokens, H heads, n half scores per codebook, K choices.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moezoo_kernels.product_key_top_k import cpu


@torch.library.custom_op("moezoo::product_key_top_k", mutates_args=())
def forward(halves: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return scores (T, H, K) and slots (T, H, K) int64, best first."""
    return _implementation(backend).forward(halves, top_k)


@forward.register_fake
def _(halves: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor]:
    _, tokens, heads, _ = halves.shape
    scores = halves.new_empty(tokens, heads, top_k)
    return scores, scores.new_empty(scores.shape, dtype=torch.int64)


@torch.library.custom_op("moezoo::product_key_top_k_backward", mutates_args=())
def backward(grad: Tensor, slots: Tensor, n: int, by_head: bool, backend: str) -> Tensor:
    """Return the gradient of the halves, (2, T, H, n), in the order (H, 2, T, n) if ``by_head``."""
    return _implementation(backend).backward(grad, slots, n, by_head)


@backward.register_fake
def _(grad: Tensor, slots: Tensor, n: int, by_head: bool, backend: str) -> Tensor:
    return cpu.empty_halves(grad, n, by_head)


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # looked for when asked for, as it imports triton
        return importlib.import_module("moezoo_kernels.product_key_top_k.triton_select")
    return cpu


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    halves, _, ctx.backend = inputs
    _, slots = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(slots)
    ctx.save_for_backward(slots)
    ctx.n, ctx.by_head = halves.shape[-1], cpu.is_by_head(halves)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    (slots,) = ctx.saved_tensors
    return backward(grad, slots, ctx.n, ctx.by_head, ctx.backend), None, None


forward.register_autograd(_differentiate, setup_context=_save)
