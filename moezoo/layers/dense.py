"""The dense feed-forward block that everything else in the zoo replaces.

MLP: ``y = W_down act(W_up x)`` (Vaswani et al. 2017, arXiv:1706.03762, eq. 2).
GLU: ``y = W_down (act(W_gate x) * W_up x)`` (Shazeer 2020, arXiv:2002.05202, eq. 6).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moezoo.arguments import as_options
from moezoo.errors import InputError, check_choice, check_int
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions, gated_unit

Activation = Literal[
    "relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu", "tanh", "leaky_relu"
]


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


class DenseFFN(FeedForward):
    """Dense MLP or gated linear unit, under Llama's tensor names.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width; default 4 d_model, or 8/3 d_model rounded up to 16 when gated.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: a gated linear unit (three matrices) instead of an MLP (two).
        bias: whether the projections have biases.
        glu: bounds of the gated linear unit's factors (GPT-OSS, DeepSeek-V4, Step-3.7).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        glu: GLUOptions = PLAIN_GLU,
    ) -> None:
        super().__init__(d_model)
        self.d_ff = default_width(d_model, gated) if d_ff is None else check_int("d_ff", d_ff)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.bias = bias
        self.glu = check_glu(glu, activation, gated)
        if gated:
            self.gate_proj = nn.Linear(d_model, self.d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, self.d_ff, bias=bias)
        self.down_proj = nn.Linear(self.d_ff, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw weights from N(0, 1/fan_in); the output's further / sqrt(2 num_layers)."""
        if self.gated:
            init_linear(self.gate_proj, self.d_model**-0.5)
        init_linear(self.up_proj, self.d_model**-0.5)
        init_linear(self.down_proj, output_std(self.d_ff, num_layers))

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Apply the block to every token; a mask changes nothing, as no token sees another."""
        tokens, _, _ = self._flatten(hidden, context)
        if brute_force:
            output = self._neuron_by_neuron(tokens).reshape(hidden.shape)
            return FeedForwardOutput(output, {}, {})
        return FeedForwardOutput(self.infer(hidden), {}, {})

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the block to every token, without checks."""
        output: Tensor = self.down_proj(self.inner(hidden))
        return output

    def inner(self, hidden: Tensor) -> Tensor:
        """Return the values of the hidden neurons, ``(..., d_ff)``."""
        up: Tensor = self.up_proj(hidden)
        if not self.gated:
            return ACTIVATIONS[self.activation](up)
        return gated_unit(self.gate_proj(hidden), up, self.activation, self.glu)

    @torch.no_grad()
    def take(self, neurons: Tensor) -> DenseFFN:
        """Return a block of some of the neurons, ``(K,)`` int64, with copies of their weights."""
        with torch.device("meta"):
            small = DenseFFN(
                self.d_model,
                neurons.numel(),
                activation=self.activation,  # type: ignore[arg-type]
                gated=self.gated,
                bias=self.bias,
                glu=self.glu,
            )
        for name, parameter in self.named_parameters():
            if name == "down_proj.weight":
                taken = parameter.index_select(1, neurons)
            elif name == "down_proj.bias":
                taken = parameter.clone()
            else:
                taken = parameter.index_select(0, neurons)
            path, _, last = name.rpartition(".")
            setattr(small.get_submodule(path), last, nn.Parameter(taken, requires_grad=False))
        return small.train(self.training)

    def _neuron_by_neuron(self, tokens: Tensor) -> Tensor:
        """Sum over hidden neurons one by one: ``y = Σ_j act_j(x) W_down[:, j]``."""
        act = ACTIVATIONS[self.activation]
        output = torch.zeros_like(tokens)
        for j in range(self.d_ff):
            up = tokens @ self.up_proj.weight[j]
            if self.up_proj.bias is not None:
                up = up + self.up_proj.bias[j]
            value = up if self.gated else act(up)
            if self.gated:
                gate = tokens @ self.gate_proj.weight[j]
                if self.gate_proj.bias is not None:
                    gate = gate + self.gate_proj.bias[j]
                value = gated_unit(gate, up, self.activation, self.glu)
            output = output + value[:, None] * self.down_proj.weight[:, j]
        if self.down_proj.bias is not None:
            output = output + self.down_proj.bias
        return output

    def cost(self) -> Cost:
        """Every parameter is active; 4 d f FLOPs, 6 d f when gated."""
        matrices = 3 if self.gated else 2
        biases = (matrices - 1) * self.d_ff + self.d_model if self.bias else 0
        parameters = matrices * self.d_model * self.d_ff + biases
        return Cost(
            total_parameters=parameters,
            active_parameters=parameters,
            flops_per_token=2 * matrices * self.d_model * self.d_ff,
            bytes_per_token=parameters * self.up_proj.weight.element_size(),
        )


register(
    Method(
        "dense_mlp",
        DenseFFN,
        Paper("Vaswani et al.", 2017, "Attention Is All You Need", "1706.03762"),
        {"gated": False, "activation": "relu"},
    ),
    Method(
        "dense_glu",
        DenseFFN,
        Paper("Shazeer", 2020, "GLU Variants Improve Transformer", "2002.05202"),
    ),
)
