"""SparseMoE against transformers' routers, one per convention: outputs and every gradient.

Each of theirs gets skewed logits and biases that are not zero: with zeros most faults do not show.
Where their experts compute what ours do not, their router stands before the experts of Laguna,
which are gated linear units as ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moezoo import (
    BalanceOptions,
    CapacityOptions,
    LogitOptions,
    RouterOptions,
    SparseMoE,
    WeightOptions,
)

pytest.importorskip("transformers")

D, F, E, K = 32, 48, 8, 3
Tensors = Mapping[str, Tensor]


def their(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def config(**fields: Any) -> SimpleNamespace:
    """Return what their classes read of a configuration."""
    common = {
        "hidden_size": D,
        "moe_intermediate_size": F,
        "intermediate_size": F,
        "shared_expert_intermediate_size": F,
        "num_experts": E,
        "num_local_experts": E,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "hidden_act": "silu",
        "mlp_bias": False,
        "_experts_implementation": "eager",
    }
    return SimpleNamespace(**{**common, **fields})


class Their(nn.Module):
    """A router before experts that it does not come with."""

    def __init__(self, gate: nn.Module, pick: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.gate, self.pick = gate, pick
        self.experts = their("laguna", "LagunaExperts")(config())

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, D)
        weights, indices = self.pick(self.gate(flat))
        return self.experts(flat, indices, weights).reshape(hidden.shape)


def last_two(result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return result[-2], result[-1]


@dataclass
class Case:
    """One convention.

    ``names`` are parts of their names and what ours have instead; ``exact`` is false where theirs
    rounds to fp32 whatever the dtype; ``bias_mean`` is added to the biases that choose; ``fp32`` is
    how far off rounding may be there.
    """

    build: Callable[[], nn.Module]
    router: RouterOptions
    arguments: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    exact: bool = True
    convert: Callable[[dict[str, Tensor]], Tensors] = lambda tensors: tensors
    bias_mean: float = 0.0
    training: bool = False
    fp32: float = 1e-6
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, hidden: module(hidden)


SHARED = {"shared_experts.": "shared_expert."}
BIAS = {"e_score_correction_bias": "selection_bias"}
DBRX = config(
    ffn_config=config(
        ffn_hidden_size=F,
        ffn_act_fn={"name": "silu"},
        moe_num_experts=E,
        moe_top_k=K,
        moe_jitter_eps=None,
        moe_normalize_expert_weights=2,
    )
)


def ernie_tensors(tensors: dict[str, Tensor]) -> Tensors:
    return {n: t.flatten() if n.endswith("selection_bias") else t for n, t in tensors.items()}


def dbrx_tensors(tensors: dict[str, Tensor]) -> Tensors:
    w1, v1, w2 = (
        tensors.pop(f"experts.mlp.{name}").unflatten(0, (E, F)) for name in ("w1", "v1", "w2")
    )
    stacks = {"gate_up_proj": torch.cat([w1, v1], dim=1), "down_proj": w2.mT}
    return tensors | {f"experts.{name}": stack for name, stack in stacks.items()}


def inkling_tensors(tensors: dict[str, Tensor]) -> Tensors:
    rows = tensors.pop("gate.weight")
    tensors |= {"gate.weight": rows[:E], "gate.shared_weight": rows[E:]}
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = tensors.pop(f"shared_expert.{name}")
        matrix = stack.mT.flatten(0, 1).mT if name == "down_proj" else stack.flatten(0, 1)
        tensors[f"shared_expert.{name}.weight"] = matrix
    return tensors


def llama4_tensors(tensors: dict[str, Tensor]) -> Tensors:
    return {n: t.mT if n.startswith("experts.") else t for n, t in tensors.items()}


def switch_tensors(tensors: dict[str, Tensor]) -> Tensors:
    for ours, theirs in (("gate_up_proj", "wi"), ("down_proj", "wo")):
        rows = [tensors.pop(f"experts.expert_{e}.{theirs}.weight") for e in range(E)]
        tensors[f"experts.{ours}"] = torch.stack(rows)
    return tensors


def nllb_router(**fields: Any) -> nn.Module:
    common = {
        "expert_capacity": 64,
        "router_bias": False,
        "router_ignore_padding_tokens": False,
        "router_dtype": "float32",
        "second_expert_policy": "all",
        "batch_prioritized_routing": True,
        "moe_eval_capacity_token_fraction": 0.2,
    }
    return their("nllb_moe", "NllbMoeTop2Router")(config(**{**common, **fields}))


def dense_weights(result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return weights and indices from a weight for every expert, most of them zero."""
    _, weights_TE, _ = result
    best = weights_TE.topk(2, dim=-1)
    return best.values, best.indices


