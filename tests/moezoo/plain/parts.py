"""What the plain references share: activations, feed-forward blocks of one token, and their answer.

Nothing here is imported from moezoo. A function takes ``weights``, a layer's parameters and buffers
by their names in its state dict, and ``options``, the ``init_args`` of its ``config()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Options = Mapping[str, Any]


class Call(NamedTuple):
    """What a layer is called with, beside the hidden states.

    ``earlier`` are the counts of the micro-batches before this one of the same optimizer step.
    ``handed`` collects what the router hands on, token by token.
    """

    training: bool
    mask: Tensor | None = None
    router_input: Tensor | None = None
    token_ids: Tensor | None = None
    positions: Tensor | None = None
    embeddings: Tensor | None = None
    earlier: list[int] | None = None
    router_state: Tensor | None = None
    handed: list[Tensor] | None = None


class Answer(NamedTuple):
    """What a layer has to return, and what its call has to leave behind.

    ``counts`` are the assignments of each slot before any limit, of real tokens only. ``state``
    holds buffers that the call changes, ``router_state`` what the router hands on.
    """

    hidden: Tensor
    losses: dict[str, Tensor]
    counts: list[int] | None = None
    state: Mapping[str, Tensor] = {}
    router_state: Tensor | None = None


def activation(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return torch.where(x > 0, x, 0.0)
    if name == "relu2":
        return torch.where(x > 0, x * x, 0.0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    if name == "tanh":
        return (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)
    if name == "leaky_relu":
        return torch.where(x > 0, x, x / 100)
    assert name == "gelu_tanh", name
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def gate_factor(name: str, gate: Tensor, glu: Options) -> Tensor:
    """Return a gated unit's activation, bounded as GPT-OSS, Step-3.7 or Inkling 2 do it."""
    if (cap := glu["gate_softcap"]) is not None:
        assert name == "silu"
        return cap * torch.tanh(gate / cap) * sigmoid(gate)
    if (limit := glu["limit"]) is None:
        return activation(name, gate)
    if not glu["limit_after"]:
        return activation(name, torch.where(gate > limit, limit, gate))
    value = activation(name, gate)
    return torch.where(value > limit, limit, value)


def gated_unit(name: str, gate: Tensor, up: Tensor, glu: Options) -> Tensor:
    """Multiply activation and linear factor, both bounded."""
    if glu["gate_softcap"] is not None:
        up = glu["up_softcap"] * torch.tanh(up / glu["up_softcap"])
    elif (limit := glu["limit"]) is not None:
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return gate_factor(name, gate, glu) * (up + glu["up_shift"])


UNBOUNDED = {"limit": None, "limit_after": False, "up_shift": 0.0, "gate_softcap": None}


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.detach().max())
    return powers / powers.sum()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def best(scores: Tensor, how_many: int) -> list[int]:
    """Return the places of the largest numbers, the largest first."""
    return sorted(range(len(scores)), key=scores.tolist().__getitem__, reverse=True)[:how_many]


def tokens_of(hidden: Tensor, call: Call) -> tuple[Sequence[Tensor], Sequence[Tensor], list[bool]]:
    """Return the tokens one by one, what chooses for each, and which are real."""
    width = hidden.shape[-1]
    tokens = hidden.reshape(-1, width).unbind()
    asking = tokens
    if call.router_input is not None:
        asking = call.router_input.reshape(-1, width).unbind()
    real = [True] * len(tokens) if call.mask is None else call.mask.reshape(-1).tolist()
    return tokens, asking, real


def stacked(rows: Sequence[Tensor], hidden: Tensor) -> Tensor:
    return torch.stack(list(rows)).reshape(hidden.shape)


def dense_block(weights: Weights, prefix: str, options: Options, x_D: Tensor) -> Tensor:
    """Apply one dense block, ``W_down act(W_up x)`` or ``W_down (act(W_gate x) * W_up x)``."""
    return _project(weights, f"{prefix}down_proj", dense_hidden(weights, prefix, options, x_D))


def dense_hidden(weights: Weights, prefix: str, options: Options, x_D: Tensor) -> Tensor:
    """Return the hidden activations of one dense block."""
    inner_F = _project(weights, f"{prefix}up_proj", x_D)
    if not options["gated"]:
        return activation(options["activation"], inner_F)
    if (name := options.get("activation_up")) is not None:
        inner_F = activation(name, inner_F)
    glu = options.get("glu", UNBOUNDED)
    return gated_unit(
        options["activation"], _project(weights, f"{prefix}gate_proj", x_D), inner_F, glu
    )


def _project(weights: Weights, name: str, read: Tensor) -> Tensor:
    made = weights[f"{name}.weight"] @ read
    bias = weights.get(f"{name}.bias")
    return made if bias is None else made + bias


class Experts:
    """Blocks with stacked weights, of which any one is applied to one token."""

    def __init__(self, weights: Weights, prefix: str, options: Options) -> None:
        self.activation = options["activation"]
        self.gated = options.get("gated", False)
        self.glu = options.get("glu", UNBOUNDED)
        self.in_turn = options.get("interleaved", False)
        names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        self.up, self.down, self.up_bias, self.down_bias = (
            weights[prefix + name].unbind() if prefix + name in weights else None for name in names
        )

    def __call__(
        self, expert: int, x_D: Tensor, scale_F: Tensor | None = None, output_bias: bool = True
    ) -> Tensor:
        """Return the answer of an expert; ``scale_F`` multiplies its hidden neurons."""
        inner_F = self.up[expert] @ x_D
        if self.up_bias is not None:
            inner_F = inner_F + self.up_bias[expert]
        if self.gated:  # the gate's rows come first, or are the even ones
            half = len(inner_F) // 2
            gate_F, up_F = inner_F[:half], inner_F[half:]
            if self.in_turn:
                gate_F, up_F = inner_F[::2], inner_F[1::2]
            inner_F = gated_unit(self.activation, gate_F, up_F, self.glu)
        else:
            inner_F = activation(self.activation, inner_F)
        if scale_F is not None:
            inner_F = inner_F * scale_F
        answer_D = self.down[expert] @ inner_F
        if self.down_bias is not None and output_bias:
            answer_D = answer_D + self.down_bias[expert]
        return answer_D
