"""Our own decoder as a target."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from moezoo.errors import InputError
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets.base import (
    Mixture,
    Output,
    Plan,
    Read,
    Target,
    router_output,
    selection_bias_output,
    shared_outputs,
    stacked_parts,
)
from moezoo_models.dense import dense_config


class Moezoo(Target):
    """:class:`moezoo_models.MoezooForCausalLM` with :class:`moezoo.SparseMoE` in any layers."""

    name = "moezoo"
    families = ("llama", "mistral", "qwen2", "qwen3")
    shared = True
    weightings = ("normalized", "softmax", "unit")

    def check(self, source: Source, mixture: Mixture) -> None:
        """Refuse a router that could never learn."""
        super().check(source, mixture)
        if mixture.top_k == 1 and mixture.weighting == "normalized":
            raise InputError(
                "top_k: a single normalized weight is always 1 and the router would never learn; "
                "choose top_k 2 or more, or weighting softmax"
            )

    def can_skip(self, layers: tuple[int, ...], num_layers: int) -> bool:
        """Any can."""
        return True

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Add a rule for the mixtures to what the dense model is as ours."""
        config = dense_config(source.raw)
        unit = mixture.weighting == "unit"
        arguments: dict[str, Any] = {
            "num_experts": mixture.num_experts,
            "top_k": mixture.top_k,
            "d_expert": mixture.d_expert,
            "router": {
                "score": "sigmoid" if unit else "softmax",
                "normalize": mixture.weighting != "softmax",
                "scale": float(mixture.top_k) if unit else 1.0,
                "selection_bias": unit,
            },
        }
        if mixture.d_shared:
            arguments["num_shared_experts"] = max(mixture.d_shared // mixture.d_expert, 1)
            arguments["d_shared"] = mixture.d_shared
        rule = {"layers": list(mixture.layers), "class_path": "moezoo.SparseMoE"}
        config.ffn = [*config.ffn, {**rule, "init_args": arguments}]
        config.check()
        config.architectures = ["MoezooForCausalLM"]
        return config.to_diff_dict()

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """List the router, the two stacks and the shared expert."""
        experts, width, d_model = mixture.num_experts, mixture.d_expert, mixture.d_model
        start = f"model.layers.{layer}.mlp"
        unit = mixture.weighting == "unit"
        yield router_output(f"{start}.gate.weight", plan, mixture, flat=unit)
        if unit:
            yield selection_bias_output(f"{start}.gate.selection_bias", plan, mixture)
        yield Output(
            f"{start}.experts.gate_up_proj",
            (experts, 2 * width, d_model),
            mixture.dtype,
            partial(stacked_parts, plan, ("gate", "up"), read),
        )
        yield Output(
            f"{start}.experts.down_proj",
            (experts, d_model, width),
            mixture.dtype,
            partial(stacked_parts, plan, ("down",), read),
        )
        yield from shared_outputs(f"{start}.shared_expert", plan, mixture, read)
