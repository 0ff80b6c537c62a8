"""``selective_mlp`` as an opaque op without gradients: what compile and FLOP counters see.

Shapes: T tokens, D width, M hidden units.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.flops import has_data
from moezoo_kernels.selective_mlp import cpu
from moezoo_kernels.selective_mlp.thresholds import Thresholds


@torch.library.custom_op("moezoo::selective_mlp", mutates_args=())
def selective_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    t_input: Tensor | None,
    t_up_input: Tensor | None,
    t_gate: Tensor | None,
    t_hidden: Tensor | None,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    glu: Sequence[float],
    dense: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) in ``x``'s dtype and the counts (T, 4) int64."""
    run = cpu.selective_mlp
    if backend == "triton":  # looked for when asked for, as it imports triton
        name = "moezoo_kernels.selective_mlp.triton_selective"
        run = importlib.import_module(name).selective_mlp
    thresholds = Thresholds(t_input, t_up_input, t_gate, t_hidden)
    biases = (bias_gate, bias_up, bias_down)
    return run(x, w_gate, w_up, w_down, thresholds, biases, activation, glu, dense)


@selective_mlp.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 4, dtype=torch.int64)


@register_flop_formula(torch.ops.moezoo.selective_mlp, get_raw=True)
def _flops(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    *_: Any,
    out_val: tuple[Tensor, Tensor] | None = None,
    **__: Any,
) -> int:
    """Count the products of kept numbers; without data, of all."""
    (tokens, width), hidden_width = x.shape, w_up.shape[0]
    gated = w_gate is not None
    if out_val is None or not has_data(out_val[1]):
        return 2 * tokens * width * hidden_width * (3 if gated else 2)
    of_input, of_up, of_gate, of_hidden = out_val[1].unbind(1)
    products = of_input * hidden_width + of_hidden * width
    if gated:
        products = products + of_gate * of_up
    return 2 * int(products.sum())
