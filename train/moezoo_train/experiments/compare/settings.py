"""The options of ``moezoo compare``."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

import moezoo
from moezoo.errors import InputError, check_choice, check_int, check_number, nearest
from moezoo.feed_forward import Paper, registered, select_layers
from moezoo.router_input import RouterInput
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.compare.width import WIDTHS
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.presets import PUBLISHED, block_of

MEASURES = {"loss": "val_loss", "busiest": "busiest", "unevenness": "unevenness"}
"""Measures that a claim may compare, and the field of a run's result that holds each."""


@dataclass(frozen=True)
class MethodOptions:
    """One row of the table.

    Attributes:
        method: name of a method of the zoo, or of a preset, whose layer it is then; default: the
            row's own name.
        arguments: arguments of the layer that differ from the method's.
        router_input: what the router reads in those blocks (``ffn_input``, ``pre_attention`` or
            ``post_attention``); default: as in the method's paper.
        layers: blocks that get the layer (``all``, ``every 2``, ``3`` or ``[3, 7]``), while the
            others keep the baseline; default: those of all rows.
        width: the argument that is solved for, so that the layer's FLOPs match the baseline's;
            ``none`` to leave the layer as it is. Default: the layer's own, see ``width``.
        memory: add the layer to the residual stream beside the baseline, which is made narrower for
            it, for methods that can be a model's memory.
        model: options of this row's model (``attention_experts``, ``latent_attention``,
            ``num_kv_heads``, ``parallel``, ``qk_norm``); whole blocks, attention included, then
            have the baseline's FLOPs.
        ablation: also train it with random routing; default: as for all rows.
        optimizer: optimizer settings that differ from those of all rows.
        sparse_ift: of dense blocks with sparse matrices, how they are enlarged until the weights
            that are kept have the baseline's FLOPs: ``wide``, ``parallel``, ``factorized`` or
            ``doped`` (arXiv:2303.11525).
    """

    method: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    router_input: RouterInput | None = None
    layers: str | int | list[int] | None = None
    width: str | None = None
    memory: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    ablation: bool | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    sparse_ift: Literal["wide", "parallel", "factorized", "doped"] | None = None


@dataclass(frozen=True)
class Claim:
    """A paper's claim about some rows.

    Attributes:
        says: the claim in words.
        paper: where, e.g. an arXiv number.
        order: rows from the lowest measure to the highest; a place may be a list of rows, of
            which each is claimed to be below each of the next place.
        measure: ``loss``, ``busiest`` or ``unevenness``.
    """

    says: str
    paper: str
    order: list[str | list[str]]
    measure: str = "loss"

    @property
    def places(self) -> list[list[str]]:
        """The order, with each place as a list."""
        return [[place] if isinstance(place, str) else list(place) for place in self.order]


@dataclass(frozen=True)
class Experiment:
    """Everything that the runs of one comparison have in common, and its rows.

    Attributes: as the arguments of :func:`moezoo_train.experiments.compare.compare`.
    """

    methods: dict[str, MethodOptions]
    baseline: str
    layers: str | int | list[int]
    ablation: bool
    seeds: tuple[int, ...]
    max_steps: int
    tolerance: float
    model: ModelOptions
    text: TextOptions
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: str
    claims: dict[str, Claim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_int("max_steps", self.max_steps)
        check_number("tolerance", self.tolerance, maximum=1.0)
        if not self.seeds:
            raise InputError("seeds: there is none; give e.g. [0, 1, 2]")
        for seed in self.seeds:
            check_int("seeds", seed, minimum=0)
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: {list(self.seeds)} holds one twice; each is one run")
        select_layers(self.layers, check_int("model.num_layers", self.model.num_layers))
        check_int("text.batch_size", self.text.batch_size)
        check_int("text.sequence_length", self.text.sequence_length)

    def optimizer_of(self, row: str) -> OptimizerConfig:
        """Return a row's optimizer: that of all rows, with the row's own settings."""
        own = self.methods[row].optimizer
        common = {
            f.name: getattr(self.optimizer, f.name) for f in dataclasses.fields(OptimizerConfig)
        }
        return _named(f"methods.{row}.optimizer", OptimizerConfig, {**common, **own}).here()


def configuration(experiment: Experiment, output: str) -> str:
    """Write a comparison as the YAML file that repeats it.

    Args:
        experiment: the options of the comparison.
        output: directory of the comparison.
    """
    # By way of JSON tuples become lists.
    options = json.loads(json.dumps(dataclasses.asdict(experiment)))
    methods = {
        name: {
            key: value
            for key, value in row.items()
            if value not in (None, {}) and (key, value) != ("memory", False)
        }
        for name, row in options.pop("methods").items()
    }
    claims = options.pop("claims")
    whole = {"output": output, **options, "methods": methods}
    if claims:
        whole["claims"] = claims
    return str(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))


