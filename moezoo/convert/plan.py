"""The expert plan: which neurons of a dense block make up each expert, and the router.

A gated block computes ``down @ (act(gate @ x) * (up @ x))``; its neuron i is row i of gate and up
and column i of down. An expert is a list of neurons, possibly scaled, possibly with some of them
drawn anew. Copying (upcycling) and cutting up (carving) differ only in the lists.

Shapes: D d_model, F hidden width of the dense block, m neurons of an expert, N routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class Expert:
    """One expert, cut from a dense block.

    Attributes:
        neurons: ``(m,)`` int64, in the expert's order.
        in_scale: factor on the rows of gate and up.
        out_scale: factor on the columns of down.
        redrawn: positions in ``neurons`` whose weights are drawn anew, the same ones in gate, up
            and down; None for none.
        seed: of those draws.
        bias_scale: factor on the output's bias, where each expert adds it.
        block: which dense block they are of, where there are several.
    """

    neurons: Tensor
    in_scale: float = 1.0
    out_scale: float = 1.0
    redrawn: Tensor | None = None
    seed: int = 0
    bias_scale: float = 1.0
    block: int = 0

    def cut(self, projection: Projection, weight: Tensor) -> Tensor:
        """Cut this expert's part out of a dense projection, in its dtype.

        Args:
            projection: which one.
            weight: ``(F, D)`` for gate and up, ``(D, F)`` for down.

        Returns:
            ``(m, D)`` for gate and up, ``(D, m)`` for down.
        """
        axis = 1 if projection == "down" else 0
        scale = self.out_scale if projection == "down" else self.in_scale
        part = _take(weight, axis, self.neurons)
        if self.redrawn is not None and self.redrawn.numel():
            part = self._redraw(part, axis, self.seed + PROJECTIONS.index(projection))
        return _scaled(part, scale)

    def cut_bias(self, bias: Tensor) -> Tensor:
        """Cut this expert's part out of the dense block's inner bias, ``(F,)`` to ``(m,)``."""
        return _scaled(_take(bias, 0, self.neurons), self.in_scale)

    def cut_output_bias(self, bias: Tensor) -> Tensor:
        """Scale the dense block's output bias, ``(D,)``, as this expert adds it."""
        return _scaled(bias, self.bias_scale)

    def _redraw(self, part: Tensor, axis: int, seed: int) -> Tensor:
        """Draw the chosen neurons from N(mean, std) of the weights they replace."""
        assert self.redrawn is not None
        old = part.index_select(axis, self.redrawn).float()
        noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
        fresh = old.mean() + old.std(correction=0) * noise
        return part.index_copy(axis, self.redrawn, fresh.to(part.dtype))


def _take(weight: Tensor, axis: int, neurons: Tensor) -> Tensor:
    """Return rows or columns: a view where they follow each other, so that copies cost nothing."""
    first, count = int(neurons[0]), neurons.numel()
    if torch.equal(neurons, torch.arange(first, first + count, device=neurons.device)):
        return weight.narrow(axis, first, count)
    return weight.index_select(axis, neurons.to(weight.device))


def _scaled(part: Tensor, scale: float) -> Tensor:
    """Multiply in fp32 at least; one leaves everything as it is, views too."""
    if scale == 1.0:
        return part
    return (part.to(torch.promote_types(part.dtype, torch.float32)) * scale).to(part.dtype)


