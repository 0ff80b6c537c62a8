"""A mixture of experts on one new token of each of a few sequences, in one C++ call.

As the steps of :mod:`moezoo_kernels.token_step`, whose words it shares: norm, router, the experts
that it picks, a block that every token runs beside them, and the residual sum. The matrices of
experts that no token picks are not read. Experts may be many and small, as those that are cut out
of a dense block: their rows are then read as one list.

Shapes: B sequences, D width of the residual stream, E experts, F hidden width of an expert, I = 2 F
if gated else F, S hidden width of the shared block, P width of what the router reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from moezoo_kernels import native
from moezoo_kernels.activations import ACTIVATION_CODES, PLAIN_GLU, GLUOptions
from moezoo_kernels.token_step import Linear, Norm

Scoring = Literal["linear", "with_shared", "neurons", "signed_neurons"]

_CODES: Final[dict[Scoring, int]] = {
    "linear": 0,
    "with_shared": 1,
    "neurons": 2,
    "signed_neurons": 3,
}  # csrc/moe_step.cpp has the same list


class Scorer(NamedTuple):
    """What scores the experts, in fp32.

    Attributes:
        weight: ``(E, P)``; P is D, or D + S for ``with_shared``.
        bias: ``(E,)`` or None.
        up: ``(E, P)``, the linear factors of gated neurons, or None.
        scoring: ``linear``: a map of what the router reads. ``with_shared``: a map of that and the
            absolute hidden values of the shared block. ``neurons``: the absolute activation of a
            neuron for each expert (CMoE, arXiv:2502.04416, eq. 8); ``signed_neurons``: with its
            sign.
    """

    weight: Tensor
    bias: Tensor | None = None
    up: Tensor | None = None
    scoring: Scoring = "linear"


class Shared(NamedTuple):
    """A block that every token runs, with the experts' activation and bounds.

    Attributes:
        gate: ``(S, D)``, or None if the experts are not gated.
        up: ``(S, D)``; None if there is no block but an output bias alone.
        down: ``(D, S)``, its weight None if there is no block.
        weigh: ``(1, D)``, the map of what the block reads whose sigmoid weighs its answer
            (Qwen2-MoE), or None.
    """

    gate: Linear | None
    up: Linear | None
    down: Linear
    weigh: Tensor | None = None


NO_SHARED: Final = Shared(None, None, Linear(None, None))  # type: ignore[arg-type]


def moe_step(
    hidden: Tensor,
    norm: Norm,
    router: Scorer,
    w_in: Tensor,
    w_out: Tensor,
    *,
    top_k: int,
    activation: str,
    gated: bool,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    softmax: bool = True,
    normalize: bool = True,
    factor: float = 1.0,
    selection_bias: Tensor | None = None,
    scales: Tensor | None = None,
    shared: Shared = NO_SHARED,
    router_input: Tensor | None = None,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
    read: Tensor | None = None,
) -> Callable[[], None]:
    """Prepare ``hidden += shared(x) + Σ g_e expert_e(x)`` over each token's best experts.

    ``x = norm(hidden)``, or ``norm(read)``.

    Args:
        hidden: ``(B, D)``.
        norm: before the block.
        router: what scores the experts; its products are taken in fp32.
        w_in: ``(E, I, D)``, the gate's rows first.
        w_out: ``(E, D, F)``.
        top_k: experts per token; among equals those of higher logits, then the lower number.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        gated: whether the experts are gated linear units.
        bias_in: ``(E, I)`` or None.
        bias_out: ``(E, D)`` or None.
        softmax: scores are a softmax of the logits, otherwise sigmoids.
        normalize: divide the chosen scores by their sum.
        factor: multiplies the weights.
        selection_bias: ``(E,)`` fp32, added to the scores for the choice alone.
        scales: ``(E,)`` fp32: weights become one more than themselves times these (CMoE's
            ``1 + s' u``); or None.
        shared: what every token runs.
        router_input: ``(B, D)``, what the router reads in place of ``x``; it may change in place
            from call to call, or be ``hidden`` itself. A shared block reads ``x`` all the same, so
            not with ``with_shared``.
        glu: bounds of the factors of experts and shared block.
        interleaved: the gate's rows and the linear ones of the experts lie in turn.
        read: ``(B, D)``, what the norm reads in place of ``hidden``; it may change in place.

    Raises:
        ValueError: ``with_shared`` without a shared block, or with a ``router_input``.
    """
    batch, width = hidden.shape
    num_experts, _, hidden_width = w_out.shape
    shared_width = 0 if shared.up is None else shared.up.weight.shape[0]
    if router.scoring == "with_shared" and (not shared_width or router_input is not None):
        raise ValueError("with_shared: the router reads x and a shared block; give both alone")
    slots = batch * top_k
    per_token = 4 * (width + shared_width) + 3 * num_experts
    floats = batch * per_token + slots * (1 + hidden_width + w_in.shape[1])
    nothing = Linear(None, None)  # type: ignore[arg-type]
    parts = (shared.gate or nothing, shared.up or nothing, shared.down)
    return native.Prepared(
        "moezoo_moe_step",
        hidden,
        read,
        norm.weight,
        router_input,
        router.weight,
        router.up,
        router.bias,
        selection_bias,
        scales,
        w_in,
        w_out,
        bias_in,
        bias_out,
        *(part.weight for part in parts),
        *(part.bias for part in parts),
        shared.weigh,
        native.floats(floats),
        torch.empty_like(hidden),
        torch.empty(slots, dtype=torch.int64),
        native.dtype_code(hidden.dtype),
        batch,
        width,
        hidden_width,
        num_experts,
        top_k,
        shared_width,
        ACTIVATION_CODES[activation],
        gated,
        *glu.encode(),
        interleaved,
        _CODES[router.scoring],
        softmax,
        normalize,
        float(factor),
        float(norm.eps),
    )
