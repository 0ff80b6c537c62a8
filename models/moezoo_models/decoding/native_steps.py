"""The steps of a block's parts by the C++ kernels, for the layers that these know.

Each function returns None where there is no such step; torch's operators then do the same.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moezoo.experts import ExpertNormOptions, MLPExperts
from moezoo.feed_forward import FeedForward
from moezoo.layers.carved_moe import CarvedMoE
from moezoo.layers.dense import DenseFFN
from moezoo.layers.selective_ffn import SelectiveFFN
from moezoo.layers.sigma_moe import SigmaMoE
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.matrices.masked import Latent
from moezoo.routing import LogitOptions, Router, RouterOptions, WeightOptions
from moezoo.routing.neuron import NeuronRouter
from moezoo.selection import ThresholdSelector
from moezoo_kernels import large_pages, token_step
from moezoo_kernels.grouped_mlp import cpu
from moezoo_kernels.layouts import is_column_major
from moezoo_kernels.linear import is_plain_linear
from moezoo_kernels.moe_step import NO_SHARED, Scorer, Scoring, Shared, moe_step
from moezoo_kernels.selective_mlp import NO_THRESHOLDS, Thresholds
from moezoo_kernels.selective_mlp.cpu import laid
from moezoo_kernels.sparse_linear import GroupSparse
from moezoo_kernels.token_step import Angles, Cache, Linear, Norm, SparseLinear
from moezoo_models.model.attention import Attention
from moezoo_models.model.norm import RMSNorm

_MOST_SELECTIVE = 8
"""With more sequences, nearly every column is kept by one of them, and rows are read faster."""

_MOST_GROUPED = 2
"""Sequences up to which N:M weights are read faster than multiplied whole; with four they tie."""

_ZERO_AT_REST = ("relu", "relu2")
"""Activations that are zero for half of their inputs, whatever the thresholds."""

_FEWEST_SKIPPING = 16
"""Tokens for which it is worth while to lay a matrix by columns, of a block that has zeros."""


def native_attention(
    attention: Attention, norm: RMSNorm, hidden: Tensor, angles: Angles, cache: Cache
) -> Callable[[int], None] | None:
    """Return the step of a block's attention, in place on ``hidden``, ``(batch, hidden_size)``."""
    query, key, value, out = (
        Linear(part.weight, part.bias)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    norms = [n for n in (attention.q_norm, attention.k_norm) if isinstance(n, RMSNorm)]
    query_norm, key_norm = (n.weight for n in norms) if norms else (None, None)
    tensors = (*query, *key, *value, *out, query_norm, key_norm, norm.weight)
    same_eps = all(n.eps == norm.eps for n in norms)
    if not same_eps or not token_step.usable(hidden, *tensors, *angles[:2], *cache[:2]):
        return None
    return token_step.attention_step(
        hidden,
        Norm(norm.weight, norm.eps),
        query,
        key,
        value,
        out,
        angles,
        cache,
        scale=attention.scaling,
        query_norm=query_norm,
        key_norm=key_norm,
        window=attention.sliding_window,
    )


def native_feed_forward(
    layer: FeedForward,
    norm: RMSNorm,
    hidden: Tensor,
    router_input: Tensor | None = None,
    first_position: int = 0,
    read: Tensor | None = None,
    new_tokens: int = 0,
) -> Callable[[], None] | None:
    """Return the step of a feed-forward block, in place on ``hidden``.

    Args:
        layer: the block.
        norm: before it.
        hidden: ``(batch, hidden_size)``.
        router_input: of the same shape, what the router reads if not what the experts read.
        first_position: the least position in its text of a token that is to come.
        read: of the shape of ``hidden``, what the norm reads in its place, in parallel blocks.
        new_tokens: so many are to come at most.
    """
    before = Norm(norm.weight, norm.eps)
    if type(layer) is DenseFFN:
        sparse = _sparse(layer, before, hidden, read)
        return sparse or _dense(layer, before, hidden, read, new_tokens)
    if type(layer) is SelectiveFFN and layer.first_tokens <= first_position:
        return _selective(layer, before, hidden, read)
    if (type(layer) is SparseMoE and _is_plain(layer)) or type(layer) is SigmaMoE:
        return _mixture(layer, before, hidden, router_input, read)
    if type(layer) is CarvedMoE:
        return _carved(layer, before, hidden, router_input, read)
    return None


def _is_plain(layer: SparseMoE) -> bool:
    """Return whether it is a router, experts at full width, at most a shared one, and no more."""
    more = layer.d_latent or layer.num_idle_experts
    more = more or layer.expert_norms != ExpertNormOptions()
    alike = layer.shared_glu in (None, layer.glu)
    return not more and alike and layer.gate.capacity is None


def _dense(
    layer: DenseFFN, norm: Norm, hidden: Tensor, read: Tensor | None, new_tokens: int
) -> Callable[[], None] | None:
    parts = [layer.gate_proj] if layer.gated else []
    parts += [layer.up_proj, layer.down_proj]
    if any(not is_plain_linear(part) and not isinstance(part, Latent) for part in parts):
        return None
    # A sparse matrix is made once for a text, and not anew for every token.
    maps = [
        Linear(part.weight.detach() if isinstance(part, Latent) else part.weight, part.bias)
        for part in parts
    ]
    if not token_step.usable(hidden, norm.weight, *(tensor for each in maps for tensor in each)):
        return None
    gate = maps[0] if layer.gated else None
    up, down = maps[-2:]
    name, glu, relu_up = layer.activation, layer.glu, layer.activation_up is not None
    if not _skips_zeros(layer, len(hidden), new_tokens):
        return token_step.dense_step(
            hidden, norm, gate, up, down, name, glu, relu_up=relu_up, read=read
        )
    # A copy: a model that is trained on keeps its layout.
    by_columns = down._replace(weight=large_pages.copied(down.weight.t()).t())
    options = (NO_THRESHOLDS, name, glu)
    return token_step.selective_step(
        hidden, norm, gate, up, by_columns, *options, relu_up=relu_up, read=read
    )


def _sparse(
    layer: DenseFFN, norm: Norm, hidden: Tensor, read: Tensor | None
) -> Callable[[], None] | None:
    """Return the step of a block whose matrices are faster without their zeros; else None."""
    if layer.activation_up is not None:
        return None
    parts = [layer.gate_proj] if layer.gated else []
    parts += [layer.up_proj, layer.down_proj]
    maps = []
    for part in parts:
        packed = None
        if isinstance(part, Latent):
            packed = part.packed(hidden.new_empty(len(hidden), part.in_features))
        if packed is None or (isinstance(packed, GroupSparse) and len(hidden) > _MOST_GROUPED):
            return None
        maps.append(SparseLinear(packed, part.bias))
    tensors = [tensor for each in maps for tensor in (each.matrix.values, each.bias)]
    if not token_step.usable(hidden, norm.weight, *tensors):
        return None
    gate = maps[0] if layer.gated else None
    up, down = maps[-2:]
    return token_step.sparse_step(
        hidden, norm, gate, up, down, layer.activation, layer.glu, read=read
    )


def _skips_zeros(layer: DenseFFN, sequences: int, new_tokens: int) -> bool:
    """Return whether enough hidden values are exactly zero to leave out what they multiply.

    Sequences share what is read. One of them alone finds a half of the neurons of any ReLU at zero.
    """
    most = _MOST_SELECTIVE if layer.trains_sparse else 1
    zeros = layer.activation in _ZERO_AT_REST or layer.activation_up is not None
    return zeros and sequences <= most and new_tokens >= _FEWEST_SKIPPING


def _selective(
    layer: SelectiveFFN, norm: Norm, hidden: Tensor, read: Tensor | None
) -> Callable[[], None] | None:
    parts = [layer.gate_proj] if layer.gated else []
    parts += [layer.up_proj, layer.down_proj]
    rule = layer.selector
    if type(rule) is not ThresholdSelector or rule.factors:
        return None
    if any(not is_plain_linear(part) for part in parts):
        return None
    tensors = [tensor for part in parts for tensor in (*laid(part.weight), part.bias)]
    if not token_step.usable(hidden, norm.weight, *tensors):
        return None
    if len(hidden) <= _MOST_SELECTIVE:
        _lay_by_columns(layer, rule)
    maps = [Linear(part.weight, part.bias) for part in parts]
    up, down = maps[-2:]
    gate, thresholds = None, Thresholds(input=rule.input, hidden=rule.hidden)
    if layer.gated:
        gate = maps[0]
        thresholds = Thresholds(rule.input, rule.up_input, rule.gate, rule.hidden)
    options = (thresholds, layer.activation, layer.glu)
    return token_step.selective_step(hidden, norm, gate, up, down, *options, read=read)


def _lay_by_columns(layer: SelectiveFFN, rule: ThresholdSelector) -> None:
    """Lay matrices of which tokens skip inputs column by column, so that these are not read.

    Parameters keep their numbers, shapes and names: only their strides change, once. Up keeps its
    rows if the gate says which of them are read.
    """
    sparse = layer.activation in _ZERO_AT_REST
    by_gate = layer.gated and (sparse or bool(rule.gate.any()))
    skipping = {"down": by_gate or sparse or bool(rule.hidden.any())}
    if layer.gated:
        skipping["gate"] = bool(rule.input.any())
        skipping["up"] = not by_gate and bool(rule.up_input.any())
    else:
        skipping["up"] = bool(rule.input.any())
    for name, skips in skipping.items():
        if skips:
            weight = layer.get_parameter(f"{name}_proj.weight")
            if not is_column_major(weight):
                weight.data = large_pages.copied(weight.t()).t()


def _mixture(
    layer: SparseMoE | SigmaMoE,
    norm: Norm,
    hidden: Tensor,
    router_input: Tensor | None,
    read: Tensor | None,
) -> Callable[[], None] | None:
    gate, experts = layer.gate, layer.experts
    options = gate.options
    if type(gate) is not Router or not _is_known(options):
        return None
    shared = _shared(layer) if type(layer) is SparseMoE and layer.d_shared else NO_SHARED
    if shared is None or not _is_usable(experts, gate, shared, norm, hidden):
        return None
    return moe_step(
        hidden,
        norm,
        Scorer(gate.weight),
        experts.gate_up_proj,
        experts.down_proj,
        top_k=gate.top_k,
        activation=experts.activation,
        gated=experts.gated,
        bias_in=experts.gate_up_bias,
        bias_out=experts.down_bias,
        softmax=options.score == "softmax",
        normalize=options.normalize,
        factor=options.scale,
        selection_bias=gate.selection_bias if options.selection_bias else None,
        shared=shared,
        router_input=router_input,
        glu=experts.glu,
        interleaved=experts.interleaved,
        read=read,
    )


_SCORING: dict[str, Scoring] = {"linear": "linear", "shared": "with_shared", "neuron": "neurons"}


def _carved(
    layer: CarvedMoE,
    norm: Norm,
    hidden: Tensor,
    router_input: Tensor | None,
    read: Tensor | None,
) -> Callable[[], None] | None:
    gate, experts = layer.gate, layer.experts
    if type(gate) is not NeuronRouter or (layer.router == "shared" and router_input is not None):
        return None
    shared = _shared(layer, layer.b_out)
    if shared is None or not _is_usable(experts, gate, shared, norm, hidden):
        return None
    scoring = "signed_neurons" if gate.score == "neuron" and gate.signed else _SCORING[layer.router]
    return moe_step(
        hidden,
        norm,
        Scorer(gate.weight, gate.bias, gate.up_weight, scoring),
        experts.gate_up_proj,
        experts.down_proj,
        top_k=gate.top_k,
        activation=experts.activation,
        gated=experts.gated,
        bias_in=experts.gate_up_bias,
        normalize=False,
        selection_bias=gate.selection_bias,
        scales=layer.u.float(),
        shared=shared,
        router_input=router_input,
        read=read,
    )


def _shared(layer: SparseMoE | CarvedMoE, output_bias: Tensor | None = None) -> Shared | None:
    """Return the block that every token runs, with an output bias; None if parts are replaced."""
    if isinstance(layer, CarvedMoE) and not layer.num_shared_experts:
        return Shared(None, None, Linear(None, output_bias))  # type: ignore[arg-type]
    block = layer.shared_expert
    parts = block.projections()
    weigh = layer.shared_expert_gate if getattr(layer, "shared_gate", False) else None
    linear = all(part is None or is_plain_linear(part) for part in (*parts.values(), weigh))
    if type(block) is not DenseFFN or not linear:
        return None
    gate, up, down = (parts.get(f"{name}_proj") for name in ("gate", "up", "down"))
    assert up is not None
    assert down is not None
    return Shared(
        None if gate is None else Linear(gate.weight, gate.bias),
        Linear(up.weight, up.bias),
        Linear(down.weight, down.bias if output_bias is None else output_bias),
        weigh.weight if isinstance(weigh, nn.Linear) else None,
    )


def _is_usable(
    experts: MLPExperts, gate: Router, shared: Shared, norm: Norm, hidden: Tensor
) -> bool:
    """Return whether the kernel runs these experts on the tokens at hand."""
    tensors: list[Tensor | None] = [norm.weight, experts.gate_up_proj, experts.down_proj]
    maps = (shared.gate, shared.up, shared.down)
    tensors += [tensor for part in maps if part is not None for tensor in part]
    tensors += [shared.weigh, experts.gate_up_bias, experts.down_bias, *gate.parameters()]
    return (
        experts.mesh is None
        and cpu.is_few(len(hidden) * gate.top_k, gate.num_experts, hidden.dtype)
        and token_step.usable(hidden, *tensors)
    )


def _is_known(options: RouterOptions) -> bool:
    """Return whether the kernel routes by these options, in evaluation."""
    return (
        options.choice == "token"
        and options.score in ("softmax", "sigmoid")
        and options.select_on == "score"
        and options.num_groups == 1
        and options.logits == LogitOptions()
        and options.weights in (WeightOptions(), WeightOptions(eps=_default_eps(options)))
    )


def _default_eps(options: RouterOptions) -> float:
    return 0.0 if options.score == "softmax" else 1e-20


def native_head(head: nn.Linear, norm: RMSNorm, hidden: Tensor) -> Callable[[], Tensor] | None:
    """Return the last norm and the output projection: a function that returns the logits."""
    if not token_step.usable(hidden, norm.weight, head.weight, head.bias):
        return None
    return token_step.head_step(hidden, Norm(norm.weight, norm.eps), Linear(head.weight, head.bias))
