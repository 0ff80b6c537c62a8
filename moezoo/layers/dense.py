"""The dense feed-forward block that everything else in the zoo replaces.

MLP: ``y = W_down act(W_up x)`` (Vaswani et al. 2017, arXiv:1706.03762, eq. 2).
GLU: ``y = W_down (act(W_gate x) * W_up x)`` (Shazeer 2020, arXiv:2002.05202, eq. 6).
dReLU: ``y = W_down (relu(W_gate x) * relu(W_up x))`` (Song et al. 2024, arXiv:2406.05955, eq. 4).

A projection is a plain linear map, or what :mod:`moezoo.matrices` has in its place.

Blocks that train to be sparse add ``c mean_t Σ_j |h_tj|`` to the loss, h the hidden activations
(Cetin et al. 2026, arXiv:2603.23198). It is a sum over neurons: twice as many want half of c.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moezoo.arguments import as_argument
from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.feed_forward import (
    Cost,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense_weights import Activation, DenseWeights, check_glu, default_width
from moezoo.matrices import Matrices, Matrix, build_matrix
from moezoo.matrices.factored import shuffled_unit
from moezoo.routing.deferred import statistics
from moezoo.routing.losses import masked_mean
from moezoo.routing.neuron_stats import neuron_stats
from moezoo.routing.stats import SlotLoad, neuron_load
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions, gated_unit
from moezoo_kernels.gated_unit import gated_unit as in_one_pass
from moezoo_kernels.linear import Linear

__all__ = ["Activation", "DenseFFN", "check_glu", "default_width"]


def _init(linear: nn.Linear | Matrix, std: float) -> None:
    if isinstance(linear, Matrix):
        linear.reset_parameters(std)
    else:
        init_linear(linear, std)


def _check_activation_up(
    name: Literal["relu"] | None, gated: bool, glu: GLUOptions
) -> Literal["relu"] | None:
    if name is None:
        return None
    check_choice("activation_up", name, ("relu",))
    if not gated:
        raise InputError("activation_up: an MLP has one factor; set gated: true, or leave it out")
    if glu != PLAIN_GLU:
        raise InputError("activation_up: it bounds the factor that glu bounds; leave out one")
    return name


class DenseFFN(DenseWeights[nn.Linear | Matrix]):
    """Dense MLP or gated linear unit, under Llama's tensor names.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width; default 4 d_model, or 8/3 d_model rounded up to 16 when gated.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: a gated linear unit (three matrices) instead of an MLP (two).
        bias: whether the projections have biases.
        glu: bounds of the gated linear unit's factors (GPT-OSS, DeepSeek-V4, Step-3.7).
        activation_up: ``relu``: the gated linear unit's other factor passes a ReLU too (dReLU);
            None: it is linear.
        l1: coefficient c of the hidden activations' L1 norm in the loss; 0 for none. The model adds
            up its blocks: what a paper gives for their mean is to be divided by their number.
        l1_warmup: optimizer steps in which c rises from ``l1 / l1_warmup``; 0 for none.
        matrices: what all projections are in place of plain linear maps, and its options: factors
            of low rank or of blocks, or sparse matrices; None for linear maps.

    A block with ``activation_up`` or ``l1`` has ``stats``: ``tokens``; ``density``, the mean share
    of neurons that are not zero; ``usage``, the share of neurons that were not zero for some token,
    so that ``1 - usage`` are dead; ``unevenness``, the divergence of the neurons' summed magnitudes
    from uniform, in nats; and up to 4096 neurons, ``expert_counts`` (F,), how often each was not
    zero. Others have none.
    """

    l1_step: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        glu: GLUOptions = PLAIN_GLU,
        activation_up: Literal["relu"] | None = None,
        l1: float = 0.0,
        l1_warmup: int = 0,
        matrices: Matrices | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, activation, gated, bias, glu)
        self.activation_up = _check_activation_up(activation_up, gated, self.glu)
        self.l1 = check_number("l1", l1)
        self.l1_warmup = check_int("l1_warmup", l1_warmup, minimum=0)
        if l1_warmup and not l1:
            raise InputError("l1_warmup: there is no l1 to warm up; set l1, or leave it out")
        if l1_warmup:
            self.register_buffer("l1_step", torch.zeros((), dtype=torch.int64))
        self.matrices = as_argument(DenseFFN, "matrices", matrices)
        self._add_projections()
        self.reset_parameters()

    def _linear(self, inputs: int, outputs: int, reads_hidden: bool = False) -> nn.Linear | Matrix:
        if self.matrices is None:
            return Linear(inputs, outputs, bias=self.bias)
        return build_matrix(self.matrices, inputs, outputs, self.bias, reads_hidden=reads_hidden)

    def projections(self) -> dict[str, nn.Linear | Matrix]:
        """Return the projections by name, in the order in which they are computed."""
        names = ("up_proj", "gate_proj", "down_proj") if self.gated else ("up_proj", "down_proj")
        return {name: getattr(self, name) for name in names}

    def _matrices(self) -> dict[str, Matrix]:
        found = self.projections().items()
        return {name: matrix for name, matrix in found if isinstance(matrix, Matrix)}

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw weights from N(0, 1/fan_in); the output's further / sqrt(2 num_layers)."""
        if self.gated:
            _init(self.gate_proj, self.d_model**-0.5)
        _init(self.up_proj, self.d_model**-0.5)
        # Half of the linear factors are cut off, and with them half of the variance.
        gain = 2**0.5 if self.activation_up else 1.0
        _init(self.down_proj, gain * output_std(self.d_ff, num_layers))
        if self.l1_warmup:
            nn.init.zeros_(self.l1_step)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Apply the block to every token; a mask changes nothing, as no token sees another."""
        tokens, _, mask_T = self._flatten(hidden, context)
        if brute_force:
            inner_TF, output_TD = self._brute_force(tokens)
            output = output_TD.reshape(hidden.shape)
            size_T = sum((value_T.abs() for value_T in inner_TF.unbind(-1)), tokens.new_zeros(()))
            losses = self._matrix_losses()
            if self.l1:
                losses["l1"] = self._coefficient(size_T) * masked_mean(size_T, mask_T)
            stats = self._stats(inner_TF.detach(), mask_T) if self.trains_sparse else {}
            return FeedForwardOutput(output, losses, stats)
        inner = self.inner(hidden)
        output = self.down_proj(inner)
        if not self.trains_sparse:
            return FeedForwardOutput(output, self._matrix_losses(), {})
        inner_TF = inner.reshape(-1, self.d_ff)
        deferred = statistics(self, self._stats, inner_TF, mask_T)
        return FeedForwardOutput(output, self._losses(inner_TF, mask_T), deferred)

    @property
    def has_slots(self) -> bool:
        """Whether its neurons are counted, :attr:`trains_sparse`."""
        return self.trains_sparse

    @property
    def trains_sparse(self) -> bool:
        """Whether it has ``l1`` or ``activation_up``, and so counts the neurons that are active."""
        return self.l1 > 0 or self.activation_up is not None

    def _losses(self, inner_TF: Tensor, mask_T: Tensor | None) -> dict[str, Tensor]:
        losses = self._matrix_losses()
        if self.l1:
            wide = torch.promote_types(inner_TF.dtype, torch.float32)
            size_T = torch.linalg.vector_norm(inner_TF, ord=1, dim=-1, dtype=wide)
            losses["l1"] = self._coefficient(size_T) * masked_mean(size_T, mask_T)
        return losses

    def _matrix_losses(self) -> dict[str, Tensor]:
        """Add up the losses of the matrices, in training."""
        losses: dict[str, Tensor] = {}
        if self.training:
            for matrix in self._matrices().values():
                for name, value in matrix.losses().items():
                    losses[name] = losses[name] + value if name in losses else value
        return losses

    def _coefficient(self, like: Tensor) -> float | Tensor:
        """Return c of the step that is being computed, in the dtype of a tensor."""
        if not self.l1_warmup:
            return self.l1
        return self.l1 * ((self.l1_step + 1).to(like.dtype) / self.l1_warmup).clamp(max=1.0)

    def step(self, progress: float | None = None) -> None:
        """Count an optimizer step that is taken, in the warm-up of the L1 loss; move matrices."""
        super().step(progress)
        if self.l1_warmup:
            self.l1_step += 1

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad | None:
        """Count how often each neuron is not zero, and sum up its magnitude."""
        if not self.trains_sparse:
            return None
        _, _, mask_T = self._flatten(hidden, context)
        return neuron_load(self.inner(hidden).reshape(-1, self.d_ff), mask_T)[0]

    def _stats(self, inner_TF: Tensor, mask_T: Tensor | None) -> dict[str, Tensor]:
        return neuron_stats(*neuron_load(inner_TF, mask_T), mask_T)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Apply the block to every token, without checks."""
        output: Tensor = self.down_proj(self.inner(hidden))
        return output

    def inner(self, hidden: Tensor) -> Tensor:
        """Return the values of the hidden neurons, ``(..., d_ff)``."""
        if not self.gated:
            return ACTIVATIONS[self.activation](self.up_proj(hidden))
        up, gate = self.up_proj, self.gate_proj
        if self.activation_up is None:
            values = shuffled_unit(gate, up, hidden, self.activation, self.glu)
            if values is not None:
                return values
        # In this order, as matrices whose gradient is sampled draw in it.
        factor = up(hidden)
        return self._gate(gate(hidden), factor)

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.activation_up is not None:
            up = ACTIVATIONS[self.activation_up](up)
        # Beside products of factors the gating weighs more: one pass, which keeps no value.
        unit = gated_unit if self.matrices is None else in_one_pass
        return unit(gate, up, self.activation, self.glu)

    @torch.no_grad()
    def take(self, neurons: Tensor) -> DenseFFN:
        """Return a plain block of some of the neurons, ``(K,)`` int64, with copied weights."""
        with torch.device("meta"):
            small = DenseFFN(
                self.d_model,
                neurons.numel(),
                activation=self.activation,  # type: ignore[arg-type]
                gated=self.gated,
                bias=self.bias,
                glu=self.glu,
                activation_up=self.activation_up,
            )
        for name, linear in self.projections().items():
            weight, bias = linear.weight, linear.bias
            if name == "down_proj":
                taken = {"weight": weight.index_select(1, neurons)}
                taken |= {} if bias is None else {"bias": bias.clone()}
            else:
                taken = {"weight": weight.index_select(0, neurons)}
                taken |= {} if bias is None else {"bias": bias.index_select(0, neurons)}
            for last, tensor in taken.items():
                parameter = nn.Parameter(tensor, requires_grad=False)
                setattr(small.get_submodule(name), last, parameter)
        return small.train(self.training)

    def _brute_force(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden values ``(T, F)`` and outputs ``(T, D)``, neuron by neuron."""
        if self.matrices is None:
            inner_TF = torch.stack([self._neuron(tokens, j) for j in range(self.d_ff)], dim=-1)
            return inner_TF, self._sum_of_neurons(inner_TF)
        made = self._matrices()
        up = made["up_proj"].reference(tokens)
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            inner_TF = act(up)
        elif self.activation_up is not None:
            inner_TF = act(made["gate_proj"].reference(tokens)) * up.where(up > 0, 0.0)
        else:
            gate = made["gate_proj"].reference(tokens)
            inner_TF = gated_unit(gate, up, self.activation, self.glu)
        return inner_TF, made["down_proj"].reference(inner_TF)

    def _neuron(self, tokens: Tensor, j: int) -> Tensor:
        """Return one neuron's values, ``(T,)``."""
        act = ACTIVATIONS[self.activation]
        up = tokens @ self.up_proj.weight[j]
        if self.up_proj.bias is not None:
            up = up + self.up_proj.bias[j]
        if not self.gated:
            return act(up)
        gate = tokens @ self.gate_proj.weight[j]
        if self.gate_proj.bias is not None:
            gate = gate + self.gate_proj.bias[j]
        if self.activation_up is not None:
            return act(gate) * up.where(up > 0, 0.0)
        return gated_unit(gate, up, self.activation, self.glu)

    def cost(self) -> Cost:
        """Every parameter is active; 4 d f FLOPs, 6 d f when gated; or what its matrices cost."""
        if self.matrices is not None:
            costs = [matrix.cost() for matrix in self._matrices().values()]
            return Cost(*(sum(each) for each in zip(*map(astuple, costs), strict=True)))
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
    Method(
        "drelu",
        DenseFFN,
        Paper(
            "Song et al.",
            2024,
            "Turbo Sparse: Achieving LLM SOTA Performance with Minimal Activated Parameters",
            "2406.05955",
        ),
        {"activation": "relu", "activation_up": "relu"},
    ),
    Method(
        "l1_reglu",
        DenseFFN,
        Paper(
            "Cetin et al.",
            2026,
            "Sparser, Faster, Lighter Transformer Language Models",
            "2603.23198",
        ),
        {"activation": "relu", "l1": 2e-5},
    ),
)
