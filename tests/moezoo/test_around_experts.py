"""What SparseMoE has around its experts: identity experts, a latent width, bounded gates."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moezoo
import moezoo_kernels
from moezoo import BalanceOptions, ExpertNormOptions, GLUOptions, RouterOptions, SparseMoE
from moezoo.experts import MLPExperts

D = 24
RAW = RouterOptions(normalize=False, scale=6.0, selection_bias=True, bias_update_rate=0.1)


def moe(**options) -> SparseMoE:
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "top_k": 4, "d_expert": 5, "balance": BalanceOptions(0.0)}
    layer = SparseMoE(D, **(sizes | options)).double()
    with torch.no_grad():
        layer.gate.weight.normal_()
        if layer.router.selection_bias:
            layer.gate.selection_bias.normal_(std=0.05)
        for name, parameter in layer.named_parameters():
            if name.endswith(("norm.weight", "_bias")):
                parameter.normal_(std=0.3)
    return layer


VARIANTS = {
    "identity": {"num_identity_experts": 3, "router": RAW},
    "latent": {"d_latent": 7, "num_shared_experts": 1, "shared_bias": True},
    "both": {"num_identity_experts": 3, "d_latent": 30, "router": RAW},
    "norms": {"d_latent": 7, "expert_norms": ExpertNormOptions(input=True, output=True)},
    "norm of outputs": {"gated": False, "expert_norms": ExpertNormOptions(output=True)},
    "rows in turn": {"interleaved": True, "bias": True},
    "bounded": {"glu": GLUOptions(limit=0.3, up_shift=1.0), "num_shared_experts": 1},
}


@pytest.mark.parametrize("backend", [None, "cpu", "grouped_mm", "reference"])
@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("name", VARIANTS)
def test_inference_gives_what_a_call_gives(name, tokens, backend, assert_near):
    layer = moe(**VARIANTS[name]).eval().float()
    hidden = torch.randn(tokens, D)
    wanted = layer.double()(hidden.double()).hidden
    layer.float()
    with torch.no_grad(), moezoo_kernels.use(backend):
        assert_near(layer.infer(hidden), wanted)
        assert_near(layer(hidden).hidden, wanted)


@pytest.fixture
def assert_near():
    def check(found, wanted):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()

    return check


def test_identity_experts_get_no_parameters_and_no_rows(monkeypatch):
    layer = moe(num_identity_experts=3, router=RAW)
    assert layer.experts.gate_up_proj.shape[0] == 6
    assert layer.gate.weight.shape[0] == layer.gate.selection_bias.shape[0] == 9
    seen = []
    forward = MLPExperts.forward

    def spy(self, x, indices, *others, **named):
        seen.append(indices)
        return forward(self, x, indices, *others, **named)

    monkeypatch.setattr(MLPExperts, "forward", spy)
    outcome = layer(torch.randn(63, D, dtype=torch.float64))
    counts = outcome.stats["expert_counts"]
    assert counts.shape == (9,)
    assert counts[6:].sum() > 0
    assert int(seen[0].max()) < 6
    assert int((seen[0] >= 0).sum()) == int(counts[:6].sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_comes_back_as_zeros_whatever_it_holds(name, bad):
    layer = moe(**VARIANTS[name]).eval()
    hidden, mask = torch.randn(3, 21, D, dtype=torch.float64), torch.rand(3, 21) > 0.3
    wanted = layer(hidden, mask=mask).hidden
    hidden[~mask] = bad
    found = layer(hidden, mask=mask).hidden
    assert torch.equal(found[mask], wanted[mask])
    assert not found[~mask].any()  # a NaN is true
    with torch.no_grad():
        assert torch.equal(layer.infer(hidden, mask=mask), found)


def test_a_token_of_identity_experts_alone_is_scaled():
    layer = moe(num_identity_experts=4, router=RAW)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.selection_bias.copy_(torch.arange(10.0))
    hidden = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden).hidden, 6.0 * 4 / 10 * hidden)


def test_the_selection_bias_follows_longcats_rule():
    layer = moe(num_identity_experts=3, router=RAW)
    before = layer.gate.selection_bias.clone()
    counts = torch.tensor([10, 0, 4, 4, 4, 4, 20, 0, 2])
    for part in (counts - 1, torch.ones_like(counts)):  # two micro-batches
        layer.observe({"expert_counts": part})
    layer.step()
    # mu (K_e / (K N) - T_i / (K T)) with K_e = K N / (N + Z): 4 * 6 / 9 of N = 6 experts.
    top_k, experts, tokens = 4, 6, int(counts.sum()) / 4
    expected = top_k * 6 / 9
    moved = 0.1 * (expected / (top_k * experts) - counts[:6] / (top_k * tokens))
    torch.testing.assert_close(layer.gate.selection_bias[:6] - before[:6], moved.float())
    assert torch.equal(layer.gate.selection_bias[6:], before[6:])


def test_how_many_experts_compute_may_be_asked_for():
    layer = moe(num_identity_experts=3, router=replace(RAW, expected_experts=1.5))
    before = layer.gate.selection_bias.clone()
    counts = torch.tensor([10, 0, 4, 4, 4, 4, 20, 0, 2])
    layer.observe({"expert_counts": counts})
    layer.step()
    moved = 0.1 * (1.5 / (4 * 6) - counts[:6] / counts.sum())
    torch.testing.assert_close(layer.gate.selection_bias[:6] - before[:6], moved.float())
    assert torch.equal(layer.gate.selection_bias[6:], before[6:])
    usual, cost = moe(num_identity_experts=3, router=RAW).cost(), layer.cost()
    assert cost.total_parameters == usual.total_parameters
    fewer = -(-8 * 3 * 5 * D // 3) - 3 * 3 * 5 * D // 2  # 8 / 3 experts of 3 * 5 * D, and 3 / 2
    assert usual.active_parameters - cost.active_parameters == fewer
    assert usual.flops_per_token - cost.flops_per_token == 2 * fewer
    options = {"num_experts": 4, "num_identity_experts": 4, "top_k": 4}
    one = RouterOptions(selection_bias=True, expected_experts=1)
    assert SparseMoE(64, router=one, **options).d_expert == 176  # the dense block's width


@pytest.mark.parametrize("expected", [0, 2.5, 4.5, -1.0, float("nan"), "2"])
def test_numbers_of_computing_experts_that_cannot_be_are_refused(expected):
    options = {"num_experts": 4, "num_identity_experts": 1, "top_k": 4}
    router = RouterOptions(selection_bias=True, expected_experts=expected)
    with pytest.raises(moezoo.InputError, match=r"^router.expected_experts: .*(give|number)"):
        SparseMoE(D, router=router, **options)


@pytest.mark.parametrize("expected", [None, 2.0])
def test_the_rule_brings_experts_to_their_share(expected):
    layer = moe(num_identity_experts=3, router=replace(RAW, expected_experts=expected))
    share = 1 / 9 if expected is None else expected / 4 / 6
    with torch.no_grad():
        layer.gate.weight *= D**-0.5
        layer.gate.selection_bias.copy_(torch.linspace(0.1, -0.1, 9))
    hidden = torch.randn(2048, D, dtype=torch.float64)
    shares = []
    for _ in range(300):
        stats = layer(hidden).stats
        shares.append(stats["expert_counts"] / stats["expert_counts"].sum())
        layer.observe(stats)
        layer.step()
    off = [float((found[:6] - share).abs().max()) for found in shares]
    assert off[0] > 0.04
    assert off[-1] < 0.01
    assert abs(float(shares[-1][6:].sum()) - (1 - 6 * share)) < 0.02


@pytest.mark.parametrize("name", ["latent", "both", "norms"])
def test_cost_counts_the_maps(name):
    layer = moe(**VARIANTS[name])
    cost = layer.cost()
    assert cost.total_parameters == sum(p.numel() for p in layer.parameters())
    identity = layer.num_identity_experts
    hidden = torch.randn(9 * 8, D, dtype=torch.float64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counts = layer(hidden).stats["expert_counts"]
    computed = int(counts[:6].sum()) * layer.experts.flops_per_assignment()
    slots = 6 + identity
    even = -(-4 * 6 * layer.experts.flops_per_assignment() // slots)
    assert counter.get_total_flops() - computed == len(hidden) * (cost.flops_per_token - even)


def test_experts_of_a_latent_width_are_as_wide_as_the_dense_block_allows():
    dense = 176  # 8/3 of 64, rounded up to a multiple of 16
    assert SparseMoE(64, d_latent=16).d_expert == 64 // 16 * dense // 2
    assert SparseMoE(64, num_experts=4, num_identity_experts=4, top_k=4).d_expert == 96


@pytest.mark.parametrize("name", VARIANTS)
def test_configurations_are_built_again(name):
    layer = moe(**VARIANTS[name])
    again = moezoo.FeedForward.from_config(layer.config())
    assert again.config() == layer.config()
    assert again.state_dict().keys() == layer.state_dict().keys()
