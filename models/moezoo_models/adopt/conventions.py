"""The conventions by which routers of transformers choose and weigh, as options of ours.

A convention reads what it needs off the modules, not the configuration: a module is what runs, and
one configuration may hold for some layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moezoo.routing import CapacityOptions, LogitOptions, WeightOptions

Options = dict[str, Any]
"""Arguments of :class:`moezoo.RouterOptions`, and the layer's ``capacity``."""


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


def _eps(normalize: bool, eps: float) -> WeightOptions:
    """Return how weights are divided by their sum, if they are."""
    return WeightOptions(eps=eps) if normalize else WeightOptions()


def _softmax(router: Any, block: Any) -> Options:
    return {"normalize": _normalize(router), **_jitter(block)}


def _jitter(block: Any) -> Options:
    """Return the jitter of a block whose experts read what its router reads."""
    jitter = float(getattr(block, "jitter_noise", 0.0))
    return {"jitter": jitter, "jitter_experts": True} if jitter else {}


def _softmax_raw(router: Any, block: Any) -> Options:
    return {"normalize": False}


def _biased_softmax(router: Any, block: Any) -> Options:
    return {"normalize": True, "logits": LogitOptions(bias=True)}


def _ernie(router: Any, block: Any) -> Options:
    return {"selection_bias": True, "weights": WeightOptions(minimum=router.norm_min)}


def _groups(router: Any, group_score: str, closed_groups: str, **options: Any) -> Options:
    """Return how groups are chosen, if a token does not take experts from all of them."""
    if router.topk_group >= router.num_group:
        return options
    how = {"group_score": group_score, "closed_groups": closed_groups}
    return {**options, "num_groups": router.num_group, "top_groups": router.topk_group, **how}


def _softmax_groups(router: Any, block: Any) -> Options:
    options = {"normalize": False, "scale": _scale(router, block)}
    if router.topk_method == "greedy":
        return options
    return _groups(router, "max", "exclude", **options)


def _softmax_group_pairs(router: Any, block: Any) -> Options:
    normalize = _normalize(router)
    options = {"normalize": normalize, "scale": _scale(router, block)}
    weights = _eps(normalize, 1e-20)
    return _groups(router, "sum_of_two", "zero", weights=weights, **options)


def _sigmoid_groups(router: Any, block: Any, closed_groups: str = "exclude") -> Options:
    options = {**_sigmoid(router, block, 1e-20), "selection_bias": True}
    return _groups(router, "sum_of_two", closed_groups, **options)


def _sigmoid_groups_zero(router: Any, block: Any) -> Options:
    if router.num_group is None:
        return {**_sigmoid(router, block, 1e-20), "selection_bias": True}
    return _sigmoid_groups(router, block, "zero")


def _sigmoid(router: Any, block: Any, eps: float = 0.0) -> Options:
    normalize = _normalize(router)
    return {
        "score": "sigmoid",
        "normalize": normalize,
        "scale": _scale(router, block),
        "weights": _eps(normalize, eps),
    }


def _sigmoid_bias(router: Any, block: Any) -> Options:
    return {**_sigmoid(router, block), "selection_bias": True, **_jitter(block)}


def _sigmoid_bias_eps(router: Any, block: Any) -> Options:
    return {**_sigmoid(router, block, 1e-20), "selection_bias": True}


def _lfm(router: Any, block: Any) -> Options:
    return {**_sigmoid(router, block, 1e-6), "selection_bias": bool(router.use_expert_bias)}


def _laguna(router: Any, block: Any) -> Options:
    cap = max(float(router.router_logit_softcapping), 0.0)
    return {**_sigmoid_bias(router, block), "logits": LogitOptions(softcap=cap)}


def _muse(router: Any, block: Any) -> Options:
    logits = LogitOptions(scale=float(router.output_multiplier))
    eps = float(router.norm_topk_prob_eps)
    return {**_sigmoid(router, block, eps), "selection_bias": True, "logits": logits}


def _kolibri(router: Any, block: Any) -> Options:
    return {**_sigmoid_bias(router, block), "select_on": "logit"}


def _llama4(router: Any, block: Any) -> Options:
    weights = WeightOptions(apply_to="input")
    return {"score": "sigmoid", "normalize": False, "weights": weights}


def _inkling(router: Any, block: Any) -> Options:
    weights = WeightOptions(eps=0.0, with_shared=True, learned_scale=True)
    options = {"score": "sigmoid", "selection_bias": True, "weights": weights}
    return {**options, "scale": _scale(router, block)}


