"""CMoE's layer: a carved block's function at first, and what moves when it is fine-tuned."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from moezoo import CarvedMoE, InputError
from moezoo.convert import CarveOptions, LayerPlan, carve_block, carved_layer

D, WIDTH = 16, 96


def block(gated: bool, biases: bool, tokens: int = 200):
    """Draw inputs and a dense block in fp64."""
    x = torch.randn(tokens, D, dtype=torch.float64) + 0.5
    gate, up = torch.randn(2, WIDTH, D, dtype=torch.float64)
    down = torch.randn(D, WIDTH, dtype=torch.float64)
    bias_in = torch.randn(WIDTH, dtype=torch.float64) if biases and not gated else None
    bias_out = torch.randn(D, dtype=torch.float64) if biases else None
    return x, gate if gated else None, up, down, bias_in, bias_out


def carved(gated=True, biases=False, sizes=(2, 2, 8), activation="silu", **options):
    x, gate, up, down, bias_in, bias_out = block(gated, biases)
    act = getattr(F, activation)
    chosen = CarveOptions(*sizes, **options)
    plan = carve_block(x, gate, up, down, chosen, act, bias_in, bias_out).plan
    layer = carved_layer(plan, gate, up, down, activation, bias_in, bias_out)
    return layer, plan, x, plan.run(x, gate, up, down, act, bias_in, bias_out)


VARIANTS = [
    {"router": router, "refit": refit, "gated": gated, "biases": biases, "activation": activation}
    for router, refit, (gated, biases, activation) in itertools.product(
        ("ridge", "ridge_shared", "cmoe", "gate_mean"),
        (False, True),
        (
            (True, False, "silu"),
            (True, True, "silu"),
            (False, True, "gelu"),
            (False, False, "relu"),
        ),
    )
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("sizes", [(2, 2, 8), (0, 3, 8), (3, 5, 8)])
def test_begins_as_the_plan(variant, sizes):
    if variant["router"] == "ridge_shared" and not sizes[0]:
        with pytest.raises(InputError, match="router: ridge_shared reads shared neurons"):
            carved(sizes=sizes, split="random", **variant)
        return
    layer, _, x, expected = carved(sizes=sizes, split="random", **variant)
    assert not layer.u.any()
    for call in (layer, layer.reference, layer.train()):
        torch.testing.assert_close(call(x).hidden, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"router": "linear"},
        {"router": "shared"},
        {"router": "shared", "gated": False, "bias": True, "activation": "gelu"},
        {"gated": False, "bias": True, "output_bias": True, "activation": "relu"},
        {"output_bias": True, "num_shared_experts": 0, "signed": True},
        {"top_k": 5, "router": "linear", "gated": False, "activation": "gelu"},
    ],
)
def test_variants_equal_their_reference_with_all_gradients(arguments):
    layer = CarvedMoE(D, d_expert=12, **arguments).double()
    for parameter in (layer.u, layer.b_out):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    mask = torch.rand(3, 21) < 0.8
    found = []
    for call in (layer, layer.reference):
        layer.zero_grad()
        hidden = torch.randn(3, 21, D, generator=torch.Generator().manual_seed(1)).double()
        hidden.requires_grad_()
        output = call(hidden, mask=mask).hidden
        (output * torch.arange(D)).sum().backward()
        assert not output[~mask].any()
        found.append([output, hidden.grad, *(p.grad.clone() for p in layer.parameters())])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    tokens = sum(p.numel() for p in layer.parameters())
    assert layer.cost().total_parameters == tokens


def test_equals_the_papers_formula_token_by_token():
    layer = CarvedMoE(D, d_expert=8).double().eval()
    torch.nn.init.normal_(layer.u)
    layer.gate.selection_bias += torch.tensor([0.3, -0.2, 0.0, 0.1, 0.0])
    x = torch.randn(40, D, dtype=torch.float64)
    gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
    for token, y in zip(x, layer(x).hidden, strict=True):
        s = (F.silu(layer.gate.weight @ token) * (layer.gate.up_weight @ token)).abs()
        p = s.softmax(dim=0)
        chosen = sorted(range(5), key=lambda e: -(p[e] + layer.gate.selection_bias[e]))[:3]
        shared = layer.shared_expert
        expected = shared.down_proj.weight @ (
            F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
        )
        for e in chosen:
            inner = F.silu(gate[e] @ token) * (up[e] @ token)
            expected = expected + (1 + p[e] * layer.u[e]) * (layer.experts.down_proj[e] @ inner)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)


def test_ties_and_saturated_scores_are_decided_as_in_the_plan():
    """A softmax of large scores underflows, and ReLU neurons are often zero together."""
    layer, plan, x, _ = carved(router="cmoe", profile="raw", gated=False, activation="relu")
    with torch.no_grad():
        layer.gate.weight *= 300.0
    logits = layer.gate._logits(x).float()
    assert ((logits == 0).sum(dim=1) >= 5).any()  # fewer alive than are chosen
    assert ((logits.softmax(dim=1) == 0).sum(dim=1) > (logits == 0).sum(dim=1)).any()
    chosen = torch.zeros(len(x), 6).scatter_(1, layer.float().route(x.float()).indices, 1.0)
    torch.testing.assert_close(chosen, plan.weights(x.float(), F.relu))


def test_u_trains_from_the_first_step_and_the_router_from_the_second():
    layer, _, x, before = carved(router="cmoe")
    target = before + 0.3 * (layer.shared_expert(x).hidden - before).detach()
    layer.u_lr_multiplier = 2e4  # another router would choose others, which no target foresees
    layer.experts.requires_grad_(False)
    layer.shared_expert.requires_grad_(False)
    optimizer = torch.optim.Adam(
        [{"params": g.parameters, "lr": 1e-6 * g.lr_multiplier} for g in layer.parameter_groups()]
    )
    router = layer.gate.weight.detach().clone()
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        output = layer(x)
        loss = (output.hidden - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            assert layer.u.detach().abs().min() > 0
            assert torch.equal(layer.gate.weight, router)  # s' only counts once u is not zero
    assert not torch.equal(layer.gate.weight, router)
    assert losses[-1] < losses[0]


def test_the_optimizer_gets_u_and_router_once_at_their_own_rates_and_undecayed():
    layer = CarvedMoE(D, u_lr_multiplier=17.0, router_lr_multiplier=0.5)
    groups = {g.name: g for g in layer.parameter_groups()}
    assert [id(p) for p in groups["u"].parameters] == [id(layer.u)]
    assert groups["u"].lr_multiplier == 17.0
    assert not groups["u"].weight_decay
    assert {id(p) for p in groups["router"].parameters} == {id(p) for p in layer.gate.parameters()}
    assert groups["router"].lr_multiplier == 0.5
    listed = [id(p) for group in groups.values() for p in group.parameters]
    assert sorted(listed) == sorted(id(p) for p in layer.parameters())
    layer.u.requires_grad_(False)
    assert "u" not in {g.name for g in layer.parameter_groups()}


def test_b_moves_against_the_load():
    layer = CarvedMoE(D, num_experts=4, top_k=1, bias_update_rate=0.01)
    layer.observe({"expert_counts": torch.tensor([9, 3, 5, 3])})
    layer.observe({"expert_counts": torch.tensor([1, 2, 5, 4])})  # 10, 5, 10, 7: 8 on average
    layer.step()
    expected = torch.tensor([-0.01, 0.01, -0.01, 0.01])
    torch.testing.assert_close(layer.gate.selection_bias, expected)
    layer.step()  # nothing was observed since
    torch.testing.assert_close(layer.gate.selection_bias, expected)


def test_b_balances_the_load_of_a_carved_block():
    layer, _, x, _ = carved(router="ridge", sizes=(2, 1, 8))
    before = layer(x).stats["expert_counts"]
    layer.gate.options = layer.gate.options.__class__(
        normalize=False, selection_bias=True, bias_update_rate=0.004
    )
    for _ in range(150):
        layer.observe(layer(x).stats)
        layer.step()
    after = layer(x).stats["expert_counts"]
    assert after.double().std() < 0.5 * before.double().std()


def test_u_and_b_are_saved_and_reload_reproduces(tmp_path):
    from safetensors.torch import load_file, save_file

    layer, _, x, _ = carved(router="cmoe")
    torch.nn.init.normal_(layer.u)
    layer.observe(layer(x).stats)
    layer.step()
    state = layer.state_dict()
    assert {"u", "gate.selection_bias", "gate.weight", "gate.up_weight"} <= state.keys()
    save_file(state, tmp_path / "layer.safetensors")
    again = CarvedMoE.from_config(layer.config()).double()
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert again.gate.selection_bias.any()
    assert torch.equal(again(x).hidden, layer(x).hidden)


def test_b_stays_fp32_where_all_else_is_bf16():
    layer = CarvedMoE(D).to(torch.bfloat16)
    assert layer.u.dtype == torch.bfloat16
    assert layer.gate.selection_bias.dtype == torch.float32


def test_default_parts_are_together_as_wide_as_the_dense_block():
    layer = CarvedMoE(192, num_experts=5, num_shared_experts=3)
    assert (layer.d_expert, layer.shared_expert.d_ff) == (64, 192)


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"top_k: 6 is more than num_experts=5"):
        CarvedMoE(D, top_k=6)
    with pytest.raises(InputError, match=r"router: 'glu' is not known"):
        CarvedMoE(D, router="glu")
    with pytest.raises(InputError, match="router: shared reads neurons of the shared part"):
        CarvedMoE(D, router="shared", num_shared_experts=0)
    plan = carved()[1]
    weights = torch.randn(WIDTH, D), torch.randn(WIDTH, D), torch.randn(D, WIDTH)
    upcycled = LayerPlan(plan.experts, 2, plan.router)
    with pytest.raises(InputError, match=r"plan: CarvedMoE holds experts that count fully"):
        carved_layer(upcycled, *weights)
