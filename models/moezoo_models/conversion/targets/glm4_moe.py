"""GLM-4.5's mixture: the stock architecture that holds most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import Glm4MoeConfig

from moezoo.errors import InputError
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets.base import (
    Output,
    PerExpert,
    Plan,
    Read,
    empty_shared_outputs,
    router_output,
    selection_bias_output,
    stock_config,
)
from moezoo_models.conversion.targets.mixture import Mixture
from moezoo_models.conversion.targets.problems import (
    attention_bias_problem,
    head_dim,
    partial_rotary_factor,
    positions_problem,
    window_problem,
)


class Glm4Moe(PerExpert):
    """GLM-4.5 (arXiv:2508.06471): attention with biases or norms, ungated shared experts.

    Its router works in fp32. Unit weights are written as normalized sigmoids of logits so small
    that all are nearly equal.
    """

    name = "glm4_moe"
    families = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
    shared = True
    weightings = ("normalized", "unit")
    shared_name = "shared_experts"
    converts = "all layers from one on"
    flat = True

    def check(self, source: Source, mixture: Mixture) -> None:
        """Refuse a shared expert that is no whole number of routed ones."""
        super().check(source, mixture)
        if mixture.d_shared % mixture.d_expert:
            raise InputError(
                "shared: glm4_moe wants a multiple of an expert's neurons; change shared or experts"
            )
        if mixture.num_experts < 2:
            raise InputError("experts: glm4_moe has at least 2 routed experts; give more")

    def attention_problem(self, source: Source) -> str | None:
        """Name a bias in o_proj, sliding windows, and layers without positions."""
        bias = None if source.family == "qwen2" else attention_bias_problem(self, source)
        return bias or window_problem(self, source) or positions_problem(self, source)

    def can_skip(self, layers: tuple[int, ...], num_layers: int) -> bool:
        """The first ones can."""
        return layers == tuple(range(num_layers - len(layers), num_layers))

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Turn as much of each head as the source: its own default is half."""
        turned = partial_rotary_factor(source)
        unit = mixture.weighting == "unit"
        config = stock_config(
            Glm4MoeConfig,
            source,
            intermediate_size=source.width,
            moe_intermediate_size=mixture.d_expert,
            n_routed_experts=mixture.num_experts,
            num_experts_per_tok=mixture.top_k,
            n_shared_experts=mixture.d_shared // mixture.d_expert,
            routed_scaling_factor=float(mixture.top_k) if unit else 1.0,
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=source.num_layers - len(mixture.layers),
            head_dim=head_dim(source),
            attention_bias=source.family == "qwen2",
            use_qk_norm=source.family == "qwen3",
            num_mtp_layers=0,
            partial_rotary_factor=turned,
        )
        config["rope_parameters"]["partial_rotary_factor"] = turned
        return config | {"partial_rotary_factor": turned}

    def router(self, name: str, plan: Plan, mixture: Mixture) -> Iterator[Output]:
        """List the weight and the bias that only selects."""
        yield router_output(f"{name}.weight", plan, mixture, flat=mixture.weighting == "unit")
        yield selection_bias_output(f"{name}.e_score_correction_bias", plan, mixture)

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """Add the shared expert even if it has no neurons."""
        yield from super().outputs(layer, plan, mixture, read)
        if not mixture.d_shared:
            yield from empty_shared_outputs(f"model.layers.{layer}.mlp.shared_experts", mixture)
