"""``linear_cross_entropy`` as one opaque op: what autograd, compile and opcheck see.

The forward computes the gradients, too, while a chunk's logits are there: they are its last
outputs, and what is saved. The backward multiplies them by the gradient of the loss.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.linear_cross_entropy import chunked


@torch.library.custom_op("moezoo::linear_cross_entropy", mutates_args=())
def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, z-loss, count, and the gradients of ``count * loss`` (T, D) and (V, D).

    Loss and z-loss are scalars in fp32, fp64 for fp64; count is an int64 scalar. Hidden's gradient
    has its dtype, the weight's the loss's; one that is not needed is empty.
    """
    check_range(labels, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        needs = (needs_hidden, needs_weight)
        sums = chunked.forward(hidden, weight, labels, ignore_index, z_loss, *needs, dtype, backend)
        count = (labels != ignore_index).sum()
        scored = count.clamp(min=1)
        z = z_loss * sums.z / scored
        loss = sums.loss / scored + z
    of_hidden = hidden.new_empty(0) if sums.of_hidden is None else sums.of_hidden
    of_weight = loss.new_empty(0) if sums.of_weight is None else sums.of_weight
    return loss, z, count, of_hidden, of_weight


@forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    of_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    of_weight = loss.new_empty(weight.shape if needs_weight else (0,))
    return loss, torch.empty_like(loss), labels.new_empty(()), of_hidden, of_weight


def check_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse a label that is no token; on an accelerator the device asserts it."""
    if labels.numel() == 0:
        return
    known = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if labels.device.type != "cpu":
        torch._assert_async(known.all(), "labels: give tokens of the vocabulary, or ignore_index")
    elif not known.all():
        wrong = int(labels[~known][0])
        raise ValueError(
            f"labels: {wrong} is not a token; give 0 … {vocabulary - 1}, or {ignore_index} (none)"
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, z, count, of_hidden, of_weight = output
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, count, of_hidden, of_weight)
    ctx.save_for_backward(count, of_hidden, of_weight)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy: its fast backends have no second derivative; "
            "use moezoo_kernels.use('reference')"
        )
    count, *computed = ctx.saved_tensors
    gradients: list[Tensor | None] = [None, None]
    if grad is not None:
        scale = grad / count.clamp(min=1)
        gradients = [
            (gradient * scale).to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                computed, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
    return (*gradients, *(None,) * 7)


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.moezoo.linear_cross_entropy, get_raw=True)
def _flops(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Count the logits of tokens that have a label, and their gradients, which are made here."""
    known = not isinstance(labels, FakeTensor) and labels.device.type != "meta"
    scored = int(labels.ne(ignore_index).sum()) if known else labels.numel()
    return 2 * scored * weight.numel() * (1 + needs_hidden + needs_weight)
