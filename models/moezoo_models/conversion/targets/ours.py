"""Our own decoder as a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moezoo.convert.plan import Expert, LayerPlan
from moezoo.errors import InputError
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.conversion.source import FAMILIES, Source
from moezoo_models.conversion.targets.base import (
    Output,
    Plan,
    Read,
    Target,
    constant_output,
    router_output,
    shared_outputs,
    stacked_outputs,
)
from moezoo_models.conversion.targets.mixture import Mixture


class Moezoo(Target):
    """:class:`moezoo_models.MoezooForCausalLM` with :class:`moezoo.SparseMoE` or
    :class:`moezoo.CarvedMoE` in any layers.
    """

    name = "moezoo"
    families = tuple(FAMILIES)
    shared = True
    weightings = ("normalized", "softmax", "unit")
    carved = True

    def check(self, source: Source, mixture: Mixture) -> None:
        """Refuse a router that could never learn, and parts of no whole number of experts."""
        super().check(source, mixture)
        if mixture.weighting == "unit" and mixture.d_shared % mixture.d_expert:
            raise InputError(
                "shared: carved blocks share a whole number of experts; change shared or experts"
            )
        if mixture.top_k == 1 and mixture.weighting == "normalized":
            raise InputError(
                "top_k: a single normalized weight is always 1 and the router would never learn; "
                "choose top_k 2 or more, or weighting softmax"
            )

    def block_problem(self, source: Source) -> str | None:
        """Hold all of them."""
        return None

    def can_skip(self, layers: tuple[int, ...], num_layers: int) -> bool:
        """Any can."""
        return True

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Add a rule for the mixtures to what the dense model is as ours."""
        config = dense_config(source.raw)
        by_top_k: dict[int, list[int]] = {}
        for layer in mixture.layers:
            by_top_k.setdefault(mixture.top_k_of(layer), []).append(layer)
        make = _carved_rule if mixture.weighting == "unit" else _sparse_rule
        rules = [
            {"layers": layers, **make(replace(mixture, top_k=top_k))}
            for top_k, layers in by_top_k.items()
        ]
        config.ffn = [*config.ffn, *rules]
        config.check()
        config.architectures = ["MoezooForCausalLM"]
        return config.to_diff_dict()

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """List the router, the two stacks and the shared expert."""
        start = f"model.layers.{layer}.mlp"
        yield router_output(f"{start}.gate.weight", plan, mixture)
        if mixture.weighting == "unit":
            yield from _carved_outputs(start, plan, mixture, read)
        names = (f"{start}.experts.gate_up_proj", f"{start}.experts.down_proj")
        yield from stacked_outputs(*names, plan, mixture, read)
        yield from shared_outputs(f"{start}.shared_expert", plan, mixture, read)
        if mixture.bias:
            yield from _bias_outputs(start, plan, mixture, read)


def _bias_outputs(start: str, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
    """List the biases of plain MLPs' experts; carved ones have that of the output in one place."""
    dtype, carved = mixture.dtype, mixture.weighting == "unit"

    def inner() -> Iterator[Tensor]:
        for expert in plan().experts:
            yield expert.cut_bias(read(expert.block)["bias_in"])

    def outer(experts: Callable[[], Sequence[Expert]]) -> Iterator[Tensor]:
        for expert in experts():
            yield expert.cut_output_bias(read(expert.block)["bias_out"])

    def of_shared() -> tuple[Expert]:
        shared = plan().shared
        assert shared is not None
        return (shared,)

    def inner_of_shared() -> Iterator[Tensor]:
        (shared,) = of_shared()
        yield shared.cut_bias(read(shared.block)["bias_in"])

    routed, shared = f"{start}.experts", f"{start}.shared_expert"
    shape = (mixture.num_experts, mixture.d_expert)
    yield Output(f"{routed}.gate_up_bias", shape, dtype, inner)
    if not carved:
        shape = (mixture.num_experts, mixture.d_model)
        of_routed = partial(outer, lambda: plan().experts)
        yield Output(f"{routed}.down_bias", shape, dtype, of_routed)
    if mixture.d_shared:
        yield Output(f"{shared}.up_proj.bias", (mixture.d_shared,), dtype, inner_of_shared)
        if not carved:
            outputs = partial(outer, of_shared)
            yield Output(f"{shared}.down_proj.bias", (mixture.d_model,), dtype, outputs)


def _block_options(mixture: Mixture) -> dict[str, Any]:
    """Describe what experts take over from the dense block, where it is no gated SiLU."""
    options = {"activation": mixture.activation, "gated": mixture.gated, "bias": mixture.bias}
    usual = {"activation": "silu", "gated": True, "bias": False}
    return {name: value for name, value in options.items() if value != usual[name]}


def _sparse_rule(mixture: Mixture) -> dict[str, Any]:
    """Describe a mixture whose weights come from a softmax."""
    arguments: dict[str, Any] = {
        "num_experts": mixture.num_experts,
        "top_k": mixture.top_k,
        "d_expert": mixture.d_expert,
        "router": {
            "score": "softmax",
            "normalize": mixture.weighting == "normalized",
        },
        **_block_options(mixture),
    }
    if mixture.d_shared:
        arguments["num_shared_experts"] = max(mixture.d_shared // mixture.d_expert, 1)
        arguments["d_shared"] = mixture.d_shared
    return {"class_path": "moezoo.SparseMoE", "init_args": arguments}


def _carved_rule(mixture: Mixture) -> dict[str, Any]:
    """Describe a mixture whose chosen experts count fully."""
    linear = "shared" if mixture.reads_shared else "linear"
    arguments = {
        "num_experts": mixture.num_experts,
        "top_k": mixture.top_k,
        "d_expert": mixture.d_expert,
        "num_shared_experts": mixture.d_shared // mixture.d_expert,
        "output_bias": mixture.output_bias,
        "router": "neuron" if mixture.neuron_router else linear,
        "signed": mixture.signed,
        **_block_options(mixture),
    }
    return {"class_path": "moezoo.CarvedMoE", "init_args": arguments}


def _output_bias(plan: LayerPlan, mixture: Mixture, read: Read) -> Tensor | None:
    """Return the refit's bias, which has the dense block's in it, else that of the dense block."""
    return read(0)["bias_out"] if plan.bias is None and mixture.bias else plan.bias


def _carved_outputs(start: str, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
    """List what CarvedMoE has beside weights: scales, biases, the router's second half."""
    routed, dtype = (mixture.num_experts,), mixture.dtype
    yield constant_output(f"{start}.u", routed, dtype)
    yield constant_output(f"{start}.gate.selection_bias", routed, torch.float32)
    parts: list[tuple[str, tuple[int, ...], Callable[[], Tensor | None]]] = []
    if mixture.neuron_router and mixture.gated:
        parts.append(("gate.up_weight", (*routed, mixture.d_model), lambda: plan().router_up))
    if not mixture.neuron_router or mixture.bias:
        parts.append(("gate.bias", routed, lambda: plan().router_bias))
    if mixture.output_bias:
        parts.append(("b_out", (mixture.d_model,), lambda: _output_bias(plan(), mixture, read)))
    for name, shape, value in parts:
        yield Output(f"{start}.{name}", shape, dtype, partial(_whole, value, shape, dtype))


def _whole(
    value: Callable[[], Tensor | None], shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    tensor = value()
    yield torch.zeros(shape, dtype=dtype) if tensor is None else tensor.to(dtype)
