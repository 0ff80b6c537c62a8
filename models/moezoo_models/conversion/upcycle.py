"""`moezoo upcycle`: a dense checkpoint into a mixture of its copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moezoo.convert import LayerPlan, UpcycleOptions, plan_upcycle
from moezoo.errors import InputError, check_choice
from moezoo_models.conversion.convert import Conversion, convert
from moezoo_models.conversion.several import (
    READING,
    ROUTERS,
    check_alike,
    differences,
    of_several,
    prompt_routers,
    read_prompts,
    zero_routers,
)
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.targets import CLOSEST, TARGETS, Mixture
from moezoo_models.conversion.writer import check_target


def upcycle(
    source: str | Path | list[str],
    target: str | Path,
    experts: int | None = None,
    top_k: int = 2,
    granularity: int = 1,
    drop: float = 0.0,
    shared: bool = False,
    to: str | None = None,
    scale: Literal["down", "cbrt"] = "down",
    weighting: Literal["normalized", "softmax"] = "normalized",
    router_std: float = 0.02,
    layers: str | int | list[int] = "all",
    base: str | None = None,
    router: Literal["random", "zeros", "hidden", "inputs"] = "random",
    prompts: str | None = None,
    seed: int = 0,
    max_shard_size: str = "5GB",
    check: Literal["auto", "logits", "layers"] = "auto",
    force: bool = False,
) -> Conversion:
    """Turn a dense Hugging Face checkpoint into a mixture of experts that begin as its copies.

    The result computes what the dense model computed, unless parts are drawn anew (drop) or
    scaled by halves (scale cbrt, weighting softmax); how far it is off is measured and printed.

    Of several fine-tunes of one model, each gives one expert per layer, and the base all the rest
    (arXiv:2403.07816); what is not kept of the others is measured and printed.

    Args:
        source: directory of a dense model of one of the families that the documentation lists, or
            a GGUF file; or several, one after the other, that are fine-tunes of one model.
        target: directory to make.
        experts: copies of each feed-forward block; default: 8, of several models one of each.
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
        base: of several models: the one that gives attention, norms and embeddings; default: the
            first.
        router: random; zeros; or, for prompts of each expert, their mean hidden states that come
            into the layer (hidden, as mergekit-moe's), or that come to the router (inputs).
        prompts: YAML file for the last two: experts, a list in the order of the models, each with
            positive and perhaps negative, lists of texts.
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
    sources = [source] if isinstance(source, str | Path) else list(source)
    fine_tunes = _check(sources, experts, base, router, prompts)
    count = (len(sources) if fine_tunes else 8) if experts is None else experts
    options = UpcycleOptions(
        count, top_k, granularity, drop, shared, scale, weighting, router_std, seed
    )
    with ExitStack() as stack:
        opened = [stack.enter_context(open_source(each)) for each in sources]
        dense = opened[0] if base is None else stack.enter_context(open_source(base))
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

        write = partial(
            convert,
            dense,
            Path(target),
            kind,
            mixture,
            method="upcycle",
            max_shard_size=max_shard_size,
            check=check,
            force=force,
        )
        described = dataclasses.asdict(options)
        if not fine_tunes and router == "random":
            return write(plan=plan, options=described, exact=options.exact)
        check_target(Path(target), force)  # before much is read
        kind.check(dense, mixture)
        others = opened if fine_tunes else ()
        return write(**_mixed(dense, others, options, plan, router, prompts))


def _check(
    sources: Sequence[str | Path],
    experts: int | None,
    base: str | None,
    router: str,
    prompts: str | None,
) -> bool:
    """Check the options that are about several models against each other.

    Returns:
        Whether there are several.

    Raises:
        InputError: names the option.
    """
    several = len(sources) > 1
    check_choice("router", router, ROUTERS)
    if not sources:
        raise InputError("source: is empty; give one directory or more")
    if several and experts not in (None, len(sources)):
        raise InputError(
            f"experts: {experts}, but each of the {len(sources)} models gives one; leave it out"
        )
    if base is not None and not several:
        raise InputError("base: is for several models; leave it out")
    if router in READING and prompts is None:
        raise InputError(
            f"prompts: is missing; router {router} follows from texts, so give a YAML file"
        )
    if router not in READING and prompts is not None:
        raise InputError(
            f"prompts: router {router} reads none; leave them out, or give --router hidden"
        )
    return several


def _mixed(
    base: Source,
    fine_tunes: Sequence[Source],
    options: UpcycleOptions,
    plan: Callable[[int], LayerPlan],
    router: str,
    prompts: str | None,
) -> dict[str, Any]:
    """Return what :func:`convert` is told of experts of several models, or of other routers."""
    check_alike(base, fine_tunes)
    described = dataclasses.asdict(options) | {"router": router}
    routers: dict[int, Any] = {}
    if router in READING and prompts is not None:
        texts = read_prompts(prompts, options.experts)
        routers = prompt_routers(base, texts, router)
        described["prompts"] = [dataclasses.asdict(each) for each in texts]
    elif router == "zeros":
        routers = zero_routers(base, options.experts)
    apart = differences(base, fine_tunes) if fine_tunes else {}
    return {
        "plan": of_several(plan, options.granularity, routers.get, bool(fine_tunes)),
        "options": described,
        "exact": options.exact and not apart.get("experts"),
        "others": fine_tunes,
        "extra": lambda _, __: {"fine_tunes": apart} if fine_tunes else {},
    }