def _named_score(router: Any, block: Any) -> Options:
    names = {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "sqrt_softplus"}
    score = names.get(type(router.score_fn).__name__, "softmax")
    options = {**_sigmoid(router, block, 1e-20), "score": score}
    return {**options, "selection_bias": hasattr(router, "e_score_correction_bias")}


def _gemma(router: Any, block: Any) -> Options:
    logits = LogitOptions(norm=True, norm_eps=float(router.eps))
    return {"normalize": True, "logits": logits, "weights": WeightOptions(expert_scale=True)}


def _longcat(router: Any, block: Any) -> Options:
    return {"normalize": False, "scale": _scale(router, block), "selection_bias": True}


def _mixer(router: Any, block: Any) -> Options:
    eps = float(router.router_jitter_noise)
    return {"score": "sparse_mixer", "normalize": False, "mixer_eps": eps}


def _zaya(router: Any, block: Any) -> Options:
    mlp = router.router_mlp
    logits = LogitOptions(
        mlp=router.router_hidden_size,
        norm_eps=float(mlp.norm.variance_epsilon),
        carry=bool(router.use_eda),
    )
    return {"normalize": False, "selection_bias": True, "logits": logits}


def _switch(router: Any, block: Any) -> Options:
    options: Options = {
        "normalize": False,
        "logits": LogitOptions(bias=router.classifier.bias is not None),
        "capacity": CapacityOptions(fixed=int(router.expert_capacity), scope="sequence"),
    }
    if jitter := float(router.jitter_noise):
        # In place, and so on what experts read, unless the router makes a copy of another dtype.
        experts_too = next(block.experts.parameters()).dtype == router.dtype
        options |= {"jitter": jitter, "jitter_experts": experts_too}
    return options


def _dbrx(router: Any, block: Any) -> Options:
    p, jitter = block.moe_normalize_expert_weights, router.moe_jitter_eps
    options: Options = {"normalize": p is not None}
    if p is not None:
        options["weights"] = WeightOptions(p=float(p))
    return {**options, "jitter": float(jitter), "jitter_experts": True} if jitter else options


def _cohere(router: Any, block: Any) -> Options:
    if router.expert_selection_fn == "softmax":
        return {"score": "softmax", "normalize": True}
    return _sigmoid(router, block)


