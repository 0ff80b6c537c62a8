"""`moezoo upcycle`: a dense checkpoint into a mixture of its copies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from moezoo.convert import LayerPlan, UpcycleOptions, plan_upcycle
from moezoo.errors import check_choice
from moezoo_models.conversion.convert import Conversion, convert
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.targets import CLOSEST, TARGETS, Mixture


def upcycle(
    source: str | Path,
    target: str | Path,
    experts: int = 8,
    top_k: int = 2,
    granularity: int = 1,
    drop: float = 0.0,
    shared: bool = False,
    to: str | None = None,
    scale: Literal["down", "cbrt"] = "down",
    weighting: Literal["normalized", "softmax"] = "normalized",
    router_std: float = 0.02,
    layers: str | int | list[int] = "all",
    seed: int = 0,
    max_shard_size: str = "5GB",
    check: Literal["auto", "logits", "layers"] = "auto",
    force: bool = False,
) -> Conversion:
    """Turn a dense Hugging Face checkpoint into a mixture of experts that begin as its copies.

    The result computes what the dense model computed, unless parts are drawn anew (drop) or
    scaled by halves (scale cbrt, weighting softmax); how far it is off is measured and printed.

    Args:
        source: directory of a dense model of one of the families that the documentation lists.
        target: directory to make.
        experts: copies of each feed-forward block.
        top_k: routed experts per token; a multiple of granularity.
        granularity: cut each copy into that many experts (arXiv:2410.07524).
        drop: fraction of each expert's neurons to draw anew (drop-upcycling, arXiv:2502.19261).
        shared: run one copy on every token, with half of the output.
        to: mixtral, qwen2_moe, qwen3_moe, glm4_moe, granitemoe, flex_olmo or moezoo; default: the
            source's closest relative, moezoo where there is none.
        scale: where the factor that granularity asks for goes: down (exact), or cbrt on all three
            projections (better trained, by the paper).
        weighting: weights of the chosen experts: normalized to sum 1 (exact), or softmax over all.
        router_std: standard deviation of the fresh routers.
        layers: which blocks to convert: all, every 2, a number or a list.
        seed: of everything drawn.
        max_shard_size: start another file when one exceeds this.
        check: compare the logits with the dense model's, or only layer by layer; auto compares
            logits if both models fit into memory.
        force: replace a checkpoint that target holds.

    Returns:
        The two models, the drift, and the measurements.

    Raises:
        InputError: the source cannot be converted, the options contradict each other, or the
            target cannot hold the result.
    """
    options = UpcycleOptions(
        experts, top_k, granularity, drop, shared, scale, weighting, router_std, seed
    )
    with open_source(source) as dense:
        options.check(dense.width)
        chosen = dense.select(layers)
        kind = TARGETS[check_choice("to", to or CLOSEST.get(dense.family, "moezoo"), TARGETS)]
        mixture = Mixture(
            num_experts=options.num_experts,
            top_k=top_k,
            d_expert=dense.width // granularity,
            d_shared=dense.width if shared else 0,
            weighting=weighting,
            layers=chosen,
            d_model=dense.config.hidden_size,
            dtype=dense.dtype,
            **dense.block_options(),
        )

        def plan(layer: int) -> LayerPlan:
            return plan_upcycle(options, layer, mixture.d_model, dense.width)

        return convert(
            dense,
            Path(target),
            kind,
            mixture,
            plan,
            method="upcycle",
            options=dataclasses.asdict(options),
            exact=options.exact,
            max_shard_size=max_shard_size,
            check=check,
            force=force,
        )
