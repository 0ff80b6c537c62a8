"""What a mixture has around its experts, as neurons see it: maps to another width, and norms."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moezoo.experts import MLPExperts
from moezoo.experts.norms import InputNorm, OutputNorm
from moezoo.layers.sparse_moe import SparseMoE
from moezoo_kernels.linear import linear


class Around(NamedTuple):
    """The parts that a mixture has, each None where there is none.

    Attributes:
        down: from the tokens to what experts read.
        input_norm: after it.
        output_norm: of an expert's output, before it is weighed.
        up: from the weighed sum to the layer's output.
    """

    down: nn.Linear | None = None
    input_norm: InputNorm | None = None
    output_norm: OutputNorm | None = None
    up: nn.Linear | None = None

    def read(self, tokens_RD: Tensor) -> Tensor:
        """Return what experts read of tokens."""
        if self.down is not None:
            tokens_RD = self.down(tokens_RD)
        return tokens_RD if self.input_norm is None else self.input_norm(tokens_RD)

    def factors(self, experts: MLPExperts, expert: int, inner_RF: Tensor) -> Tensor | float:
        """Return what multiplies all that an expert's neurons write for a token, ``(R, 1)``.

        A norm is linear in them but for this.
        """
        if self.output_norm is None:
            return 1.0
        bias = None if experts.down_bias is None else experts.down_bias[expert]
        outputs_RD = linear(inner_RF, experts.down_proj[expert], bias)
        return self.output_norm.factors(outputs_RD).to(inner_RF.dtype)

    def written(self, values_MD: Tensor) -> Tensor:
        """Return what the values of neurons are in the layer's output."""
        if self.output_norm is not None:
            values_MD = values_MD * (1.0 + self.output_norm.weight)
        if self.up is not None:
            values_MD = self.up(values_MD)
        return values_MD


def around(layer: SparseMoE) -> Around:
    """Return what a mixture has around its experts."""
    if layer.d_latent is None:
        return Around(None, layer.input_norm, layer.output_norm, None)
    return Around(layer.latent_down, layer.input_norm, layer.output_norm, layer.latent_up)
