"""The checks of layers notice: each fault that is put into a fast path fails the comparison."""

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.experts.rank_one import RankOneExperts
from moezoo.experts.slots import PersistentSlots
from moezoo.experts.values import ValueTable
from moezoo.feed_forward import FeedForward
from moezoo.layers.finedeep import SubLayer
from moezoo.routing import Router, Routing, capacity, rounding, router, tree

sys.path.insert(0, str(Path(__file__).parent))

from plain.cases import CONVENTIONS, SITUATIONS, ZOO
from plain.compare import (
    PLAIN,
    assert_causal_as_declared,
    assert_same,
    by_layer,
    by_plain,
    inputs,
)

CASES = {**ZOO, **CONVENTIONS}
Change = Callable[[Tensor], Tensor]


def in_result(call: Callable[..., Any], change: Change) -> Callable[..., Any]:
    """Change the weights that a call returns: all of its result, its first part or its field."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if isinstance(result, Tensor):
            return change(result)
        if isinstance(result, Routing):
            return result._replace(weights=change(result.weights))
        return change(result[0]), *result[1:]

    return changed


def in_argument(number: int) -> Callable[..., Any]:
    """Change the weights that a call is given as one of its arguments, ``self`` being 0."""

    def wrap(call: Callable[..., Any], change: Change) -> Callable[..., Any]:
        return lambda *args: call(*args[:number], change(args[number]), *args[number + 1 :])

    return wrap


# What hands over the weights by which answers are added up, per class.
WEIGHED = {
    "CarvedMoE": (Router, "forward", in_result),
    "Engram": (ValueTable, "forward", in_argument(2)),
    "FastFeedForward": (tree, "leaf_probabilities", in_result),
    "HashLayer": (moezoo.HashLayer, "route", in_result),
    "L3": (moezoo.L3, "_weigh", in_result),
    "MemoryPlus": (ValueTable, "forward", in_argument(2)),
    "MoLE": (moezoo.MoLE, "weigh", in_result),
    "PEER": (RankOneExperts, "forward", in_argument(3)),
    "PerLayerEmbedding": (ValueTable, "forward", in_argument(2)),
    "PersistentMemoryAttention": (PersistentSlots, "forward", in_result),
    "ProductKeyMemory": (ValueTable, "forward", in_argument(2)),
    "STEM": (ValueTable, "forward", in_argument(2)),
    "Finedeep": (SubLayer, "weigh", in_result),
    "SigmaMoE": (Router, "forward", in_result),
    "SparseMoE": (Router, "forward", in_result),
}
UNWEIGHED = {
    "DenseFFN": "all of it answers every token",
    "SelectiveFFN": "a neuron that is kept answers with its activation",
    "TopKFFN": "a neuron that is kept answers with its activation",
    "UltraFastFFF": "a neuron on the way answers with its activation",
}
WITHOUT_BIAS = {
    "Engram",
    "L3",
    "PerLayerEmbedding",
    "PersistentMemoryAttention",
    "STEM",
    "SigmaMoE",
    "TopKFFN",
}
# Trees of one node leave nothing to choose.
NO_CHOICE = {"fff_one_leaf", "ultra_root", "l3_one_row"}
# Arguments of layers that change no number of a single call with given weights.
UNSEEN = {
    "allocation": "how many rows a token has; a buffer says it",
    "balance.scope": "one process, and one micro-batch",
    "balance.sparsity": "where a buffer begins",
    "balance.sparsity_growth": "acts in step()",
    "balance.sparsity_scope": "one layer",
    "bias_update_rate": "acts in step()",
    "clip_values_apart": "the optimizer's",
    "compression": "which ids are hashed; a buffer says it",
    "embedding_pool": "whose the embeddings are",
    "expert_lr_multiplier": "the optimizer's",
    "HashLayer.hash_function": "says which table is made; a table is a weight",
    "HashLayer.weights": "learned with top_k of 2 or more, and only then",
    "SparseMoE.num_shared_experts": "the default of d_shared",
    "matrices.block": "acts in step(); a mask is a buffer",
    "matrices.dense_from": "acts in step()",
    "matrices.every": "acts in step()",
    "matrices.growth_end": "acts in step()",
    "matrices.init": "says how factors begin",
    "matrices.kind": "others have other options",
    "matrices.scope": "acts in step()",
    "matrices.sparsity": "acts in step(); a mask is a buffer",
    "offload": "where a table lies",
    "router.bias_recentre": "acts in step()",
    "router.bias_rule": "acts in step()",
    "router.bias_update_rate": "acts in step()",
    "router.expected_experts": "acts in step()",
    "router.threshold_decay": "acts in step()",
    "router_lr_multiplier": "the optimizer's",
    "selection.gate": "where a buffer begins",
    "selection.hidden": "where a buffer begins",
    "selection.input": "where a buffer begins",
    "selection.up_input": "where a buffer begins",
    "seed": "of the table, which is a weight",
    "sparse": "the layout of a gradient",
    "table_lr_multiplier": "the optimizer's",
    "u_lr_multiplier": "the optimizer's",
    "value_lr_multiplier": "the optimizer's",
    "value_pool": "whose the table is",
}


@functools.cache
def expected(name: str, situation: str) -> tuple[FeedForward, dict[str, Any]]:
    """Return a layer and what its plain reference computes; the layer is to be left as it was."""
    layer = CASES[name]()
    return layer, by_plain(layer, *inputs(layer, SITUATIONS[situation]))


def is_noticed(layer: FeedForward, name: str, situation: str) -> bool:
    try:
        found = by_layer(layer, *inputs(layer, SITUATIONS[situation]))
        assert_same(found, expected(name, situation)[1])
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_listed_with_what_weighs_its_answers(name):
    layer, _ = expected(name, "train_padded")
    kind = type(layer).__name__
    assert (kind in WEIGHED) != (kind in UNWEIGHED)
    if kind in UNWEIGHED:
        parts = [type(part).__module__ for part in layer.modules()]
        assert not [part for part in parts if part.startswith("moezoo.routing")]
        assert not layer.needs_token_ids


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_without_a_bias_is_listed(name):
    layer = ZOO[name]()
    names = [key for key, _ in [*layer.named_parameters(), *layer.named_buffers()]]
    has_bias = any("bias" in key or key.endswith((".shift", "b_out")) for key in names)
    assert has_bias == (type(layer).__name__ not in WITHOUT_BIAS)


@pytest.mark.parametrize("name", [n for n in CASES if type(CASES[n]()).__name__ in WEIGHED])
@pytest.mark.parametrize("fault", ["a hundredth too large", "without a gradient"])
def test_changed_weights_are_noticed(name, fault, monkeypatch):
    layer, _ = expected(name, "train_padded")
    kind = type(layer).__name__
    assert not is_noticed(layer, name, "train_padded")
    owner, function, wrap = WEIGHED[kind]
    change = (lambda w: 1.01 * w) if fault == "a hundredth too large" else Tensor.detach
    monkeypatch.setattr(owner, function, wrap(getattr(owner, function), change))
    # Weights that are not learned are ones, and so is that of the only leaf.
    ones = kind in ("Engram", "PerLayerEmbedding", "STEM") or (
        kind == "HashLayer" and layer.gate is None
    )
    constant = ones or name in NO_CHOICE
    if fault == "a hundredth too large" or not constant:
        assert is_noticed(layer, name, "train_padded")


def weigh_by_the_biased_score(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Router.forward

    def biased(self: Router, *args: Any) -> Routing:
        routing = forward(self, *args)
        bias = self.selection_bias[routing.indices.clamp(min=0)]
        return routing._replace(
            weights=routing.weights + bias.masked_fill(routing.indices < 0, 0.0)
        )

    monkeypatch.setattr(Router, "forward", biased)


def close_groups_with_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Tensor.masked_fill
    zeroed = {-torch.inf: 0.0}
    monkeypatch.setattr(Tensor, "masked_fill", lambda x, m, v: fill(x, m, zeroed.get(v, v)))


def serve_tokens_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = capacity.within_capacity

    def in_turn(indices_TK: Tensor, experts: int, room: Tensor) -> Tensor:
        return serve(indices_TK.reshape(-1, 1), experts, room).reshape(indices_TK.shape)

    monkeypatch.setattr(capacity, "within_capacity", in_turn)


def give_padding_room(monkeypatch: pytest.MonkeyPatch) -> None:
    count = capacity.count_tokens
    monkeypatch.setattr(capacity, "count_tokens", lambda indices, mask: count(indices, None))


def round_halves_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_up(counts_E: Tensor, multiple: int) -> Tensor:
        return (2 * counts_E + multiple) // (2 * multiple) * multiple

    monkeypatch.setattr(rounding, "nearest_multiple", half_up)


def take_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    best = rounding.among_best
    monkeypatch.setattr(rounding, "among_best", lambda values, *others: best(values * 0, *others))


def weigh_the_added_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "weights_of_all", lambda scores, *_: torch.ones_like(scores))


def let_padding_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = rounding.round_tokens
    monkeypatch.setattr(
        router, "round_tokens", lambda a, b, c, mask, multiple: rounded(a, b, c, None, multiple)
    )


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("token_rounding", round_halves_up),
        ("token_rounding", take_anyone),
        ("token_rounding_raw", take_anyone),
        ("token_rounding", weigh_the_added_by_one),
        ("token_rounding_raw", weigh_the_added_by_one),
        ("token_rounding", let_padding_be_added),
        ("deepseek_v3", weigh_by_the_biased_score),
        ("softmax_bias_normalized", weigh_by_the_biased_score),
        ("chosen_by_logit", weigh_by_the_biased_score),
        ("weights_with_shared", weigh_by_the_biased_score),
        ("deepseek_v3", close_groups_with_a_zero),
        ("chosen_by_logit", close_groups_with_a_zero),
        ("small_capacity", serve_tokens_one_after_another),
        ("capacity_of_each_sequence", serve_tokens_one_after_another),
        ("capacity_by_score", serve_tokens_one_after_another),
        ("small_capacity", give_padding_room),
        ("capacity_by_score", give_padding_room),
    ],
)
def test_faults_that_public_routers_had_are_noticed(name, fault, monkeypatch):
    layer = CASES[name]()
    if fault is close_groups_with_a_zero:  # which wins over what is below it
        layer.gate.selection_bias -= 1.0
    hidden, call = inputs(layer, SITUATIONS["train_padded"])
    right = by_plain(layer, hidden, call)
    assert_same(by_layer(layer, hidden, call), right)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(by_layer(layer, hidden, call), right)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_causal_is_noticed(name, monkeypatch):
    layer = CASES[name]()
    assert_causal_as_declared(layer)
    causal = layer.causal
    monkeypatch.setattr(type(layer), "causal", property(lambda self: not causal))
    with pytest.raises(AssertionError, match="earlier outputs are"):
        assert_causal_as_declared(layer)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_and_buffer_is_noticed(name):
    """A bias that is dropped, a weight that is a hundredth too large, a table that is another."""
    layer = CASES[name]()
    for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if not tensor.numel() or key == "selector.shares":  # which say what a call costs
            continue
        if key.endswith((".steps", ".stage")):  # when a mask is to change
            continue
        before = tensor.detach().clone()
        with torch.no_grad():
            if not tensor.is_floating_point():
                other = (tensor + 1) % getattr(layer, "num_experts", 7)
                tensor.copy_(~tensor if tensor.dtype == torch.bool else other)
            elif tensor.ndim < 2 or key.endswith("bias"):
                tensor.zero_()
            elif key in ("selector.reduce", "selector.expand"):  # whose order is all that counts
                tensor.copy_(tensor.roll(1, 1))
            else:
                tensor.mul_(1.01)
        noticed = any(is_noticed(layer, name, s) for s in ("train_padded", "eval_asked_padded"))
        with torch.no_grad():
            tensor.copy_(before)
        assert noticed, key
    assert not is_noticed(layer, name, "train_padded")


@pytest.mark.parametrize("name", CASES)
def test_context_that_is_not_read_is_noticed(name):
    layer, right = expected(name, "eval_asked_padded")
    hidden, call = inputs(layer, SITUATIONS["eval_asked_padded"])
    others = {"mask": None, "router_input": None, "token_ids": call.token_ids.flip(-1)}
    read = {
        "mask": not isinstance(layer, moezoo.Finedeep)
        and (not isinstance(layer, moezoo.DenseFFN) or layer.trains_sparse),
        "router_input": layer.reads_router_input and name not in NO_CHOICE,
        "token_ids": layer.needs_token_ids and layer.config()["init_args"].get("key") != "position",
    }
    for field, other in others.items():
        found = by_layer(layer, hidden, call._replace(**{field: other}))
        # A router input that is not given has no gradient to compare.
        found["d router_input"] = right["d router_input"]
        try:
            assert_same(found, right)
        except AssertionError:
            assert read[field], field
        else:
            assert not read[field], field


def altered(layer: FeedForward, path: str, value: Any) -> FeedForward | None:
    """Return the layer with another value of an option; None if that is refused.

    Raises:
        RuntimeError: its weights do not fit.
    """
    config = layer.config()
    *groups, key = path.split(".")
    arguments = config["init_args"]
    for group in groups:
        arguments = arguments[group]
    arguments[key] = value
    try:
        other = FeedForward.from_config(config).double()
    except moezoo.InputError:
        return None
    other.load_state_dict(layer.state_dict())
    return other


def other_values(cls: type, arguments: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield every option's name and other values of the kind that it takes."""
    hints = typing.get_type_hints(cls.__init__)
    for name, value in arguments.items():
        if name == "d_model":
            continue
        if isinstance(value, dict):
            members = (hints[name], *typing.get_args(hints[name]))
            groups = [member for member in members if dataclasses.is_dataclass(member)]
            group = next(g for g in groups if {f.name for f in dataclasses.fields(g)} == {*value})
            for key, values in other_values(group, value):
                yield f"{name}.{key}", values
        elif isinstance(value, bool):
            yield name, [not value]
        elif isinstance(value, int):
            yield (
                name,
                [value + 1, value - 1, value // 2, 2 * value, 4 * value, 1],
            )  # 4: of squares another square
        elif isinstance(value, float):
            yield name, [value / 2, value + 0.3]
        else:
            members = [hints[name], *typing.get_args(hints[name])]
            choices = [c for m in members for c in typing.get_args(m) if isinstance(c, str)]
            choices += [c for c in (True, False) if bool in members]
            yield name, [choice for choice in choices if choice != value]


@pytest.mark.parametrize("kind", PLAIN)
def test_every_option_is_noticed(kind):
    """In some case of its class, or it is named as one that no single call shows."""
    unseen = {name.removeprefix(f"{kind}.") for name in UNSEEN}
    noticed: dict[str, bool] = {}
    for name in [n for n in CASES if type(CASES[n]()).__name__ == kind]:
        layer = CASES[name]()
        for path, values in other_values(type(layer), layer.config()["init_args"]):
            known = noticed.get(path, False) or (path in noticed and path in unseen)
            if path in ("sparse", "offload") or known or not values:
                continue
            noticed[path] = any(makes_a_difference(layer, name, path, value) for value in values)
    assert {path for path in noticed if not noticed[path]} == unseen & set(noticed)


def makes_a_difference(layer: FeedForward, name: str, path: str, value: Any) -> bool:
    try:
        other = altered(layer, path, value)
    except RuntimeError:  # the weights are of another shape
        return True
    if other is None:
        return False
    try:
        return any(is_noticed(other, name, s) for s in ("train_padded", "eval_asked_padded"))
    except moezoo.InputError:  # the call is refused
        return True
