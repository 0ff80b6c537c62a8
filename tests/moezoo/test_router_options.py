"""What every layer promises, promised for each option of a router too."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moezoo
from moezoo import CapacityOptions, LogitOptions, RouterOptions, SparseMoE, WeightOptions

D = 24
ROUTERS = {
    "logits": RouterOptions(
        score="sigmoid", logits=LogitOptions(bias=True, norm=True, scale=0.5, softcap=2.0)
    ),
    "mlp": RouterOptions(selection_bias=True, logits=LogitOptions(mlp=8)),
    "logit chooses": RouterOptions(
        score="sqrt_softplus",
        select_on="logit",
        selection_bias=True,
        num_groups=4,
        top_groups=2,
        closed_groups="zero",
    ),
    "normalization": RouterOptions(
        weights=WeightOptions(eps=0.1, minimum=0.5, p=2.0, learned_scale=True, expert_scale=True)
    ),
    "inputs": RouterOptions(
        score="sigmoid", normalize=False, weights=WeightOptions(apply_to="input")
    ),
    "shared": RouterOptions(score="sigmoid", weights=WeightOptions(with_shared=True)),
    "mixer": RouterOptions(score="sparse_mixer", normalize=False, mixer_eps=0.3),
    "jitter": RouterOptions(jitter=0.1, jitter_experts=True),
}
CAPACITIES = {
    "of sequences": CapacityOptions(factor=0.7, eval_factor=0.7, scope="sequence"),
    "what is left": CapacityOptions(fixed=5, order="score", normalize="after"),
}
NAMES = [*ROUTERS, *CAPACITIES]


def make(name: str) -> SparseMoE:
    torch.manual_seed(0)
    router = ROUTERS.get(name, RouterOptions())
    return SparseMoE(
        D,
        num_experts=8,
        d_expert=16,
        num_shared_experts=2,
        router=router,
        capacity=CAPACITIES.get(name),
    )


def hidden_states() -> torch.Tensor:
    return torch.randn(3, 11, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_configuration_survives_json_and_names_every_tensor(name):
    layer = make(name)
    config = json.loads(json.dumps(layer.config()))
    other = moezoo.FeedForward.from_config(config)
    other.load_state_dict(layer.state_dict())
    hidden = hidden_states()
    assert torch.equal(other.eval()(hidden).hidden, layer.eval()(hidden).hidden)
    assert other.router == layer.router


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_what_torch_counts(name):
    layer, hidden = make(name).eval(), hidden_states()
    with FlopCounterMode(display=False) as counter:
        output = layer(hidden)
    cost = layer.cost()
    dropped = int(output.stats["dropped"]) * layer.experts.flops_per_assignment()
    assert counter.get_total_flops() == 33 * cost.flops_per_token - dropped
    assert cost.total_parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_initialization_covers_every_tensor_and_meta_ones_can_follow(name):
    with torch.device("meta"):
        layer = make(name)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.fill_(math.nan)
    layer.reset_parameters(num_layers=4)
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    grouped = [p for group in layer.parameter_groups() for p in group.parameters]
    assert {id(p) for p in grouped} == {id(p) for p in layer.parameters()}
    decayed = {id(p) for g in layer.parameter_groups() if g.weight_decay for p in g.parameters}
    vectors = [n for n, p in layer.named_parameters() if p.ndim < 2 and id(p) in decayed]
    assert not vectors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_without_a_graph_break(name, training):
    layer, hidden = make(name).train(training), hidden_states()
    torch.manual_seed(2)
    expected = layer(hidden).hidden
    torch._dynamo.reset()
    torch.manual_seed(2)
    found = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")(hidden).hidden
    assert found.isfinite().all()
    if name != "mixer" or not training:  # compiled code draws other exponentials
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_router_is_fp32_and_padding_is_zero(name):
    layer, hidden = make(name).eval(), hidden_states()
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 8:] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing, output = layer.route(hidden, mask=mask), layer(hidden, mask=mask).hidden
    plain = layer.route(hidden, mask=mask)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.indices, plain.indices)
    assert torch.equal(routing.weights, plain.weights)
    assert output.dtype == torch.bfloat16
    assert (output[:, 8:] == 0).all()
    reference = layer(hidden, mask=mask).hidden
    torch.testing.assert_close(output.float(), reference, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_model_routes_as_its_rounded_weights_do_in_fp32(name):
    layer, hidden = make(name).bfloat16().eval(), hidden_states().bfloat16()
    wide = make(name).eval()
    wide.load_state_dict({key: tensor.float() for key, tensor in layer.state_dict().items()})
    found, expected = layer.route(hidden), wide.route(hidden.float())
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-7)
    layer(hidden).hidden.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in layer.parameters() if p.grad is not None)
