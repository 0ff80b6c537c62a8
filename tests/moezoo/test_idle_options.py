"""Options that would have no effect are refused in one line; those at their defaults are not."""

import json

import pytest

import moezoo
from moezoo import (
    BalanceOptions,
    CapacityOptions,
    DenseFFN,
    ExpertNormOptions,
    FeedForward,
    GLUOptions,
    InputError,
    LogitOptions,
    RouterOptions,
    SparseMoE,
    WeightOptions,
)

D = 16
RAW = {"normalize": False}
BIAS = {"selection_bias": True}
RELU = {"score": "relu", **RAW}
THRESHOLD = {"choice": "threshold", "score": "sigmoid", **RAW}
IDLE = [
    ({"router": {"mixer_eps": 0.2}}, "router.mixer_eps: is sparse_mixer's; set score to"),
    ({"router": {"logits": {"norm_eps": 0.1}}}, "router.logits.norm_eps: there is no norm"),
    ({"router": {"group_score": "max"}}, "router.group_score: there is one group only; set"),
    ({"router": {"closed_groups": "zero"}}, "router.closed_groups: there is one group only; set"),
    (
        {"num_experts": 8, "router": {"num_groups": 4, "top_groups": 4}},
        "router.top_groups: a token takes experts from all 4 groups; lower it",
    ),
    ({"router": {"bias_update_rate": 0.1}}, "router.bias_update_rate: there is no selection bias"),
    ({"router": {"bias_rule": "quantile"}}, "router.bias_rule: there is no selection bias; set"),
    ({"router": {"bias_recentre": True}}, "router.bias_recentre: there is no selection bias; set"),
    (
        {"router": {**BIAS, "bias_rule": "quantile", "bias_update_rate": 0.1}},
        "router.bias_update_rate: quantile has no rate",
    ),
    (
        {"router": {**BIAS, "bias_rule": "quantile", "bias_recentre": True}},
        "router.bias_recentre: quantile has no rate and centres the bias itself; leave it out",
    ),
    ({"router": {"threshold_decay": 0.5}}, "router.threshold_decay: is threshold choice's; set"),
    ({"router": {"expected_experts": 1.0}}, "router.expected_experts: there is no selection bias"),
    (
        {"router": {**BIAS, "expected_experts": 1.0}},
        "router.expected_experts: all experts compute; set num_identity_experts",
    ),
    ({"router": {**RAW, "weights": {"eps": 0.1}}}, "router.weights.eps: says how weights are"),
    ({"balance": {"sparsity": 1e-3}}, "balance.sparsity: is the loss of relu scores; set router"),
    ({"balance": {"sparsity_growth": 2.0}}, "balance.sparsity_growth: is the loss of relu scores"),
    ({"balance": {"sparsity_scope": "model"}}, "balance.sparsity_scope: is the loss of relu sc"),
    ({"balance": {"load": 0.1}}, "balance.load: has no gradient without noise; set router.noise"),
    (
        {"balance": {"load_balancing": 0.0, "count": "first_choice"}},
        "balance.count: says what load_balancing counts, which is not there; leave it out",
    ),
    (
        {"balance": {"load_balancing": 0.0, "z_loss": 0.1, "scope": "local"}},
        "balance.scope: there is no loss that is summed over ranks; leave it out",
    ),
    (
        {"router": RELU, "balance": {"load_balancing": 0.1}},
        "balance.load_balancing: has no meaning in relu scores; set it to 0",
    ),
    (
        {"router": THRESHOLD, "balance": {"importance": 0.1}},
        "balance.importance: has no meaning in threshold choice; set it to 0",
    ),
    (
        {"router": {"choice": "expert", **RAW}, "balance": {"entropy": 0.1}},
        "balance.entropy: has no meaning in expert choice; set it to 0",
    ),
    ({"router": RELU, "balance": {"count": "first_choice"}}, "balance.count: says what load"),
    ({"capacity": {"fixed": 4, "factor": 2.0}}, "capacity.factor: fixed is the capacity"),
    ({"capacity": {"fixed": 4, "minimum": 2}}, "capacity.minimum: fixed is the capacity"),
    (
        {"top_k": 1, "router": RAW, "capacity": {"second_choice_threshold": 0.2}},
        "capacity.second_choice_threshold: there are no second choices; leave it out",
    ),
    ({"expert_norms": {"input_eps": 0.1}}, "expert_norms.input_eps: there is no norm; set input"),
    ({"expert_norms": {"output_eps": 0.1}}, "expert_norms.output_eps: there is no norm; set outp"),
    ({"expert_norms": {"output": True, "output_eps": 0}}, "expert_norms.output_eps: 0 divides by"),
    (
        {
            "expert_norms": {"output": True},
            "router": {**RAW, "weights": {"apply_to": "input"}},
        },
        "expert_norms.output: takes away what router.weights.apply_to: input multiplies by",
    ),
    ({"interleaved": True, "gated": False}, "interleaved: there is no gate to lie in turn with"),
    ({"shared_glu": {"limit": 1.0}}, "shared_glu: there is no shared expert to bound; set num_"),
]