def parse_methods(methods: Mapping[str, Any]) -> dict[str, MethodOptions]:
    """Read the rows from what a YAML file holds.

    Raises:
        InputError: there is none, or an option of one is unknown or of the wrong kind.
    """
    if not methods:
        raise InputError("methods: there is none; name some, e.g. methods: {mixtral: {}, peer: {}}")
    return {str(name): _parse_method(str(name), options) for name, options in methods.items()}


def _parse_method(name: str, options: Any) -> MethodOptions:
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"methods.{name}: {options!r} is not a mapping; write e.g. {{layers: 2}}")
    if not name or any(c in name for c in "/\\ ") or name.startswith("."):
        raise InputError(f"methods: '{name}' cannot be the name of a folder; use letters and _")
    parsed = _named(f"methods.{name}", MethodOptions, dict(options or {}))
    for key in ("arguments", "model", "optimizer"):
        if not isinstance(getattr(parsed, key), Mapping):
            raise InputError(f"methods.{name}.{key}: is no mapping; write names and values")
    return parsed


def parse_claims(
    claims: Mapping[str, Any], methods: Mapping[str, MethodOptions]
) -> dict[str, Claim]:
    """Read what is claimed of the rows from what a YAML file holds.

    Raises:
        InputError: an option of a claim is unknown, missing or of the wrong kind, or names no row.
    """
    return {str(name): _parse_claim(f"claims.{name}", c, methods) for name, c in claims.items()}


def _parse_claim(key: str, options: Any, methods: Mapping[str, MethodOptions]) -> Claim:
    if not isinstance(options, Mapping):
        raise InputError(f"{key}: {options!r} is not a mapping; write e.g. {{order: [peer, hash]}}")
    for name in ("says", "paper", "order"):
        if name not in options:
            raise InputError(f"{key}.{name}: is missing; add it")
    claim: Claim = _named(key, Claim, dict(options))
    for name in ("says", "paper", "measure"):
        if not isinstance(text := getattr(claim, name), str):
            raise InputError(f"{key}.{name}: {text!r} is not text; put it in quotes")
    check_choice(f"{key}.measure", claim.measure, MEASURES)
    if not isinstance(claim.order, list) or len(claim.order) < 2:
        raise InputError(f"{key}.order: name two rows or more, the lowest first")
    if not all(isinstance(place, str | list) for place in claim.order):
        raise InputError(f"{key}.order: each place is the name of a row, or a list of names")
    if not all(claim.places):
        raise InputError(f"{key}.order: a place has no row; name one or more")
    for row in itertools.chain(*claim.places):
        check_choice(f"{key}.order", row, methods)
    return claim


def _named(key: str, cls: Any, options: dict[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise InputError(f"{key}.{option}: no such option{nearest(str(option), known)}")
    try:
        return cls(**options)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def find_method(key: str, name: str) -> moezoo.Method:
    """Look a feed-forward method of the zoo up, or the layer of a preset, without its width.

    Raises:
        InputError: there is none of that name.
    """
    methods = {method.name: method for method in feed_forward_methods()}
    if check_choice(key, name, [*methods, *PUBLISHED]) in methods:
        return methods[name]
    class_path, arguments = block_of(name)
    layer = registered(class_path)
    own = {key: value for key, value in arguments.items() if key != WIDTHS[layer]}
    return moezoo.Method(name, layer, Paper("", 0, PUBLISHED[name].source, ""), own)


def feed_forward_methods() -> list[moezoo.Method]:
    """List the methods that stand in for a feed-forward block, not for attention."""
    return [method for method in moezoo.zoo() if method.layer.kind == "feed_forward"]