GROUPED = config(
    n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_experts=1
)
GROUPED_OPTIONS = RouterOptions(
    score="sigmoid",
    scale=2.5,
    num_groups=4,
    top_groups=2,
    closed_groups="zero",
    selection_bias=True,
)

CASES = {
    "gpt_oss": Case(
        lambda: Their(their("gpt_oss", "GptOssTopKRouter")(config()), last_two),
        RouterOptions(logits=LogitOptions(bias=True)),
    ),
    "openai_privacy_filter": Case(
        lambda: Their(
            their("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter")(config()), last_two
        ),
        RouterOptions(logits=LogitOptions(bias=True), scale=1 / K),
        exact=False,
    ),
    "laguna": Case(
        lambda: their("laguna", "LagunaSparseMoeBlock")(
            config(moe_router_logit_softcapping=0.7, moe_routed_scaling_factor=2.5)
        ),
        RouterOptions(
            score="sigmoid", selection_bias=True, scale=2.5, logits=LogitOptions(softcap=0.7)
        ),
        {"num_shared_experts": 1},
        SHARED | BIAS,
        exact=False,
    ),
    "muse_spark": Case(
        lambda: Their(
            their("muse_spark", "MuseSparkTopkRouter")(
                config(output_multiplier=0.1768, routed_scaling_factor=2.0)
            ),
            last_two,
        ),
        RouterOptions(
            score="sigmoid", selection_bias=True, scale=2.0, logits=LogitOptions(scale=0.1768)
        ),
        names=BIAS,
        exact=False,
    ),
    "deepseek_v4": Case(
        lambda: Their(
            their("deepseek_v4", "DeepseekV4TopKRouter")(
                config(scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)
            ),
            last_two,
        ),
        RouterOptions(score="sqrt_softplus", selection_bias=True, scale=1.5),
        names=BIAS,
    ),
    "kolibri1": Case(
        lambda: their("kolibri1", "Kolibri1SparseMoeBlock")(config(norm_topk_prob=True)),
        RouterOptions(score="sigmoid", select_on="logit", selection_bias=True),
        {"num_shared_experts": 1},
        SHARED | BIAS,
        exact=False,
    ),
    "cohere2_moe": Case(
        lambda: Their(
            their("cohere2_moe", "Cohere2MoeTopKRouter")(
                config(expert_selection_fn="sigmoid", norm_topk_prob=False)
            ),
            last_two,
        ),
        RouterOptions(score="sigmoid", select_on="logit", normalize=False),
    ),
    "axk2": Case(
        lambda: their("axk2", "AXK2MoE")(GROUPED),
        GROUPED_OPTIONS,
        {"num_shared_experts": 1},
        SHARED | BIAS,
        exact=False,
        bias_mean=-0.8,
    ),
    "deepseek_v3": Case(
        lambda: their("deepseek_v3", "DeepseekV3MoE")(GROUPED),
        replace(GROUPED_OPTIONS, closed_groups="exclude"),
        {"num_shared_experts": 1},
        SHARED | BIAS,
        exact=False,
        bias_mean=-0.8,
    ),
    "mistral4": Case(
        lambda: their("mistral4", "Mistral4MoE")(GROUPED),
        replace(GROUPED_OPTIONS, score="softmax", selection_bias=False, group_score="sum_of_two"),
        {"num_shared_experts": 1},
        SHARED,
    ),
    "ernie4_5_moe": Case(
        lambda: their("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock")(
            config(moe_num_shared_experts=1, moe_norm_min=0.6, use_bias=False)
        ),
        RouterOptions(selection_bias=True, weights=WeightOptions(minimum=0.6)),
        {"num_shared_experts": 1},
        SHARED | {"moe_statics.": ""} | BIAS,
        exact=False,
        convert=ernie_tensors,
    ),
    "lfm2_moe": Case(
        lambda: their("lfm2_moe", "Lfm2MoeSparseMoeBlock")(
            config(use_expert_bias=True, norm_topk_prob=True, routed_scaling_factor=1.5)
        ),
        RouterOptions(
            score="sigmoid", selection_bias=True, scale=1.5, weights=WeightOptions(eps=1e-6)
        ),
        names={"expert_bias": "gate.selection_bias"},
    ),
    "dbrx": Case(
        lambda: their("dbrx", "DbrxFFN")(DBRX),
        RouterOptions(weights=WeightOptions(p=2.0)),
        names={"router.layer.": "gate."},
        convert=dbrx_tensors,
    ),
    "gemma4": Case(
        lambda: Their(
            their("gemma4", "Gemma4TextRouter")(config(rms_norm_eps=0.3, top_k_experts=K)),
            last_two,
        ),
        RouterOptions(
            logits=LogitOptions(norm=True, norm_eps=0.3), weights=WeightOptions(expert_scale=True)
        ),
        names={
            "gate.proj.": "gate.",
            "gate.scale": "gate.input_scale",
            "gate.per_expert_scale": "gate.expert_scale",
        },
        exact=False,
    ),
    "inkling": Case(
        lambda: their("inkling", "InklingMoE")(config(n_shared_experts=2, route_scale=2.5)),
        RouterOptions(
            score="sigmoid",
            selection_bias=True,
            scale=2.5,
            weights=WeightOptions(with_shared=True, learned_scale=True),
        ),
        {"num_shared_experts": 2},
        SHARED | BIAS | {"global_scale": "learned_scale"},
        exact=False,
        convert=inkling_tensors,
    ),
    "llama4": Case(
        lambda: their("llama4", "Llama4TextMoe")(config()),
        RouterOptions(
            score="sigmoid",
            select_on="logit",
            normalize=False,
            weights=WeightOptions(apply_to="input"),
        ),
        {"num_shared_experts": 1},
        {"router.": "gate."},
        exact=False,
        convert=llama4_tensors,
        call=lambda module, hidden: module(hidden)[0].reshape(hidden.shape),
    ),
    "switch_transformers": Case(
        lambda: their("switch_transformers", "SwitchTransformersSparseMLP")(
            config(
                d_model=D,
                d_ff=F,
                dropout_rate=0.0,
                dense_act_fn="relu",
                expert_capacity=6,
                router_bias=True,
                router_jitter_noise=0.0,
                router_ignore_padding_tokens=False,
                router_dtype="float32",
            )
        ),
        RouterOptions(normalize=False, logits=LogitOptions(bias=True)),
        {
            "top_k": 1,
            "gated": False,
            "activation": "relu",
            "capacity": CapacityOptions(fixed=6, scope="sequence"),
        },
        {"router.classifier.": "gate."},
        exact=False,
        convert=switch_tensors,
    ),
    # Their experts read the router's mask as indices, and only experts 0 and 1 run.
    "nllb_moe": Case(
        lambda: Their(nllb_router(normalize_router_prob_before_dropping=False), dense_weights),
        RouterOptions(),
        {
            "top_k": 2,
            "capacity": CapacityOptions(eval_factor=0.8, order="score", normalize="after"),
        },
        {"gate.classifier.": "gate."},
        exact=False,
    ),
    "nllb_moe (before dropping)": Case(
        lambda: Their(
            nllb_router(
                normalize_router_prob_before_dropping=True, batch_prioritized_routing=False
            ),
            dense_weights,
        ),
        RouterOptions(),
        {"top_k": 2, "capacity": CapacityOptions(eval_factor=0.8)},
        {"gate.classifier.": "gate."},
        exact=False,
    ),
    "nllb_moe (second at random)": Case(
        lambda: Their(
            nllb_router(
                normalize_router_prob_before_dropping=False,
                second_expert_policy="random",
                expert_capacity=20,
            ),
            dense_weights,
        ),
        RouterOptions(),
        {
            "top_k": 2,
            "capacity": CapacityOptions(
                fixed=20, order="score", normalize="after", second_choice_threshold=0.5
            ),
        },
        {"gate.classifier.": "gate."},
        exact=False,
        training=True,
        fp32=2e-6,  # theirs is up to 1.1e-6 away from fp64, ours 5e-7
    ),
    "phimoe": Case(
        lambda: their("phimoe", "PhimoeSparseMoeBlock")(
            config(router_jitter_noise=0.3, input_jitter_noise=0.0, num_experts_per_tok=2)
        ),
        RouterOptions(score="sparse_mixer", normalize=False, mixer_eps=0.3),
        {"top_k": 2},
        {"router.": "gate."},
    ),
    "phimoe (training)": Case(
        lambda: their("phimoe", "PhimoeSparseMoeBlock")(
            config(router_jitter_noise=0.3, input_jitter_noise=0.0, num_experts_per_tok=2)
        ),
        RouterOptions(score="sparse_mixer", normalize=False, mixer_eps=0.3),
        {"top_k": 2},
        {"router.": "gate."},
        exact=False,
        training=True,
    ),
    "mixtral (training)": Case(
        lambda: their("mixtral", "MixtralSparseMoeBlock")(config(router_jitter_noise=0.2)),
        RouterOptions(jitter=0.2, jitter_experts=True),
        exact=False,
        training=True,
        call=lambda module, hidden: module(1.0 * hidden),  # it is changed in place
    ),
    # The first layer, which has no state of another; adoption is tried out with one.
    "zaya": Case(
        lambda: their("zaya", "ZayaSparseMoeBlock")(
            config(rms_norm_eps=0.2, router_hidden_size=16, num_experts_per_tok=1), layer_idx=0
        ),
        RouterOptions(
            normalize=False, selection_bias=True, logits=LogitOptions(mlp=16, norm_eps=0.2)
        ),
        {"num_skip_experts": 1, "top_k": 1},
        {
            "gate.down_proj.": "gate.mlp.down.",
            "gate.router_mlp.norm.weight": "gate.mlp.norm_scale",
            "gate.router_mlp.out_proj.": "gate.",
            "gate.router_mlp.": "gate.mlp.",
            "balancing_biases": "selection_bias",
        },
        exact=False,
        fp32=2e-6,  # three layers more
        call=lambda module, hidden: module(hidden)[0],
    ),
    "flint": Case(
        lambda: their("flint", "FlintSparseMoeBlock")(config(norm_topk_prob=True)),
        RouterOptions(score="sigmoid"),
        {"num_shared_experts": 1},
        exact=False,
    ),
}


