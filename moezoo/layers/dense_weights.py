"""The weights of a dense block, under Llama's tensor names, whatever is computed with them."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from torch import Tensor, nn

from moezoo.arguments import as_options
from moezoo.errors import InputError, check_choice, check_int
from moezoo.feed_forward import FeedForward
from moezoo.matrices import Matrix
from moezoo_kernels.activations import ACTIVATIONS, GLUOptions

Activation = Literal[
    "relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu", "tanh", "leaky_relu"
]

Projection = TypeVar("Projection", bound=nn.Linear | Matrix)


def default_width(d_model: int, gated: bool) -> int:
    """Return the usual hidden width: 4 d, or 8/3 d rounded up to a multiple of 16 for a GLU."""
    return -(-8 * d_model // 48) * 16 if gated else 4 * d_model


def check_glu(glu: GLUOptions, activation: str, gated: bool, name: str = "glu") -> GLUOptions:
    """Return the bounds of a gated linear unit, given as they are or as a mapping, if they fit.

    Raises:
        InputError: they do not, or are neither; the message calls them ``name``.
    """
    glu = as_options(name, glu, GLUOptions)
    try:
        glu.check(activation, gated, name)
    except ValueError as error:
        raise InputError(str(error)) from None
    return glu


class DenseWeights(FeedForward, Generic[Projection]):
    """A block with the projections of an MLP or gated linear unit; subclasses compute with them.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width F; None for 4 d_model, or 8/3 d_model rounded up to 16 when gated.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        gated: a gated linear unit (three matrices) instead of an MLP (two).
        bias: whether the projections have biases.
        glu: bounds of the gated linear unit's factors.

    Attributes:
        gate_proj: ``(F, D)``, if gated.
        up_proj: ``(F, D)``.
        down_proj: ``(D, F)``.
    """

    gate_proj: Projection
    up_proj: Projection
    down_proj: Projection

    def __init__(
        self,
        d_model: int,
        d_ff: int | None,
        activation: Activation,
        gated: bool,
        bias: bool,
        glu: GLUOptions,
    ) -> None:
        super().__init__(d_model)
        self.d_ff = default_width(d_model, gated) if d_ff is None else check_int("d_ff", d_ff)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.bias = bias
        self.glu = check_glu(glu, activation, gated)

    def _linear(self, inputs: int, outputs: int, reads_hidden: bool = False) -> Projection:
        """Build a projection; one that reads the hidden neurons, if so."""
        raise NotImplementedError

    def _add_projections(self) -> None:
        """Build all of them, when options that they depend on are known."""
        if self.gated:
            self.gate_proj = self._linear(self.d_model, self.d_ff)
        self.up_proj = self._linear(self.d_model, self.d_ff)
        self.down_proj = self._linear(self.d_ff, self.d_model, reads_hidden=True)

    def _sum_of_neurons(self, inner_TF: Tensor) -> Tensor:
        """Sum over hidden neurons one by one: ``y = Σ_j h_j W_down[:, j]``."""
        output = inner_TF.new_zeros(len(inner_TF), self.d_model)
        for j in range(self.d_ff):
            output = output + inner_TF[:, j, None] * self.down_proj.weight[:, j]
        if self.down_proj.bias is not None:
            output = output + self.down_proj.bias
        return output