@dataclass(frozen=True)
class LayerPlan:
    """How one dense block becomes a mixture.

    Attributes:
        experts: the N routed experts, of equal size.
        top_k: how many of them a token is routed to.
        router: ``(N, D)`` fp32: logits are ``router @ x``.
        router_bias: ``(N,)`` fp32, added to ``router @ x``; None for none.
        router_neurons: ``(N,)`` int64, if every expert is scored by one neuron (CMoE,
            arXiv:2502.04416, eq. 8): logits are then ``|act(router @ x) * (router_up @ x)|``, or
            ``|act(router @ x + router_bias)|`` of a plain MLP. None for a linear router.
        router_up: ``(N, D)`` fp32, those neurons' rows of ``up``, if the block is gated.
        signed: leave the sign of those neurons' activations.
        reads_shared: the router reads the shared expert's absolute activations beside x, and is
            ``(N, D + d_shared)``.
        weighting: of the chosen experts: ``normalized`` to sum 1 (softmax over the chosen), the
            plain ``softmax`` over all experts, or ``unit``: each counts fully.
        shared: an expert that runs on every token.
        down: ``(D, F)``, used instead of the dense block's (a refit); None for that.
        bias: ``(D,)`` fp32, added to every output instead of the dense block's; None for that.
        flatness: small factor on the logits where unit weights have to be written as sigmoids
            that are normalized: the smaller, the closer to equal.
    """

    experts: tuple[Expert, ...]
    top_k: int
    router: Tensor
    router_bias: Tensor | None = None
    router_neurons: Tensor | None = None
    router_up: Tensor | None = None
    signed: bool = False
    reads_shared: bool = False
    weighting: Literal["normalized", "softmax", "unit"] = "normalized"
    shared: Expert | None = None
    down: Tensor | None = None
    bias: Tensor | None = None
    flatness: float = 2.0**-8

    @property
    def num_experts(self) -> int:
        """The number of routed experts."""
        return len(self.experts)

    @property
    def d_expert(self) -> int:
        """Neurons per routed expert."""
        return self.experts[0].neurons.numel()

    @property
    def d_shared(self) -> int:
        """Neurons of the shared expert, 0 without."""
        return 0 if self.shared is None else self.shared.neurons.numel()

    def run(
        self,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        act: Callable[[Tensor], Tensor] = F.silu,
        bias_in: Tensor | None = None,
        bias_out: Tensor | None = None,
    ) -> Tensor:
        """Compute the mixture as this plan defines it, expert by expert.

        Args:
            x: ``(T, D)``.
            gate: ``(F, D)`` of the dense block; None for a plain MLP.
            up: ``(F, D)``.
            down: ``(D, F)``.
            act: the activation.
            bias_in: ``(F,)``, added before the activation of a plain MLP.
            bias_out: ``(D,)``, added once to every output.

        Returns:
            ``(T, D)``, in the dtype of ``x``.
        """
        refitted = down if self.down is None else self.down
        offset = bias_out if self.bias is None else self.bias

        def answer(expert: Expert) -> Tensor:
            inner = self._inner(expert, x, gate, up, act, bias_in)
            return inner @ expert.cut("down", refitted).to(x.dtype).t()

        dense_TN = self.weights(self.router_input(x, gate, up, act, bias_in), act).to(x.dtype)
        output = torch.zeros_like(x) if self.shared is None else answer(self.shared)
        for e, expert in enumerate(self.experts):
            output = output + dense_TN[:, e : e + 1] * answer(expert)
        return output if offset is None else output + offset.to(x.dtype)

    def router_input(
        self,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        act: Callable[[Tensor], Tensor] = F.silu,
        bias_in: Tensor | None = None,
    ) -> Tensor:
        """Return what the router reads: x, and ``|h|`` of shared neurons if it ``reads_shared``.

        Arguments are those of :meth:`run`.
        """
        if not self.reads_shared:
            return x
        assert self.shared is not None
        return torch.cat([x, self._inner(self.shared, x, gate, up, act, bias_in).abs()], dim=1)

    def _inner(
        self,
        expert: Expert,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        act: Callable[[Tensor], Tensor],
        bias_in: Tensor | None,
    ) -> Tensor:
        row_bias = None if bias_in is None else expert.cut_bias(bias_in).to(x.dtype)
        inner = F.linear(x, expert.cut("up", up).to(x.dtype), row_bias)
        if gate is None:
            return act(inner)
        return act(x @ expert.cut("gate", gate).to(x.dtype).t()) * inner

    def logits(self, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
        """Score every expert for every token, ``(T, N)`` fp32, or fp64 for fp64 inputs.

        Args:
            x: what the router reads, of :meth:`router_input`.
            act: the activation.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        bias = None if self.router_bias is None else self.router_bias.to(wide.dtype)
        logits_TN = F.linear(wide, self.router.to(wide.dtype), bias)
        if self.router_neurons is None:
            return logits_TN
        logits_TN = act(logits_TN)
        if self.router_up is not None:
            logits_TN = logits_TN * F.linear(wide, self.router_up.to(wide.dtype))
        return logits_TN if self.signed else logits_TN.abs()

    def weights(self, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
        """Return every expert's weight for every token, ``(T, N)``; 0 where it is not chosen.

        Arguments are those of :meth:`logits`.
        """
        logits_TN = self.logits(x, act)
        # By a stable sort, ties go to the lower expert: copies of one row stay together.
        chosen_TK = logits_TN.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        if self.weighting == "softmax":
            weights_TK = logits_TN.softmax(dim=-1).gather(1, chosen_TK)
        elif self.weighting == "normalized":
            weights_TK = logits_TN.gather(1, chosen_TK).softmax(dim=-1)
        else:
            weights_TK = torch.ones_like(chosen_TK, dtype=logits_TN.dtype)
        return torch.zeros_like(logits_TN).scatter(1, chosen_TK, weights_TK)