def pair(case: Case) -> tuple[SparseMoE, nn.Module]:
    theirs = case.build().eval()
    torch.manual_seed(0)
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        nn.init.normal_(tensor, std=D**-0.5 if tensor.ndim > 1 else 0.3)
        if tensor.ndim == 2 and len(tensor) >= E and len(tensor) < F:
            tensor.data[:, 0] += torch.linspace(1, -1, len(tensor))
        if name.endswith("balancing_biases"):
            tensor.data *= 0.2
        if "correction_bias" in name:
            tensor.data += case.bias_mean
        if name.endswith("scale"):
            tensor.data += 1.0
    ours = SparseMoE(
        D,
        **{"num_experts": E, "top_k": K, "d_expert": F, **case.arguments},
        router=case.router,
        balance=BalanceOptions(load_balancing=0.0),
    ).eval()
    ours.load_state_dict(converted(case, theirs.state_dict()))
    return ours, theirs


def converted(case: Case, tensors: Tensors) -> Tensors:
    """Return their weights, or the gradients of these, as ours name and shape them."""
    renamed = {}
    for name, tensor in tensors.items():
        for part, other in case.names.items():
            name = name.replace(part, other)
        renamed[name] = tensor
    return case.convert(renamed)


def outcome(case: Case, module: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    hidden = hidden.clone().requires_grad_()
    ours = isinstance(module, SparseMoE)
    torch.manual_seed(3)
    output = module(hidden).hidden if ours else case.call(module, hidden)
    (output * direction.to(hidden.dtype)).sum().backward()
    assert hidden.grad is not None
    found = {"hidden": output.detach(), "d hidden": hidden.grad}
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    return found | dict(gradients if ours else converted(case, gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_agree(name, dtype, monkeypatch):
    case = CASES[name]
    ours, theirs = (module.to(dtype).train(case.training) for module in pair(case))
    if name.startswith("phimoe"):  # it draws some numbers twice, and takes the second ones
        monkeypatch.setattr(Tensor, "uniform_", lambda tensor: tensor)
    if name.endswith("at random)"):  # it draws for second choices alone
        drawn = torch.rand(3 * 43, 1, generator=torch.Generator().manual_seed(4))
        monkeypatch.setattr(
            torch, "rand_like", lambda x: drawn.expand(-1, x[0].numel()).reshape(x.shape)
        )
    hidden = torch.randn(3, 43, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    hidden[..., 0] = 1.0 + 0.1 * hidden[..., 0]
    found, expected = (outcome(case, module, hidden) for module in (ours, theirs))
    assert found.keys() == expected.keys()
    tolerance = 1e-12 if case.exact and dtype == torch.float64 else case.fp32
    for key, right in expected.items():
        scale = right.abs().max()
        assert scale > 0, key
        error = (found[key] - right).abs().max() / scale
        assert error <= tolerance, f"{key}: off by {error:.1e} of its largest"
    stats = ours(hidden).stats
    assert stats["expert_counts"].max() > 2 * stats["expert_counts"].min()
    assert bool(stats["dropped"] > 0) == ("capacity" in case.arguments)


def test_experts_of_closed_groups_are_chosen_where_zero_wins():
    case = CASES["axk2"]
    ours, theirs = pair(case)
    hidden = torch.randn(1, 257, D)
    routing = ours.route(hidden)
    _, weights, indices = theirs.gate(hidden)
    order, their_order = routing.indices.argsort(-1), indices.argsort(-1)
    assert torch.equal(routing.indices.gather(1, order), indices.gather(1, their_order))
    assert torch.equal(routing.weights.gather(1, order), weights.gather(1, their_order))
    groups = torch.nn.functional.one_hot(indices // 2, 4).amax(1).sum(-1)
    assert (groups > case.router.top_groups).any()
