"""The conventions by which routers of transformers choose and weigh, as options of ours.

A convention reads what it needs off the modules, not the configuration: a module is what runs, and
one configuration may hold for some layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Options = dict[str, Any]
"""Arguments of :class:`moezoo.RouterOptions`."""


@dataclass(frozen=True)
class Convention:
    """How a router chooses experts and weighs them.

    Attributes:
        title: in a few words.
        formula: from logits to weights, as a line of plain text.
        trap: what one would guess wrong.
        read: from the router and its block to options.
    """

    title: str
    formula: str
    trap: str
    read: Callable[[Any, Any], Options]


def _first(modules: tuple[nn.Module, ...], names: tuple[str, ...], default: Any) -> Any:
    """Return the first attribute of that name that a module has."""
    for module in modules:
        for name in names:
            if hasattr(module, name):
                return getattr(module, name)
    return default


def _scale(router: nn.Module, block: nn.Module) -> float:
    names = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
    return float(_first((router, block), names, 1.0))


def _normalize(router: nn.Module) -> bool:
    return bool(_first((router,), ("norm_topk_prob",), True))


def _softmax(router: Any, block: Any) -> Options:
    return {"normalize": _normalize(router)}


def _softmax_raw(router: Any, block: Any) -> Options:
    return {"normalize": False}


def _groups(router: Any, **options: Any) -> Options:
    return {"num_groups": router.num_group, "top_groups": router.topk_group, **options}


def _softmax_groups(router: Any, block: Any) -> Options:
    options = {"normalize": False, "scale": _scale(router, block)}
    if router.topk_method == "greedy":
        return options
    return _groups(router, group_score="max", **options)


def _softmax_group_pairs(router: Any, block: Any) -> Options:
    options = {"normalize": _normalize(router), "scale": _scale(router, block)}
    return _groups(router, group_score="sum_of_two", **options)


def _sigmoid_groups(router: Any, block: Any) -> Options:
    return _groups(router, group_score="sum_of_two", **_sigmoid_bias(router, block))


def _sigmoid(router: Any, block: Any) -> Options:
    return {"score": "sigmoid", "normalize": _normalize(router), "scale": _scale(router, block)}


def _sigmoid_bias(router: Any, block: Any) -> Options:
    return {"selection_bias": True, **_sigmoid(router, block)}


def _cohere(router: Any, block: Any) -> Options:
    softmax = router.expert_selection_fn == "softmax"
    return {
        "score": router.expert_selection_fn,
        "normalize": softmax or _normalize(router),
    }


CONVENTIONS = {
    "softmax": Convention(
        "softmax over all experts",
        "p = softmax(l); top-k of p; w = p / (sum of the chosen p)",
        "norm_topk_prob says whether it is divided, and is false by default in OLMoE and "
        "Qwen2-MoE; Mixtral has no such flag and always divides",
        _softmax,
    ),
    "softmax_raw": Convention(
        "softmax over all experts, as it is",
        "p = softmax(l); top-k of p; w = p",
        "the weights of a token do not sum to one, and there is no flag that says so",
        _softmax_raw,
    ),
    "top_k_softmax": Convention(
        "softmax over the chosen experts",
        "top-k of l; w = softmax(chosen l)",
        "the numbers are those of a softmax over all experts, divided by the sum of the chosen",
        _softmax,
    ),
    "cohere": Convention(
        "softmax or sigmoid of the chosen logits",
        "top-k of l; w = softmax(chosen l), or sigmoid(l) [/ sum]",
        "norm_topk_prob counts for sigmoids only; 'average' halves routed and shared together",
        _cohere,
    ),
    "softmax_groups": Convention(
        "softmax, groups by their best expert",
        "p = softmax(l); best groups by max p; top-k of p in these; w = scale p",
        "the weights are not divided by their sum, whatever norm_topk_prob says: the class does "
        "not read it",
        _softmax_groups,
    ),
    "softmax_group_pairs": Convention(
        "softmax, groups by their two best experts",
        "p = softmax(l); best groups by the sum of their two best p; top-k of p in these; "
        "w = scale p / (sum + 1e-20)",
        "experts of closed groups score 0, not -inf, and no bias is added: they are chosen only "
        "where the open ones underflow to 0 as well",
        _softmax_group_pairs,
    ),
    "sigmoid_groups": Convention(
        "sigmoid, selection bias, groups by their two best experts",
        "s = sigmoid(l); best groups by the sum of their two best s + b; top-k of s + b in these; "
        "w = scale s / (sum + 1e-20)",
        "the bias chooses groups and experts, and does not weigh",
        _sigmoid_groups,
    ),
    "sigmoid_bias": Convention(
        "sigmoid, selection bias",
        "s = sigmoid(l); top-k of s + b; w = scale s / (sum [+ 1e-20])",
        "the bias is a buffer of the router, of the block, or a frozen parameter of either; the "
        "scale is the router's or the block's, which multiplies the sum of the experts",
        _sigmoid_bias,
    ),
    "sigmoid": Convention(
        "sigmoid, no bias",
        "s = sigmoid(l); top-k of s; w = s [/ sum]",
        "nothing is added to the sum before it divides: all sigmoids underflowing is 0 / 0",
        _sigmoid,
    ),
}
"""Each convention by its name in the table of blocks."""
