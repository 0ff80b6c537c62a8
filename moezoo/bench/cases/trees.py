"""Fast feedforward trees: inference against a dense block, and against the authors' package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Gradients,
    Package,
    Peer,
    Problem,
    Setting,
    Target,
    Work,
    plain_torch,
)
from moezoo.bench.inputs import decided, sign_margin
from moezoo.layers.dense import DenseFFN
from moezoo.layers.fast_feed_forward import FastFeedForward
from moezoo.layers.ultra_fast_fff import UltraFastFFF

_FASTFEEDFORWARD = Package("fastfeedforward", "pip install fastfeedforward")


@dataclass(frozen=True)
class _Path:
    """A tree of neurons, its tokens, and how it is called."""

    layer: UltraFastFFF
    x: Tensor
    ours: Contender


@dataclass(frozen=True)
class _Leaves:
    """A tree with leaves, its tokens, and how it is called."""

    layer: FastFeedForward
    x: Tensor
    ours: Contender


def _build_path(setting: Setting) -> Problem:
    """One tree: each token uses depth + 1 of its neurons."""
    tokens, width, depth = setting["T"], setting["d"], setting["depth"]
    with torch.device(setting.device):
        layer = UltraFastFFF(width, num_trees=1, depth=depth).to(setting.dtype).eval()
    weight, bias = layer.in_weight.flatten(0, 1).float(), layer.in_bias.flatten().float()
    x = decided(
        lambda count: setting.normal(count, width),
        lambda drawn: sign_margin(drawn.float() @ weight.t() + bias),
        tokens,
    )
    ours = Contender(lambda: layer(x).hidden, {})
    neurons = min(tokens * (depth + 1), layer.num_nodes)
    read = (2 * neurons * width + tokens * width) * setting.item
    work = Work(4.0 * tokens * (depth + 1) * width, read, x.nbytes)
    return Problem(ours, work, work, _Path(layer, x, ours))


def _dense(parts: _Path) -> Contender:
    """A dense block as wide as the tree."""
    layer = parts.layer
    block = DenseFFN(
        layer.d_model,
        layer.num_nodes,
        activation=layer.activation,  # type: ignore[arg-type]
        gated=False,
        bias=True,
    )
    block = block.to(parts.x.device, parts.x.dtype)
    return Contender(lambda: block(parts.x).hidden, {}, note="equal width, another function")


def _masked(parts: _Path) -> Contender:
    """As in training: compute all neurons, and mask those that are not on the path."""
    layer = parts.layer

    def forward() -> Tensor:
        try:
            return layer.train()(parts.x).hidden
        finally:
            layer.eval()

    return Contender(forward, {}, note="all neurons, masked")


def _plain(parts: _Path | _Leaves) -> Contender:
    return plain_torch(parts.ours, "tree_descent", "path_neurons", "leaf_mlp")


def _build_leaves(setting: Setting, training: bool) -> Problem:
    """Hard inference, or soft training without the hardening loss, which the package leaves out.

    In inference the package drops its leaves' output bias: there it is zero here.
    """
    tokens, width, depth, leaf = (setting[name] for name in ("T", "d", "depth", "leaf"))
    with torch.device(setting.device):
        layer = FastFeedForward(width, depth=depth, d_leaf=leaf, hardening=0.0)
    layer = layer.to(setting.dtype).train(training)
    tree, leaves = layer.tree, layer.leaves
    assert leaves.gate_up_bias is not None
    assert leaves.down_bias is not None
    if not training:
        nn.init.zeros_(leaves.down_bias)
    x = decided(
        lambda count: setting.normal(count, width),
        lambda drawn: sign_margin(tree.logits(drawn)),
        tokens,
    )
    operands = {}
    if training:
        x.requires_grad_()
        operands = {
            "x": x,
            "nodes": tree.weight,
            "node biases": tree.bias,
            "w_in": leaves.gate_up_proj,
            "w_out": leaves.down_proj,
            "b_in": leaves.gate_up_bias,
            "b_out": leaves.down_bias,
        }
    ours = Contender(lambda: layer(x).hidden, operands)
    work, step_work = _leaves_work(layer, x, training)
    return Problem(ours, work, step_work, _Leaves(layer, x, ours))


def _leaves_work(layer: FastFeedForward, x: Tensor, training: bool) -> tuple[Work, Work]:
    """All nodes and leaves in training; a path and a leaf per token in inference."""
    item, tokens = x.element_size(), len(x)
    per_leaf = layer.leaves.flops_per_assignment()
    leaf_bytes = layer.leaves.parameters_per_expert() * item
    node_bytes = layer.d_model * item
    nodes, leaves = layer.tree.num_nodes, layer.num_experts
    if training:
        flops = float(tokens) * (2 * nodes * layer.d_model + leaves * per_leaf)
        weights = nodes * node_bytes + leaves * leaf_bytes
    else:
        flops = float(tokens) * (2 * layer.depth * layer.d_model + per_leaf)
        weights = min(tokens * layer.depth, nodes) * node_bytes
        weights += min(tokens, leaves) * leaf_bytes
    forward = Work(flops, weights + x.nbytes, x.nbytes)
    return forward, Work(3 * flops, 2 * (weights + x.nbytes), weights + 2 * x.nbytes)


def _fastfeedforward(parts: _Leaves) -> Contender:
    from fastfeedforward import FFF

    layer, tree, leaves = parts.layer, parts.layer.tree, parts.layer.leaves
    theirs: Any = FFF(layer.d_model, layer.d_leaf, layer.d_model, layer.depth)
    theirs = theirs.to(parts.x.device).train(layer.training)
    theirs.node_weights = nn.Parameter(tree.weight.detach())
    theirs.node_biases = nn.Parameter(tree.bias.detach().unsqueeze(-1))
    theirs.w1s = nn.Parameter(leaves.gate_up_proj.detach().mT.contiguous())
    theirs.w2s = nn.Parameter(leaves.down_proj.detach().mT.contiguous())
    assert leaves.gate_up_bias is not None
    assert leaves.down_bias is not None
    theirs.b1s = nn.Parameter(leaves.gate_up_bias.detach())
    theirs.b2s = nn.Parameter(leaves.down_bias.detach())
    operands = {}
    if layer.training:
        operands = {
            "x": parts.x,
            "nodes": theirs.node_weights,
            "node biases": theirs.node_biases,
            "w_in": theirs.w1s,
            "w_out": theirs.w2s,
            "b_in": theirs.b1s,
            "b_out": theirs.b2s,
        }

    def as_ours(found: Gradients) -> Gradients:
        if not found:
            return found
        turned = {name: found[name].mT for name in ("w_in", "w_out")}
        return {**found, **turned, "node biases": found["node biases"].squeeze(-1)}

    note = "" if layer.training else "leaves' output bias zero, which the package drops"
    return Contender(lambda: theirs(parts.x), operands, as_ours, note=note)


def _path_case(
    tokens: int,
    depth: int,
    target: float | None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Case:
    wanted = None if target is None else Target(forward=target)
    series = "FFF inference: depth of the tree" if tokens > 1 and device == "cpu" else ""
    peers = {
        "dense": Peer(_dense, same=False, target=wanted),
        "masked": Peer(_masked),
        PLAIN: Peer(_plain),
    }
    suffix = "-cuda" if device == "cuda" else ""
    return Case(
        f"fff-path-{2 ** (depth + 1) - 1}-t{tokens}{suffix}",
        "layer",
        "FFF path, inference",
        {"T": tokens, "d": 768, "depth": depth},
        {"T": min(tokens, 12), "d": 16, "depth": 3},
        _build_path,
        peers,
        device=device,
        step=False,
        threads=1 if tokens == 1 else None,
        series=series,
        size="depth" if series else "",
        ops=("path_neurons",),
    )


def _leaves_case(training: bool, target: Target) -> Case:
    mode = "training" if training else "inference"
    return Case(
        f"fff-leaves-{mode}",
        "layer",
        f"FFF with leaves, {mode}",
        # The package's training step at 512 tokens of width 512 takes most of a minute.
        {"T": 128 if training else 512, "d": 256 if training else 512, "depth": 8, "leaf": 16},
        {"T": 12, "d": 16, "depth": 3, "leaf": 4},
        partial(_build_leaves, training=training),
        {
            "fastfeedforward": Peer(_fastfeedforward, _FASTFEEDFORWARD, target=target),
            PLAIN: Peer(_plain),
        },
        step=training,
        ops=() if training else ("tree_descent", "leaf_mlp"),
    )


CASES = [
    _path_case(1, 11, 30.0),
    _path_case(2048, 7, None),
    _path_case(2048, 9, None),
    _path_case(2048, 11, 10.0),
    _leaves_case(False, Target(forward=30.0)),
    _leaves_case(True, Target(step=50.0)),
    *(_path_case(tokens, 11, 30.0, "cuda") for tokens in (1, 8, 64)),
]
