"""`moezoo inspect carving`: what carving and pruning cost a model, method by method."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moezoo.convert import Block, CarveOptions
from moezoo.errors import InputError, check_int
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.locks import check_file
from moezoo_models.conversion.carve import calibrate, own_sizes
from moezoo_models.conversion.carving import answer_of, carve_layer, pruned
from moezoo_models.conversion.own_rules import carved_variant, pruned_variant
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.stage import Answer
from moezoo_models.devices import pick_device
from moezoo_models.progress import progress_bar

CARVES: Mapping[str, Mapping[str, object]] = {
    "random": {"split": "random", "router": "gate_mean", "refit": False},
    "cmoe": {"split": "cmoe", "router": "cmoe", "refit": False},
    "gate_mean": {"router": "gate_mean", "refit": False},
    "ridge": {"refit": False},
    "ridge_refit": {},
}
"""Published ways to carve, and parts of ours, as differences from the defaults of
:class:`~moezoo.convert.CarveOptions`; that of ``random`` has a random router too."""

_SIZE = re.compile(r"S(\d+)A(\d+)E(\d+)")


@dataclasses.dataclass(frozen=True)
class Study:
    """Perplexities over that of the dense model, on the same held-out tokens.

    Attributes:
        dense: perplexity of the dense model.
        ratios: by size as in ``S3A3E8``, by method, one per seed.
    """

    dense: float
    ratios: dict[str, dict[str, list[float]]]

    def table(self) -> str:
        """Lay the figures out for reading: means, and standard deviations over seeds."""
        lines = [f"dense perplexity {self.dense:.4g}; ratios to it"]
        lines.append(f"{'':<14}" + "".join(f"{size:>18}" for size in self.ratios))
        for method in next(iter(self.ratios.values())):
            cells = (_cell(of_size[method]) for of_size in self.ratios.values())
            lines.append(f"{method:<14}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)


def inspect_carving(
    source: str | Path,
    sizes: list[str] | None = None,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 16384,
    held_out_tokens: int = 8192,
    window: int | None = None,
    seeds: int = 1,
    device: str = "cpu",
    output: str | None = None,
) -> Study:
    """Print what carving and pruning cost a dense model, in perplexity on held-out text.

    The methods: static pruning to as many neurons as a token uses, without and with a refit of the
    output projection; a random split with a random router; CMoE as its authors' code computes it
    (arXiv:2502.04416); contribution clusters with the mean gate vectors as router
    (arXiv:2602.15521); the same with a ridge router, and with a refit, the defaults of
    `moezoo.convert.carve_block`. The last two follow the rules of `moezoo carve` in its own format:
    `carve`, which shares by elimination, reads shared neurons to route, chooses ridges on held-out
    tokens, keeps first tokens apart and follows earlier errors, with equal budgets in all layers;
    and `prune`, as many neurons for all tokens by the same means. No model is written.

    Args:
        source: directory of a dense model that `moezoo carve` reads.
        sizes: such as S3A3E8: 3 shared and 3 active of 8 parts; default: that of `moezoo carve`.
        calibration: as for `moezoo carve`.
        calibration_tokens: as there.
        held_out_tokens: as there.
        window: as there.
        seeds: repeat everything with that many choices of calibration passages and draws.
        device: as there.
        output: JSON file to write the figures to.

    Returns:
        The figures that are printed.

    Raises:
        InputError: the source cannot be read, a size does not fit, or there is too little text.
    """
    check_int("seeds", seeds)
    if output is not None:
        check_file(output)
    ratios: dict[str, dict[str, list[float]]] = {}
    dense = math.nan
    with open_source(source) as model, progress_bar() as bar:
        if sizes is None:
            sizes = ["S{}A{}E{}".format(*own_sizes(model.width))]
        options = {size: _options(size, model.width) for size in sizes}
        task = bar.add_task("computing", total=seeds * model.num_layers)
        for seed in range(seeds):
            text = calibrate(model, calibration, calibration_tokens, held_out_tokens, window, seed)
            variants = [Variant("dense", None)]
            for size, each in options.items():
                seeded = dataclasses.replace(each, seed=seed)
                variants += _variants(f"{size} ", seeded, model.width, text.fitted.shape[1])
            with tempfile.TemporaryDirectory() as scratch:
                run = Propagation(
                    source=model,
                    calibration=text,
                    variants=variants,
                    layers=tuple(range(model.num_layers)),
                    directory=Path(scratch),
                    device=pick_device(device),
                )
                nats = {n: float(x.mean()) for n, x in run.run(partial(bar.advance, task)).items()}
            dense = math.exp(nats["dense"])
            for size in sizes:
                for variant in variants:
                    of_size, _, method = variant.name.partition(" ")
                    if of_size == size:
                        ratio = math.exp(nats[variant.name] - nats["dense"])
                        ratios.setdefault(size, {}).setdefault(method, []).append(ratio)
    study = Study(dense, ratios)
    print(study.table())
    if output is not None:
        with atomic_write(output, "w") as file:
            json.dump(dataclasses.asdict(study), file, indent=2)
    return study


def _cell(ratios: list[float]) -> str:
    mean = statistics.fmean(ratios)
    spread = f" ± {statistics.stdev(ratios):.3f}" if len(ratios) > 1 else ""
    return f"{mean:.3f}{spread}"


def carve_options(size: str) -> CarveOptions:
    """Read a size such as S3A3E8: 3 shared and 3 active of 8 parts; other options are defaults.

    Raises:
        InputError: it is not written like that.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InputError(
            f"sizes: '{size}' is no size; write shared, active and all experts as in S3A3E8"
        )
    shared, active, experts = map(int, match.groups())
    return CarveOptions(shared=shared, active=active, experts=experts)


def _options(size: str, width: int) -> CarveOptions:
    options = carve_options(size)
    options.check(width)
    return options


def _variants(prefix: str, options: CarveOptions, width: int, length: int) -> Iterator[Variant]:
    keep = width // options.experts * (options.shared + options.active)
    yield Variant(f"{prefix}static", partial(pruned, keep, "static"))
    yield Variant(f"{prefix}static_refit", partial(pruned, keep, "static_ls"))
    for name, changes in CARVES.items():
        own: CarveOptions = dataclasses.replace(options, **changes)  # type: ignore[arg-type]
        yield Variant(prefix + name, _carver(own, random_router=name == "random"))
    sizes = (options.shared, options.active, options.experts)
    yield pruned_variant(f"{prefix}prune", keep, length)
    yield carved_variant(f"{prefix}carve", *sizes, width, length, options.seed)


def _carver(options: CarveOptions, random_router: bool) -> Callable[[int, Tensor, Block], Answer]:
    def convert(layer: int, x: Tensor, block: Block) -> Answer:
        plan = carve_layer(layer, x, block, options).plan
        if random_router:
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + layer)
            rows = torch.randn(plan.router.shape, generator=generator).to(plan.router)
            plan = dataclasses.replace(plan, router=rows, router_bias=None)
        return answer_of(plan, block)

    return convert
