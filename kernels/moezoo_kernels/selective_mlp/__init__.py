"""A feed-forward block that computes with what its thresholds keep, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from moezoo_kernels import backends, native, triton_support
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.selective_mlp import cpu, op, plain, reference
from moezoo_kernels.selective_mlp.thresholds import NO_THRESHOLDS, Thresholds


def selective_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds = NO_THRESHOLDS,
    *,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    activation: str = "silu",
    glu: GLUOptions = PLAIN_GLU,
    dense: Tensor | None = None,
) -> Tensor:
    """Compute a feed-forward block of the numbers that exceed thresholds; others count as zeros.

    With ``keep(v, t)`` being v where ``|v| > t`` or v is NaN, else 0, of each token::

        g = act(w_gate @ keep(x, input) + bias_gate)
        u = w_up @ keep(x, up_input) + bias_up
        h = keep(g, gate) * u
        y = w_down @ keep(h, hidden) + bias_down

    or, without a gate, ``h = keep(act(w_up @ keep(x, input) + bias_up), gate)``. Thresholds of zero
    are the dense block. They express what is published as contextual sparsity: CATS
    (arXiv:2404.08763) sets ``gate``, TEAL (arXiv:2408.14690) ``input``, ``up_input`` and
    ``hidden``, WINA (arXiv:2505.19427) the same, divided by the norms of columns.

    The gradient flows through what is kept; what is kept has none. Saved for the backward is what
    torch's operators save: the fused backends have no backward, and plain torch runs where a
    gradient is wanted. Same inputs give bit-identical results, with any number of threads.

    Where gate and down lie column by column (:func:`moezoo_kernels.layouts.column_major`), the C++
    backend reads of them what is kept alone.

    Args:
        x: ``(T, D)`` tokens, any floating dtype.
        w_gate: ``(M, D)``, ``x``'s dtype like all weights and biases; None if there is no gate.
        w_up: ``(M, D)``.
        w_down: ``(D, M)``.
        thresholds: per channel, fp32.
        bias_gate: ``(M,)`` or None.
        bias_up: ``(M,)`` or None.
        bias_down: ``(D,)`` or None.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        glu: bounds of a gated linear unit's factors, and a shift of the linear one; the threshold
            of the gate applies to the bounded activation.
        dense: ``(T,)`` bool, tokens that keep everything; None if there are none.

    Returns:
        ``(T, D)``, in the dtype of ``x`` (or of autocast).

    Raises:
        ValueError: shapes or dtypes do not fit together, thresholds or ``glu`` that do not fit the
            block, unknown activation, or a forced backend that cannot run.
    """
    return counted(
        x,
        w_gate,
        w_up,
        w_down,
        thresholds,
        bias_gate=bias_gate,
        bias_up=bias_up,
        bias_down=bias_down,
        activation=activation,
        glu=glu,
        dense=dense,
    )[0]


def counted(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds = NO_THRESHOLDS,
    *,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    activation: str = "silu",
    glu: GLUOptions = PLAIN_GLU,
    dense: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`selective_mlp` does, and how much of the matrices each token has used.

    Returns:
        ``(T, D)``; and ``(T, 4)`` int64: the inputs kept of the first matrix and of up beside a
        gate (else 0), the neurons that went on, and the hidden units that down has read.
    """
    x, w_up, w_down = autocast(x), autocast(w_up), autocast(w_down)
    w_gate, bias_gate, bias_up, bias_down = (
        None if t is None else autocast(t) for t in (w_gate, bias_gate, bias_up, bias_down)
    )
    _check_unit(activation, w_gate is not None, glu)
    _check(x, w_gate, w_up, w_down, thresholds, (bias_gate, bias_up, bias_down), dense)
    few = x.device.type != "cpu" or cpu.is_few(len(x), x.dtype)
    prefer = None if few else "torch"
    return backends.choose("selective_mlp", x.device, x.dtype, prefer=prefer)(
        x,
        w_gate,
        w_up,
        w_down,
        thresholds,
        bias_gate=bias_gate,
        bias_up=bias_up,
        bias_down=bias_down,
        activation=activation,
        glu=glu,
        dense=dense,
    )


def _fused(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds,
    *,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    glu: GLUOptions,
    dense: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    biases = (bias_gate, bias_up, bias_down)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w_gate, w_up, w_down, *biases)
    ):
        return plain.selective_mlp(
            x,
            w_gate,
            w_up,
            w_down,
            thresholds,
            bias_gate=bias_gate,
            bias_up=bias_up,
            bias_down=bias_down,
            activation=activation,
            glu=glu,
            dense=dense,
        )
    options = (activation, list(glu.encode()), dense, backend)
    return op.selective_mlp(x, w_gate, w_up, w_down, *thresholds, *biases, *options)


def _torch(x: Tensor, *operands: Tensor | Thresholds | None, **options: object) -> object:
    possible = x.device.type == "cpu" and cpu.is_few(len(x), x.dtype)
    if possible and not torch.compiler.is_compiling():
        native.warn_once()
    return plain.selective_mlp(x, *operands, **options)  # type: ignore[arg-type]


def _check_unit(activation: str, gated: bool, glu: GLUOptions) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: '{activation}' is not known; choose from: {known}")
    glu.check(activation, gated)


def _check(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    dense: Tensor | None,
) -> None:
    if x.ndim != 2 or w_up.ndim != 2 or x.shape[1] != w_up.shape[1]:
        shapes = f"x {tuple(x.shape)}, w_up {tuple(w_up.shape)}"
        raise ValueError(f"selective_mlp: give x (T, D) and w_up (M, D), not {shapes}")
    hidden, width = w_up.shape
    if w_gate is None and (thresholds.up_input is not None or biases[0] is not None):
        name = "bias_gate" if biases[0] is not None else "thresholds.up_input"
        raise ValueError(f"{name}: there is no gate; give w_gate, or leave it out")
    for name, tensor, shape in (
        ("w_gate", w_gate, (hidden, width)),
        ("w_up", w_up, (hidden, width)),
        ("w_down", w_down, (width, hidden)),
        ("bias_gate", biases[0], (hidden,)),
        ("bias_up", biases[1], (hidden,)),
        ("bias_down", biases[2], (width,)),
    ):
        _check_tensor(name, tensor, shape, x.dtype)
    sizes = {"input": width, "up_input": width, "gate": hidden, "hidden": hidden}
    for name, threshold in thresholds._asdict().items():
        _check_tensor(f"thresholds.{name}", threshold, (sizes[name],), torch.float32)
    _check_tensor("dense", dense, (len(x),), torch.bool)


def _check_tensor(
    name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> None:
    if tensor is None:
        return
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: shape is {tuple(tensor.shape)}, the others ask for {tuple(shape)}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: dtype is {tensor.dtype}; give {dtype}")


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "selective_mlp",
    backends.Backend("cpu", partial(_fused, backend="cpu"), native.unusable),
    backends.Backend("triton", partial(_fused, backend="triton"), triton_support.unusable),
    backends.Backend("torch", _torch, _anywhere),
    backends.Backend("reference", reference.selective_mlp, _anywhere),
)

__all__ = ["NO_THRESHOLDS", "Thresholds", "counted", "selective_mlp"]
