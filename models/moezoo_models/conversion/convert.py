"""Carrying out a conversion: plan by headers, stream the tensors, compare, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.convert import LayerPlan
from moezoo.errors import check_choice
from moezoo_models.conversion.checkpoint import REPORT, NewCheckpoint
from moezoo_models.conversion.drift import Drift, layer_drift, logits_drift
from moezoo_models.conversion.several import describe
from moezoo_models.conversion.source import Source, layer_of
from moezoo_models.conversion.targets import Mixture, Output, Target
from moezoo_models.conversion.targets.base import planned_router
from moezoo_models.devices import free_memory

__all__ = ["REPORT", "Conversion", "convert", "summary"]

_BLOCK = ".mlp."


@dataclass(frozen=True)
class Conversion:
    """A conversion, as its report in the directory describes it.

    Attributes:
        method: upcycle or carve.
        source: fingerprint, architecture, size of the dense model.
        target: architecture, sizes, SHA-256 of every file.
        options: as they were given.
        exact: whether the mixture was meant to compute what the dense model computes.
        drift: how far it is off, measured.
        extra: what else the method measured.
    """

    method: str
    source: dict[str, Any]
    target: dict[str, Any]
    options: dict[str, Any]
    exact: bool
    drift: dict[str, Any]
    extra: dict[str, Any]

    def recovered(self, files: dict[str, str], recovery: dict[str, Any]) -> Conversion:
        """Return the report of the same model, trained on.

        Args:
            files: SHA-256 of the files of weights.
            recovery: what is to be said of the training.
        """
        return replace(
            self, target=self.target | {"sha256": files}, extra=self.extra | {"recovery": recovery}
        )


def convert(
    source: Source,
    target: Path,
    kind: Target,
    mixture: Mixture,
    plan: Callable[[int], LayerPlan],
    *,
    method: str,
    options: dict[str, Any],
    exact: bool,
    max_shard_size: str,
    check: str,
    force: bool,
    others: Sequence[Source] = (),
    scratch_bytes: int = 0,
    prepare: Callable[[Path], None] = lambda _: None,
    settled: Callable[[], Mixture] | None = None,
    extra: Callable[[Path, bool], dict[str, Any]] = lambda _, __: {},
) -> Conversion:
    """Write a mixture, atomically, and compare it with the dense model.

    Args:
        source: the dense model.
        target: directory to make.
        kind: its format.
        mixture: the shapes, known beforehand.
        plan: plans a layer. Called again for the same layer it must give the same plan.
        method: its name, for the report.
        options: for the report, and to know a run that can be continued.
        exact: whether logits have to agree.
        max_shard_size: as in ``5GB``.
        check: auto, logits or layers.
        force: replace what is there.
        others: of which experts are, too: block n of a plan is of the n-th, and 0 the source's.
        scratch_bytes: room that ``prepare`` needs.
        prepare: called before anything is planned, with a directory for files that are needed only
            until the end; what an earlier run left there is kept.
        settled: gives the shapes once ``prepare`` is through, where it decides on experts per
            token; no tensor's shape depends on those.
        extra: asked for more figures at the end, with the directory that was written and whether
            its model fits into memory.

    Raises:
        InputError: the format cannot hold this, or there is no room for it.
    """
    check_choice("check", check, ("auto", "logits", "layers"))
    kind.check(source, mixture)
    remember = lru_cache(maxsize=1)(plan)
    models = (source, *others)
    tensors = _outputs(models, kind, mixture, remember)
    new = NewCheckpoint(method, models, target, tensors, max_shard_size, force)
    with new.opened([kind.name, str(mixture), options], scratch_bytes):
        prepare(new.scratch)
        shapes = mixture if settled is None else settled()
        new.write(kind.config(source, shapes), _change(method, source, kind, mixture))
        if check == "auto":
            check = "logits" if 2 * new.bytes < free_memory() else "layers"
        drift = _measure(models, new.directory, kind, mixture, remember, check)
        if exact and drift.relative > _tolerance(mixture.dtype):
            raise RuntimeError(
                f"the mixture is off by {drift.relative:.1e} of the dense model's output where it "
                "should be exact; please report this with the config.json of the source"
            )
        conversion = Conversion(
            method=method,
            source={
                "architecture": source.family,
                "sha256": source.fingerprint(),
                "parameters": sum(torch.Size(t.shape).numel() for t in source.tensors.values()),
                **({"experts": [each.fingerprint() for each in others]} if others else {}),
            },
            target={
                "architecture": kind.name,
                "parameters": new.parameters,
                "bytes": new.bytes,
                "layers": list(mixture.layers),
                "sha256": new.sha256,
            },
            options=options,
            exact=exact,
            drift=asdict(drift),
            extra=extra(new.directory, check == "logits"),
        )
        new.report(conversion)
    print(summary(conversion, target))
    return conversion


def summary(conversion: Conversion, target: Path) -> str:
    """Return a few lines about a conversion: its models, whether it is exact, and the drift."""
    old, new, drift = conversion.source, conversion.target, conversion.drift
    what = "layers' outputs" if drift["of"] == "layers" else "logits"
    agree = drift["argmax_agreement"]
    also = "" if agree is None else f", same next token for {agree:.1%} of positions"
    rows = (
        ("from", f"{old['architecture']}, {old['parameters'] / 1e6:,.3g} M parameters"),
        ("to", f"{new['architecture']}, {new['parameters'] / 1e6:,.3g} M parameters, {target}"),
        ("exact", str(conversion.exact).lower()),
        (
            "drift",
            f"{drift['absolute']:.1e} in the {what} ({drift['relative']:.1e} of the largest){also}",
        ),
    )
    lines = [f"{name:<8}{text}" for name, text in rows]
    if "fine_tunes" in conversion.extra:
        lines.append(describe(conversion.extra["fine_tunes"]))
    return "\n".join([*lines, *_perplexities(conversion.extra)])


def _perplexities(extra: dict[str, Any]) -> Iterator[str]:
    """Compare a carve with plain pruning to as many neurons, and say so if that is better."""
    if "perplexity" not in extra:
        return
    found = extra["perplexity"]
    yield f"work    {extra['work']:.3f} of the dense blocks' FLOPs, routers included"
    yield f"perplexity on {extra['calibration']['held_out_tokens']:,} held-out tokens"
    names = {
        "dense": "dense",
        "carved": "carved",
        "loaded": "carved, as loaded",
        "static": "pruned to as many neurons",
        "static_refit": "the same, refitted",
        "control": "refitted, as much work",
        "sparsified": "sparsified to as much work",
    }
    for name, text in names.items():
        if name in found:
            yield f"  {text:<28}{found[name]:>10.4g}  × {found[name] / found['dense']:.3f}"
    for rival, won in extra["beats"].items():
        if not won:
            yield (
                f"The carve does not beat static pruning with the same budget ({names[rival]}): "
                "prune, or carve finer, with more calibration tokens, or less."
            )


def _outputs(
    models: Sequence[Source], kind: Target, mixture: Mixture, plan: Callable[[int], LayerPlan]
) -> Iterator[Output]:
    """List all tensors of the mixture, those of a block in the place of the dense block."""
    source, placed = models[0], set[int]()
    for name, info in source.tensors.items():
        layer = layer_of(name)
        if layer not in mixture.layers or _BLOCK not in name:
            yield Output(name, info.shape, info.dtype, partial(source.pieces, name))
        elif layer not in placed:
            placed.add(layer)
            made, read = partial(plan, layer), partial(_block, models, layer)
            yield from kind.outputs(layer, made, mixture, read)


def _block(models: Sequence[Source], layer: int, number: int) -> dict[str, Tensor]:
    return models[number].block(layer)


def _change(method: str, source: Source, kind: Target, mixture: Mixture) -> str:
    """Return the sentence of what a conversion has changed."""
    return (
        f"`moezoo {method}` made a `{kind.name}` of this `{source.family}`: in "
        f"{len(mixture.layers)} of {source.num_layers} layers the dense block became "
        f"{mixture.num_experts} experts."
    )


def _measure(
    models: Sequence[Source],
    written: Path,
    kind: Target,
    mixture: Mixture,
    plan: Callable[[int], LayerPlan],
    check: str,
) -> Drift:
    if check != "logits":
        return layer_drift(models, mixture.layers, plan)
    flat = kind.flat and mixture.weighting == "unit"
    routers = {each: planned_router(plan(each), mixture.dtype, flat) for each in mixture.layers}
    return logits_drift(models[0], written, routers)


def _tolerance(dtype: torch.dtype) -> float:
    """Return the relative drift that rounding explains."""
    return 1e-5 if dtype == torch.float32 else 5e-2
