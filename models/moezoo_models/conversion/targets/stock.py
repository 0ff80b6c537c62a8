"""Stock mixtures with softmax routers: Mixtral, Qwen2-MoE, Qwen3-MoE, GraniteMoE, FlexOlmo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import (
    FlexOlmoConfig,
    GraniteMoeConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moezoo.convert.plan import Projection
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets.base import (
    Output,
    PerExpert,
    Plan,
    Read,
    Target,
    constant_output,
    empty_shared_outputs,
    router_output,
    stacked_outputs,
    stock_config,
)
from moezoo_models.conversion.targets.mixture import Mixture
from moezoo_models.conversion.targets.problems import (
    attention_bias_problem,
    head_dim,
    head_dim_problem,
    partial_rotary_problem,
    positions_problem,
    window_problem,
)


class Mixtral(PerExpert):
    """Mixtral (arXiv:2401.04088)."""

    name = "mixtral"
    families = ("llama", "mistral", "phi3", "smollm3")
    prefix = "block_sparse_moe"
    names: ClassVar[Mapping[Projection, str]] = {"gate": "w1", "up": "w3", "down": "w2"}

    def attention_problem(self, source: Source) -> str | None:
        """Refuse biases, layers without positions, heads of which a part is turned."""
        if source.family == "smollm3" and (problem := window_problem(self, source)):
            return problem
        return (
            attention_bias_problem(self, source)
            or positions_problem(self, source)
            or partial_rotary_problem(self, source)
        )

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Keep the sliding window of a Mistral or a Phi-3."""
        return stock_config(
            MixtralConfig,
            source,
            intermediate_size=mixture.d_expert,
            num_local_experts=mixture.num_experts,
            num_experts_per_tok=mixture.top_k,
            sliding_window=source.ours.sliding_window,
            head_dim=head_dim(source),
        )


class QwenMixture(PerExpert):
    """The common part of Qwen2-MoE and Qwen3-MoE: any layer may stay dense."""

    weightings = ("normalized", "softmax")

    def can_skip(self, layers: tuple[int, ...], num_layers: int) -> bool:
        """Any can."""
        return True

    def mixture_fields(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Return the fields of the configuration that describe the experts."""
        return {
            "intermediate_size": source.width,
            "moe_intermediate_size": mixture.d_expert,
            "num_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.top_k,
            # transformers assumes False, with which a mixture of copies is no copy.
            "norm_topk_prob": mixture.weighting == "normalized",
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(set(range(source.num_layers)) - set(mixture.layers)),
        }


class Qwen2Moe(QwenMixture):
    """Qwen2-MoE. Its shared expert's gate is a sigmoid: at weight 0 it halves what is doubled."""

    name = "qwen2_moe"
    families = ("llama", "qwen2")
    shared = True
    shared_factor = 2.0

    def attention_problem(self, source: Source) -> str | None:
        """Refuse a Llama's biases, and heads that it cannot describe."""
        return attention_bias_problem(self, source) or head_dim_problem(self, source)

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Return which layers slide: by default, other ones than in Qwen2."""
        dense = source.config
        windows: dict[str, Any] = {"use_sliding_window": False}
        if source.family == "qwen2":
            windows = {
                "use_sliding_window": dense.use_sliding_window,
                "sliding_window": dense.sliding_window,
                "max_window_layers": dense.max_window_layers,
                "layer_types": list(dense.layer_types),
            }
        return stock_config(
            Qwen2MoeConfig,
            source,
            qkv_bias=source.family == "qwen2",
            shared_expert_intermediate_size=mixture.d_shared,
            **self.mixture_fields(source, mixture),
            **windows,
        )

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """Add the shared expert's gate, and the expert even if it has no neurons."""
        yield from super().outputs(layer, plan, mixture, read)
        start = f"model.layers.{layer}.mlp"
        if not mixture.d_shared:
            yield from empty_shared_outputs(f"{start}.shared_expert", mixture)
        name = f"{start}.shared_expert_gate.weight"
        yield constant_output(name, (1, mixture.d_model), mixture.dtype)


class Qwen3Moe(QwenMixture):
    """Qwen3-MoE (arXiv:2505.09388)."""

    name = "qwen3_moe"
    families = ("qwen3",)

    def attention_problem(self, source: Source) -> str | None:
        """Refuse sliding windows."""
        return window_problem(self, source)

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Keep the head width, and the biases if there are any."""
        return stock_config(
            Qwen3MoeConfig,
            source,
            head_dim=head_dim(source),
            attention_bias=source.config.attention_bias,
            use_sliding_window=False,
            sliding_window=None,
            **self.mixture_fields(source, mixture),
        )


class GraniteMoe(Target):
    """GraniteMoE, the one that has biases in all of attention; experts stacked in one tensor."""

    name = "granitemoe"
    families = ("granite", "llama", "mistral")

    def attention_problem(self, source: Source) -> str | None:
        """Refuse sliding windows, and heads that it cannot describe."""
        return window_problem(self, source) or head_dim_problem(self, source)

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Keep the multipliers of a Granite; with others it is a Llama."""
        return stock_config(
            GraniteMoeConfig,
            source,
            intermediate_size=mixture.d_expert,
            num_local_experts=mixture.num_experts,
            num_experts_per_tok=mixture.top_k,
            attention_bias=getattr(source.config, "attention_bias", False),
            attention_multiplier=source.ours.attention_multiplier or head_dim(source) ** -0.5,
            embedding_multiplier=source.ours.embedding_multiplier,
            residual_multiplier=source.ours.residual_multiplier,
            logits_scaling=source.ours.logits_scaling,
        )

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """List the router and the two stacks."""
        start = f"model.layers.{layer}.block_sparse_moe"
        yield router_output(f"{start}.router.layer.weight", plan, mixture)
        names = (f"{start}.input_linear.weight", f"{start}.output_linear.weight")
        yield from stacked_outputs(*names, plan, mixture, read)


class FlexOlmo(PerExpert):
    """FlexOlmo (arXiv:2507.07024), OLMo2 with experts."""

    name = "flex_olmo"
    families = ("olmo2", "olmo3")

    def attention_problem(self, source: Source) -> str | None:
        """Refuse sliding windows, and heads that it cannot describe."""
        return window_problem(self, source) or head_dim_problem(self, source)

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Keep the biases if there are any."""
        return stock_config(
            FlexOlmoConfig,
            source,
            intermediate_size=mixture.d_expert,
            num_experts=mixture.num_experts,
            num_experts_per_tok=mixture.top_k,
            norm_topk_prob=True,
            attention_bias=source.config.attention_bias,
        )
