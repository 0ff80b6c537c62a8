"""The activation functions of :mod:`moezoo_kernels.activations` for Triton kernels.

Each is its argument times a share, which its derivative needs too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_share(x: tl.tensor) -> tl.tensor:
    """Return tanh(x) / x: Lambert's continued fraction below 1, which has digits near 0."""
    size = tl.abs(x)
    small, large = tl.minimum(size, 1.0), tl.maximum(size, 1.0)
    square = small * small
    near = ((square + 105.0) * square + 945.0) / ((15.0 * square + 420.0) * square + 945.0)
    falling = tl.exp(-2.0 * large)
    return tl.where(size < 1.0, near, (1.0 - 2.0 * falling / (1.0 + falling)) / large)


@triton.jit
def tanh_slope(x: tl.tensor) -> tl.tensor:
    """Return the derivative of tanh."""
    falling = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * falling / ((1.0 + falling) * (1.0 + falling))


@triton.jit
def share_of(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return s with act(x) = x s: the number of ``ACTIVATION_CODES``."""
    if ACTIVATION == 0:  # relu
        return tl.where(x > 0, 1.0, 0.0)
    if ACTIVATION == 1:  # gelu
        return 0.5 * (1.0 + tl.math.erf(0.7071067811865476 * x))
    if ACTIVATION == 2:  # gelu_tanh, as (1 + tanh(z)) / 2 = sigmoid(2 z)
        return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    if ACTIVATION == 3:  # silu
        return tl.sigmoid(x)
    if ACTIVATION == 4:  # relu2
        return tl.where(x > 0, x, 0.0)
    if ACTIVATION == 5:  # quick_gelu
        return tl.sigmoid(1.702 * x)
    if ACTIVATION == 6:
        return tanh_share(x)
    # leaky_relu
    return tl.where(x > 0, 1.0, 0.01)


@triton.jit
def slope_of(x: tl.tensor, share: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return the derivative of x s."""
    if ACTIVATION == 0:
        return share
    if ACTIVATION == 1:
        return share + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    if ACTIVATION == 2:
        inner = 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)
        return share + x * share * (1.0 - share) * inner
    if ACTIVATION == 3:
        return share * (1.0 + x * (1.0 - share))
    if ACTIVATION == 4:
        return 2.0 * share
    if ACTIVATION == 5:
        return share * (1.0 + 1.702 * x * (1.0 - share))
    if ACTIVATION == 6:
        return tanh_slope(x)
    return share


@triton.jit
def bounded_gate(
    gate: tl.tensor, share: tl.tensor, BOUND: tl.constexpr, GATE: tl.constexpr
) -> tl.tensor:
    """Return the bounded value of act(gate); ``BOUND`` is the kind of ``GLUOptions.encode``."""
    if BOUND == 3:
        return gate * tanh_share(gate / GATE) * share
    value = gate * share
    if BOUND == 2:
        value = tl.where(value > GATE, GATE, value)
    return value


@triton.jit
def bounded_up(
    up: tl.tensor, BOUND: tl.constexpr, UP: tl.constexpr, SHIFT: tl.constexpr
) -> tl.tensor:
    """Return the bounded linear factor of a gated unit."""
    if BOUND == 3:
        up = up * tanh_share(up / UP)
    elif BOUND != 0:
        up = tl.where(up > UP, UP, tl.where(up < -UP, -UP, up))
    if SHIFT != 0.0:
        up += SHIFT
    return up