@pytest.mark.parametrize(("arguments", "message"), IDLE)
def test_what_has_no_effect_is_refused_in_one_line(arguments, message):
    config = {"class_path": "moezoo.SparseMoE", "init_args": {"d_model": D, **arguments}}
    with pytest.raises(InputError) as error:
        FeedForward.from_config(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [m for m in moezoo.zoo() if m.layer is SparseMoE])
def test_every_default_that_is_written_out_is_accepted(method):
    """As in old checkpoints, and in configurations that say everything."""
    config = json.loads(json.dumps(method.build(D).config()))
    assert FeedForward.from_config(config).config() == config
    for name in ("interleaved", "expert_norms"):  # what a configuration from before has not
        del config["init_args"][name]
    del config["init_args"]["router"]["expected_experts"]
    del config["init_args"]["balance"]["sparsity_scope"]
    assert FeedForward.from_config(config).config() == method.build(D).config()


@pytest.mark.parametrize("score", ["relu", "softmax"])
def test_a_coefficient_of_zero_asks_for_nothing(score):
    router = RouterOptions(score=score, normalize=False)
    SparseMoE(D, router=router, balance=BalanceOptions(load_balancing=0.0, load=0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router": None}, "router: None is not a mapping of options; write name: value"),
        ({"router": {"logits": 3}}, "router.logits: 3 is not a mapping of options; write name"),
        ({"router": {"logits": {"bais": True}}}, "router.logits: unknown option 'bais'; did you"),
        ({"router": {"wieghts": {}}}, "router: unknown option 'wieghts'; did you mean 'weights'?"),
        ({"balance": 0.1}, "balance: 0.1 is not a mapping of options; write name: value"),
        ({"capacity": 1.25}, "capacity: 1.25 is not a mapping of options; write name: value"),
        ({"glu": None}, "glu: None is not a mapping of options; write name: value"),
        ({"num_shared_experts": 1, "shared_glu": 7.0}, "shared_glu: 7.0 is not a mapping of opt"),
        ({"expert_norms": True}, "expert_norms: True is not a mapping of options; write name"),
    ],
)
def test_groups_of_options_are_named_by_their_place(arguments, message):
    for make in (
        lambda: SparseMoE(D, **arguments),
        lambda: FeedForward.from_config("moezoo.SparseMoE", d_model=D, **arguments),
    ):
        with pytest.raises(InputError) as error:
            make()
        assert str(error.value).startswith(message)


def test_groups_of_options_of_a_router_are_named_by_their_place():
    with pytest.raises(InputError, match=r"router.weights: None is not a mapping of options"):
        RouterOptions(weights=None)
    with pytest.raises(InputError, match=r"router.logits: unknown option 'cap'"):
        RouterOptions(logits={"cap": 1.0})
    with pytest.raises(InputError, match=r"glu: None is not a mapping of options"):
        DenseFFN(D, glu=None)


def test_mappings_are_the_options_they_describe():
    given = SparseMoE(
        D,
        router={"logits": {"bias": True}, "weights": {"eps": 0.1}},
        balance={"z_loss": 0.1},
        capacity={"factor": 2.0},
        glu={"limit": 1.0},
        num_shared_experts=1,
        shared_glu={},
        expert_norms={"output": True},
    )
    same = SparseMoE(
        D,
        router=RouterOptions(logits=LogitOptions(bias=True), weights=WeightOptions(eps=0.1)),
        balance=BalanceOptions(z_loss=0.1),
        capacity=CapacityOptions(factor=2.0),
        glu=GLUOptions(limit=1.0),
        num_shared_experts=1,
        shared_glu=GLUOptions(),
        expert_norms=ExpertNormOptions(output=True),
    )
    assert given.config() == same.config()
    assert given.router == same.router
    assert DenseFFN(D, glu={"limit": 1.0}).glu == GLUOptions(limit=1.0)
