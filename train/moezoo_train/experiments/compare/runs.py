"""Which runs a comparison has, and what identifies each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import moezoo
from moezoo.errors import InputError, check_flag
from moezoo.feed_forward import FeedForward, select_layers
from moezoo.random_routing import can_be_random
from moezoo.router_input import FFN_INPUT, RouterInput, check_router_input
from moezoo_train.experiments.common.records import fingerprint
from moezoo_train.experiments.compare.row_model import block_flops
from moezoo_train.experiments.compare.settings import Experiment, MethodOptions, find_method
from moezoo_train.experiments.compare.sparse_ift import match_kept_flops
from moezoo_train.experiments.compare.width import Match, active_flops, match_flops

FORMAT = 1
"""Raised when the same configuration would train differently; results of others do not count."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        row: name of the row of the table that it belongs to.
        random: whether its routing is random.
        seed: of initial weights, order of the text, and noise.
        layers: blocks that hold the method; the others hold the baseline.
        ffn: class path and arguments of the method's layer, width solved and defaults included.
        width: the argument that was solved for.
        flops_ratio: the layer's FLOPs per token over the baseline's.
        causal: whether its loss is that of a causal language model.
        router_input: what the method's router reads.
        kept: whether that is of the weights that are kept alone.
        memory: the method's layer, where it is added beside the baseline; ``ffn`` is that then.
        experiment: options that all runs share.
        model: options of the row's own model.
        follows: the run whose trained embeddings its hash table is built from, if any.
        is_followed: whether it is such a run of another.
    """

    row: str
    random: bool
    seed: int
    layers: tuple[int, ...]
    ffn: dict[str, Any]
    width: str | None
    flops_ratio: float
    causal: bool
    router_input: RouterInput
    experiment: Experiment
    kept: bool = False
    memory: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    follows: Run | None = None
    is_followed: bool = False

    @property
    def folder(self) -> str:
        """Name of the run's folder in the output directory."""
        return f"{self.row}{'-random' if self.random else ''}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.row}{', random routing' if self.random else ''}, seed {self.seed}"

    def identity(self, data: dict[str, Any]) -> dict[str, Any]:
        """List what the run's numbers depend on, all JSON-able.

        Args:
            data: identity of the prepared tokens.
        """
        experiment = self.experiment
        followed = {"follows": fingerprint(self.follows.identity(data))} if self.follows else {}
        # Runs from before there was a choice stay what they are.
        read = {} if self.router_input == FFN_INPUT else {"router_input": self.router_input}
        beside = {} if self.memory is None else {"memory": self.memory}
        own = {"row_model": self.model} if self.model else {}
        return (followed | read | beside | own) | {
            "format": FORMAT,
            "moezoo": moezoo.__version__,
            "torch": torch.__version__,
            "ffn": self.ffn,
            "layers": list(self.layers),
            "random": self.random,
            "baseline": experiment.baseline,
            "seed": self.seed,
            "model": asdict(experiment.model),
            "data": data,
            "sequence_length": experiment.text.sequence_length,
            "batch_size": experiment.text.batch_size,
            "max_steps": experiment.max_steps,
            "precision": experiment.precision,
            "optimizer": asdict(experiment.optimizer_of(self.row)),
            "schedule": asdict(experiment.schedule),
        }


def plan(experiment: Experiment) -> list[Run]:
    """List all runs, first those of the first seed, so that a table is complete early.

    The baseline is the first of each seed: hash tables may be built from what it has learned.

    Raises:
        InputError: a row's method, arguments, layers or width are invalid; names the row.
    """
    rows = {row: _row(experiment, row) for row in experiment.methods}
    following = {row for row, (common, _) in rows.items() if _follows(common["ffn"])}
    if following and experiment.baseline not in rows:
        raise InputError(
            f"methods.{min(following)}: its hash table is built from what the baseline has "
            f"learned; add the row '{experiment.baseline}: {{}}'"
        )
    ordered = sorted(rows.items(), key=lambda item: item[0] != experiment.baseline)
    runs = []
    baseline: Run | None = None
    for seed in experiment.seeds:
        for row, (common, layer) in ordered:
            wanted = experiment.methods[row].ablation
            ablation = experiment.ablation if wanted is None else wanted
            own = experiment.methods[row]
            # What a model's memory or its attention reads would not be random with it.
            able = can_be_random(layer) and not (own.memory or own.model)
            if wanted and not able:
                raise InputError(
                    f"methods.{row}.ablation: it has no routing to make random; leave it out"
                )
            for random in (False, True) if ablation and able else (False,):
                run = Run(row=row, random=random, seed=seed, experiment=experiment, **common)
                if row in following:
                    run = replace(run, follows=baseline)
                elif following and row == experiment.baseline and not random:
                    run = baseline = replace(run, is_followed=True)
                runs.append(run)
    return runs