CONVENTIONS = {
    "softmax": Convention(
        "softmax over all experts",
        "p = softmax(l); top-k of p; w = p [/ sum of the chosen p]",
        "norm_topk_prob says whether it is divided, and is false by default in OLMoE, Qwen2-MoE "
        "and Qwen3-MoE; Mixtral has no such flag and always divides",
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
    "biased_softmax": Convention(
        "router bias, softmax over the chosen experts",
        "l = W x + c; top-k of l; w = softmax(chosen l)",
        "the bias is learned, chooses and weighs; the privacy filter's router divides by k, "
        "and its block multiplies the sum by k again",
        _biased_softmax,
    ),
    "ernie": Convention(
        "softmax, selection bias",
        "p = softmax(l); top-k of p + b; w = p / max(sum, m)",
        "the bias does not weigh; it is stored as (1, E), in a module of its own within the router",
        _ernie,
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
        "w = scale p [/ (sum + 1e-20)]",
        "experts of closed groups score 0, not -inf, and no bias is added: they are chosen only "
        "where the open ones underflow to 0 as well",
        _softmax_group_pairs,
    ),
    "sigmoid_groups": Convention(
        "sigmoid, selection bias, groups by their two best experts",
        "s = sigmoid(l); best groups by the sum of their two best s + b; top-k of s + b in these; "
        "w = scale s [/ (sum + 1e-20)]",
        "the bias chooses groups and experts, and does not weigh",
        _sigmoid_groups,
    ),
    "sigmoid_groups_zero": Convention(
        "sigmoid, selection bias, groups that are closed by 0",
        "as before, but s + b is 0 in closed groups; top-k of that",
        "with biases below 0 a closed group's experts have the larger number and are chosen, and "
        "weighed by their s",
        _sigmoid_groups_zero,
    ),
    "sigmoid_bias_eps": Convention(
        "sigmoid, selection bias",
        "s = sigmoid(l); top-k of s + b; w = scale s / (sum + 1e-20)",
        "the bias is an attribute of the block, which hands it to its router",
        _sigmoid_bias_eps,
    ),
    "sigmoid_bias": Convention(
        "sigmoid, selection bias, plain sum",
        "s = sigmoid(l); top-k of s + b; w = scale s / sum",
        "nothing is added to the sum; the scale is the block's, which multiplies the sum of the "
        "routed experts by it, not that of the shared ones",
        _sigmoid_bias,
    ),
    "lfm": Convention(
        "sigmoid, selection bias, large epsilon",
        "s = sigmoid(l); top-k of s [+ b]; w = scale s [/ (sum + 1e-6)]",
        "1e-6 shows in fp32, where 1e-20 does not",
        _lfm,
    ),
    "laguna": Convention(
        "capped logits, sigmoid, selection bias",
        "s = sigmoid(c tanh(l / c)); top-k of s + b; w = scale s / sum",
        "the cap is on the logits, so that no s is near 0 or 1; 0 means none",
        _laguna,
    ),
    "muse": Convention(
        "scaled logits, sigmoid, selection bias",
        "s = sigmoid(m l); top-k of s + b; w = scale s / (sum + 1e-15)",
        "m is output_multiplier, 0.1768 at any width, which is 1 / sqrt(hidden_size / 256) at the "
        "published one; each expert's output is divided by its root mean square before it is "
        "weighed, so that its size says nothing",
        _muse,
    ),
    "kolibri": Convention(
        "selection bias on the logit, sigmoid",
        "top-k of l + b; w = sigmoid(l) [/ sum]",
        "the bias is added before the sigmoid, where the others add it after, and does not weigh",
        _kolibri,
    ),
    "sigmoid": Convention(
        "sigmoid, no bias",
        "s = sigmoid(l); top-k of s; w = s [/ sum]",
        "nothing is added to the sum before it divides: all sigmoids underflowing is 0 / 0",
        _sigmoid,
    ),
    "inkling": Convention(
        "routed and shared experts weighed together",
        "s = sigmoid(l) of routed and shared; top-k of s + b among the routed; "
        "w = scale g s / (sum over chosen and shared), g learned",
        "shared experts have rows in the router, and weights; the bias has none for them",
        _inkling,
    ),
    "llama4": Convention(
        "sigmoid, on the experts' input",
        "top-k of l; y = sum of E(sigmoid(l) x)",
        "a weight scales what the expert reads: E(w x) is not w E(x)",
        _llama4,
    ),
    "gemma": Convention(
        "normalized input, factors on experts",
        "l = W (x / rms(x) g / sqrt(D)); p = softmax(l); top-k of p; w_e = f_e p_e / sum",
        "the router reads the residual stream, the experts a norm of it, beside a dense MLP: the "
        "layer runs both itself; factors come after the division",
        _gemma,
    ),
    "named_score": Convention(
        "a score by name, selection bias",
        "s = scoring_func(l), sqrt(softplus(l)) or sigmoid(l); top-k of s + b; "
        "w = scale s / (sum + 1e-20)",
        "a root of softplus is 0.83 at l = 0 and has no upper bound; DeepSeek-V4's first layers "
        "choose by a table of token ids, without a bias, and weigh by the same scores",
        _named_score,
    ),
    "longcat": Convention(
        "softmax, selection bias, identity experts",
        "p = softmax(l) over E + I; top-k of p + b; w = scale p; an identity expert adds w x",
        "not normalized: an identity expert adds scale p x, which may be more than x; router_bias "
        "makes a bias that nothing reads",
        _longcat,
    ),
    "dbrx": Convention(
        "softmax, divided by a p-norm",
        "p = softmax(l); top-k of p; w = p [/ (sum of the chosen p^n)^(1/n)]",
        "n is moe_normalize_expert_weights, 1 by default, and null for no division; in training "
        "jitter is put on what experts read too, as it is done in place",
        _dbrx,
    ),
    "switch": Convention(
        "softmax, top-1, capacity of each sequence",
        "p = softmax(l); best p; w = p; an expert takes the first expert_capacity tokens of a "
        "sequence",
        "places are counted in each sequence by itself, padding included, and not over the batch; "
        "dropped tokens get zero",
        _switch,
    ),
    "zaya": Convention(
        "state over layers, softmax, selection bias, skip expert",
        "r = W0 x + b0 + s r of the layer before; l = W3 gelu(W2 gelu(W1 norm(r))); "
        "p = softmax(l) over E + 1; best p + b; w = p, 0 for the last",
        "r is handed on before its norm; the first layer has no s; the last slot skips the layer",
        _zaya,
    ),
    "mixer": Convention(
        "sparse mixer",
        "best logit l1 and, without it, l2; w = softmax over the logits within 2 eps of each",
        "weights do not sum to one; in training experts are sampled, and the gradient is the "
        "estimate of arXiv:2409.12136",
        _mixer,
    ),
}
"""Each convention by its name in the table of blocks."""