def _follows(ffn: dict[str, Any]) -> bool:
    return ffn["init_args"].get("hash_function") in ("clustered", "dispersed")


def _row(experiment: Experiment, row: str) -> tuple[dict[str, Any], FeedForward]:
    """Solve a row's width; return what its runs share, and its layer without weights."""
    options, d_model = experiment.methods[row], experiment.model.d_model
    baseline = find_method("baseline", experiment.baseline)
    method = find_method(
        f"methods.{row}.method" if options.method else "methods", options.method or row
    )
    try:
        arguments = dict(options.arguments)
        if "vocab_size" in inspect.signature(method.layer).parameters:
            arguments.setdefault("vocab_size", experiment.text.vocab_size)
        with torch.device("meta"):
            target = baseline.build(d_model).cost().flops_per_token
        added = 0
        count: Callable[[FeedForward], int] = active_flops
        if options.model:
            count, target = _whole_blocks(experiment, options, method, baseline)
        if check_flag("memory", options.memory):
            arguments, added = _beside(method, d_model, arguments, target)
            match = _match(options, baseline, d_model, target - added, {}, experiment.tolerance)
        else:
            match = _match(options, method, d_model, target, arguments, experiment.tolerance, count)
        read = check_router_input(options.router_input or method.router_input, method.layer)
        where = experiment.layers if options.layers is None else options.layers
        layers = tuple(select_layers(where, experiment.model.num_layers))
        if not layers:
            raise InputError(
                f"layers: '{where}' chooses none of {experiment.model.num_layers}; give all, "
                "every 2, or numbers from 0"
            )
    except InputError as error:
        raise InputError(f"methods.{row}.{error}") from error
    experiment.optimizer_of(row)
    with torch.device("meta"):
        layer = method.build(d_model, **(arguments if options.memory else match.arguments))
        block = baseline.build(d_model, **match.arguments) if options.memory else layer
    config, memory = block.config(), layer.config() if options.memory else None
    for described in (config, memory or config):
        described["init_args"].pop("d_model", None)
    common = {
        "kept": options.sparse_ift is not None,
        "layers": layers,
        "ffn": config,
        "width": match.argument,
        "memory": memory,
        "model": dict(options.model),
        "flops_ratio": (match.flops + added) / target,
        "causal": layer.eval().causal,  # as it is validated
        "router_input": read,
    }
    return common, layer


def _match(
    options: MethodOptions,
    method: moezoo.Method,
    d_model: int,
    target: int,
    arguments: dict[str, Any],
    tolerance: float,
    count: Callable[[FeedForward], int] = active_flops,
) -> Match:
    if options.sparse_ift is None:
        return match_flops(
            method,
            d_model,
            target,
            arguments=arguments,
            width=options.width,
            tolerance=tolerance,
            count=count,
        )
    if options.width is not None:
        raise InputError("width: sparse_ift says what is solved for; leave out one of them")
    return match_kept_flops(
        options.sparse_ift, method, d_model, target, arguments=arguments, tolerance=tolerance
    )


def _whole_blocks(
    experiment: Experiment, options: MethodOptions, method: moezoo.Method, baseline: moezoo.Method
) -> tuple[Callable[[FeedForward], int], int]:
    """Return what counts the FLOPs of blocks of a row's own model, and those of the baseline's.

    Raises:
        InputError: an option is not a row's to set, or does not go with another of the row.
    """
    for name in ("memory", "sparse_ift"):
        if getattr(options, name):
            raise InputError(f"model: does not go with {name}; leave out one of them")
    if (experiment.layers if options.layers is None else options.layers) != "all":
        raise InputError("model: is of all blocks, and layers chooses some; set layers to all")
    size, length = experiment.model, experiment.text.sequence_length
    count = block_flops(size, length, options.model)
    with torch.device("meta"):
        layer, own = baseline.build(size.d_model), method.build(size.d_model)
    count(own)  # raises what is wrong before widths are tried
    return count, block_flops(size, length, {})(layer)


def _beside(
    method: moezoo.Method, d_model: int, arguments: dict[str, Any], target: int
) -> tuple[dict[str, Any], int]:
    """Return the arguments of a layer that is added beside the baseline, and its FLOPs per token.

    Raises:
        InputError: the method takes a block's place, or leaves nothing for the baseline.
    """
    if method.layer.added is None:
        raise InputError(
            f"memory: {method.layer.__name__} takes the place of a feed-forward block; set it to "
            "false"
        )
    arguments = {**method.layer.added_as, **arguments}
    flops = match_flops(method, d_model, target, arguments=arguments, width="none").flops
    if flops >= target:
        raise InputError(
            f"memory: it takes {flops / target:.3g} times the baseline's FLOPs; make it smaller"
        )
    return arguments, flops
