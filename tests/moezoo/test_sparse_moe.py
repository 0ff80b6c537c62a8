"""Routing methods against their papers: the properties that tell a right router from a near one."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo import (
    BalanceOptions,
    CapacityOptions,
    InputError,
    RouterOptions,
    SparseMoE,
    WeightOptions,
)
from moezoo.analysis.choices import slot_choices
from moezoo.routing import losses
from moezoo.routing.capacity import expert_capacity, within_capacity
from moezoo.routing.sparse_mixer import sparse_mixer
from moezoo.routing.stats import expert_counts, load_entropy, max_violation

D = 16
NO_LOSS = BalanceOptions(load_balancing=0.0)
WITH_SHARED = {
    "num_shared_experts": 2,
    "router": {"score": "sigmoid", "weights": {"with_shared": True}},
}


def moe(**arguments) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(D, **{"num_experts": 8, "balance": NO_LOSS, **arguments}).double()


def tokens(count: int = 64) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "router",
    [
        RouterOptions(),
        RouterOptions(normalize=False),
        RouterOptions(score="sigmoid", selection_bias=True, scale=2.5),
        RouterOptions(choice="expert", normalize=False),
    ],
)
def test_renaming_experts_changes_nothing(router):
    layer = moe(router=router)
    before = layer(tokens()).hidden
    new = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for tensor in [
            *layer.gate.parameters(),
            *layer.gate.buffers(),
            *layer.experts.parameters(),
        ]:
            tensor.copy_(tensor[new].clone())
    torch.testing.assert_close(layer(tokens()).hidden, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_collapsed_router_costs_num_experts_whatever_the_capacity(factor):
    layer = moe(
        top_k=1,
        router=RouterOptions(normalize=False),
        balance=BalanceOptions(load_balancing=1.0),
        capacity=CapacityOptions(factor=factor),
    )
    hidden = tokens().abs()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3] = 50.0
    torch.testing.assert_close(
        layer(hidden).losses["load_balancing"].item(), 8.0, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_even_router_costs_one(top_k):
    counts, p = torch.full((8,), 5), torch.full((8,), 1 / 8)
    assert losses.load_balancing_loss(counts, p) == 1.0
    layer = moe(
        top_k=top_k,
        router=RouterOptions(normalize=False),
        balance=BalanceOptions(load_balancing=0.5),
    )
    with torch.no_grad():
        layer.gate.weight.zero_()
    # Even probabilities cost exactly 1 wherever the ties go.
    torch.testing.assert_close(layer(tokens()).losses["load_balancing"].item(), 0.5)


def test_load_balancing_loss_equals_the_formula():
    layer = moe(top_k=2, balance=BalanceOptions(load_balancing=1.0))
    hidden = tokens()
    probabilities = (hidden @ layer.gate.weight.t()).softmax(-1)
    counts = torch.zeros(8, dtype=torch.float64)
    for row in probabilities:
        for expert in row.topk(2).indices:
            counts[expert] += 1
    expected = 8 * sum(c / (64 * 2) * p for c, p in zip(counts, probabilities.mean(0), strict=True))
    torch.testing.assert_close(layer(hidden).losses["load_balancing"], expected, rtol=1e-12, atol=0)


def test_first_choice_loss_counts_first_choices_only():
    layer = moe(top_k=2, balance=BalanceOptions(load_balancing=1.0, count="first_choice"))
    hidden = tokens()
    probabilities = (hidden @ layer.gate.weight.t()).softmax(-1)
    f = torch.bincount(probabilities.argmax(-1), minlength=8).double() / 64
    expected = 8 * (f * probabilities.mean(0)).sum()
    torch.testing.assert_close(layer(hidden).losses["load_balancing"], expected, rtol=1e-12, atol=0)


def test_z_loss_is_on_logits_before_noise():
    layer = moe(router=RouterOptions(noise=True), balance=BalanceOptions(0.0, z_loss=1e-3))
    with torch.no_grad():
        layer.gate.weight.normal_()
        layer.gate.noise_weight.normal_()
    logits = tokens() @ layer.gate.weight.t()
    expected = 1e-3 * logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(layer(tokens()).losses["router_z"], expected, rtol=1e-12, atol=0)


def test_losses_of_micro_batches_add_up_to_the_global_batch():
    """The counts of earlier micro-batches stay in f: the last loss is over the whole step."""
    layer = moe(balance=BalanceOptions(load_balancing=1.0))
    first, second = tokens(96).split([32, 64])
    output = layer(first)
    layer.observe(output.stats)
    both = expert_counts(layer.route(tokens(96)).indices, 8).double() / 192
    p = (second @ layer.gate.weight.t()).softmax(-1).mean(0)
    torch.testing.assert_close(
        layer(second).losses["load_balancing"], 8 * (both * p).sum(), rtol=1e-12, atol=0
    )
    layer.step()
    alone = expert_counts(layer.route(second).indices, 8).double() / 128
    torch.testing.assert_close(
        layer(second).losses["load_balancing"], 8 * (alone * p).sum(), rtol=1e-12, atol=0
    )


def test_overflow_is_exactly_zero_and_counted():
    layer = moe(
        top_k=1,
        router=RouterOptions(normalize=False),
        capacity=CapacityOptions(factor=0.5, minimum=0),
    )
    hidden = tokens().requires_grad_()
    output = layer(hidden)
    counts = output.stats["expert_counts"]
    capacity = math.ceil(0.5 * 64 / 8)
    assert output.stats["dropped"] == (counts - capacity).clamp(min=0).sum() > 0
    unlimited = moe(top_k=1, router=RouterOptions(normalize=False))
    chosen = unlimited.route(hidden).indices[:, 0]
    seen = torch.zeros(8, dtype=torch.int64)
    served = []
    for expert in chosen:  # position order
        served.append(bool(seen[expert] < capacity))
        seen[expert] += 1
    served = torch.tensor(served)
    assert (output.hidden[~served] == 0).all()
    torch.testing.assert_close(output.hidden[served], unlimited(hidden).hidden[served])
    (gradient,) = torch.autograd.grad(output.hidden[~served].sum(), hidden, retain_graph=True)
    assert (gradient == 0).all()
    expert_gradients = torch.autograd.grad(
        output.hidden[~served].sum(), list(layer.experts.parameters())
    )
    assert all((g == 0).all() for g in expert_gradients)


def test_first_choices_go_before_second_choices():
    indices = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [2, -1]])
    expected = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0], [1, 0]], dtype=torch.bool)
    assert torch.equal(within_capacity(indices, 3, 2), expected)
    expected[0, 1] = expected[1, 1] = True
    assert torch.equal(within_capacity(indices, 3, 3), expected)


@given(
    count=st.integers(0, 2**31 - 1) | st.integers(0, 2000),
    num_experts=st.integers(1, 300),
    top_k=st.integers(1, 300),
    factor=st.floats(0, 3) | st.floats(0, 1e300) | st.decimals(0, 3, places=2).map(float),
    minimum=st.integers(0, 9),
)
def test_capacity_is_that_of_exact_fractions(count, num_experts, top_k, factor, minimum):
    top_k = min(top_k, num_experts)
    share = math.ceil(Fraction(str(factor)) * top_k * count / num_experts)
    exact = min(count, max(minimum, share))
    assert expert_capacity(count, num_experts, top_k, factor, minimum) == exact
    assert expert_capacity(torch.tensor(count), num_experts, top_k, factor, minimum) == exact


def test_capacity_of_the_decimal_that_was_written():
    assert expert_capacity(200, 8, 2, 1.1, 1) == 55
    assert expert_capacity(1600, 4, 1, 0.6, 1) == expert_capacity(torch.tensor(1600), 4, 1, 0.6, 1)
    for count in (100, torch.tensor(100)):
        assert expert_capacity(count, 4, 1, 1e19, 1) == 100


@pytest.mark.parametrize(("factor", "served"), [(0.6, 960), (1e19, 1600)])
def test_capacity_and_the_room_of_the_kernel_are_one_number(factor, served):
    router = RouterOptions(normalize=False)
    layer = moe(num_experts=4, top_k=1, router=router, capacity=CapacityOptions(factor=factor))
    hidden = tokens(1600)
    hidden[:, 0] = torch.arange(1600) % 4  # 400 tokens for each expert
    with torch.no_grad():
        layer.gate.weight.zero_()[:, 0] = torch.arange(4) * 1.0
        layer.gate.weight[:, 1] = -0.5 * torch.arange(4) ** 2
    hidden[:, 1] = 1.0
    output = layer.train()(hidden)
    assert output.stats["expert_counts"].tolist() == [400] * 4
    assert int(output.stats["dropped"]) == 1600 - served


def test_capacity_follows_the_tokens_of_one_compiled_graph():
    layer = moe(capacity=CapacityOptions(factor=0.55, eval_factor=0.6)).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (40, 50, 64):
        expected = layer(tokens()[:count])
        actual = compiled(tokens()[:count])
        torch.testing.assert_close(actual.hidden, expected.hidden)
        assert torch.equal(actual.stats["dropped"], expected.stats["dropped"])
        assert expected.stats["dropped"] > 0


def test_capacity_counts_real_tokens_only():
    layer = moe(capacity=CapacityOptions(eval_factor=1.0)).eval()
    mask = torch.zeros(64, dtype=torch.bool)
    mask[10:26] = True
    padded, alone = layer(tokens(), mask=mask), layer(tokens()[10:26])
    assert padded.stats["dropped"] == alone.stats["dropped"] > 0
    torch.testing.assert_close(padded.hidden[10:26], alone.hidden)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_later_first_choices_displace_earlier_second_ones_if_room_is_short(top_k):
    router = RouterOptions(normalize=False)
    layer = moe(top_k=top_k, router=router, capacity=CapacityOptions(eval_factor=0.7)).eval()
    hidden = tokens()
    changed = hidden.clone()
    changed[40:] = 1.5 * hidden[:1]
    before, after = layer(hidden).hidden[:40], layer(changed).hidden[:40]
    assert torch.allclose(before, after, rtol=0, atol=1e-12) == (top_k == 1)


def test_second_choices_are_dropped_at_random_while_training_only():
    layer = moe(capacity=CapacityOptions(8.0, 8.0, second_choice_threshold=0.9))
    hidden = tokens(2000)
    expected = layer.eval().route(hidden)
    assert (expected.indices >= 0).all()
    kept = layer.train().route(hidden).indices >= 0
    assert kept[:, 0].all()
    probability = (expected.weights[:, 1] / 0.9).clamp(max=1)
    spread = (probability * (1 - probability)).sum().sqrt()
    assert abs(kept[:, 1].sum() - probability.sum()) < 4 * spread


def test_room_of_a_sequence_does_not_depend_on_the_others():
    layer = moe(capacity=CapacityOptions(eval_factor=0.6, scope="sequence")).eval()
    hidden = tokens(60).reshape(3, 20, D)
    together = layer(hidden)
    assert together.stats["dropped"] > 0
    alone = torch.cat([layer(hidden[i : i + 1]).hidden for i in range(3)])
    torch.testing.assert_close(together.hidden, alone, rtol=1e-12, atol=1e-12)
    others = moe(capacity=CapacityOptions(eval_factor=0.6)).eval()
    assert not torch.allclose(others(hidden).hidden, alone)


@pytest.mark.parametrize("top_k", [2, 8])
def test_weights_of_what_is_left_sum_to_one(top_k):
    """Where all of a token's choices are dropped, to zero, without a NaN in any gradient."""
    options = CapacityOptions(fixed=9, normalize="after", order="score")
    layer = moe(top_k=top_k, capacity=options)
    hidden = tokens().requires_grad_()
    routing = layer.route(hidden)
    total_T = routing.weights.sum(dim=-1)
    left_T = (routing.indices >= 0).any(dim=-1)
    assert not left_T.all()
    torch.testing.assert_close(total_T, left_T.double(), rtol=1e-12, atol=0)
    layer(hidden).hidden.sum().backward()
    assert hidden.grad.isfinite().all()


def test_expected_load_agrees_with_redrawn_noise():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(512, 8, generator=generator) * 0.7 + torch.linspace(-0.5, 0.5, 8)
    std = torch.rand(512, 8, generator=generator) + 0.3
    drawn = torch.zeros(8)
    estimated = torch.zeros(8)
    for _ in range(200):
        noisy = clean + torch.randn(512, 8, generator=generator) * std
        drawn += expert_counts(noisy.topk(2).indices, 8) / 200
        estimated += losses.expected_load(clean, noisy, std, 2, None) / 200
    assert drawn.max() / drawn.min() > 2  # an even load would be no test
    torch.testing.assert_close(estimated, drawn, rtol=3e-2, atol=0)


def test_expected_load_falls_back_to_counts_without_noise():
    balance = BalanceOptions(load_balancing=0.0, load=1.0)
    layer = moe(router=RouterOptions(noise=True), balance=balance).eval()
    with torch.no_grad():
        layer.gate.weight.normal_()
    output = layer(tokens())
    counts = output.stats["expert_counts"].double()
    expected = counts.var(unbiased=False) / counts.mean() ** 2
    torch.testing.assert_close(output.losses["load"], expected)
    assert not output.losses["load"].requires_grad


def test_importance_is_cv_squared_of_the_gates():
    layer = moe(top_k=3, balance=BalanceOptions(load_balancing=0.0, importance=0.1))
    routing = layer.route(tokens())
    gates = torch.zeros(8, dtype=torch.float64)
    for row, weights in zip(routing.indices, routing.weights, strict=True):
        for expert, weight in zip(row, weights, strict=True):
            gates[expert] += weight
    expected = 0.1 * gates.var(unbiased=False) / gates.mean() ** 2
    torch.testing.assert_close(layer(tokens()).losses["importance"], expected, rtol=1e-9, atol=0)


def test_noise_acts_while_training_only():
    layer = moe(router=RouterOptions(noise=True))
    assert not torch.equal(layer(tokens()).hidden, layer(tokens()).hidden)
    layer.eval()
    assert torch.equal(layer(tokens()).hidden, layer(tokens()).hidden)


def test_jitter_acts_on_the_router_only():
    layer = moe(top_k=8, router=RouterOptions(jitter=0.5, normalize=False), d_expert=8)
    with torch.no_grad():
        layer.gate.weight.zero_()  # weights are then 1/8 whatever the router reads
    torch.testing.assert_close(layer.train()(tokens()).hidden, layer.eval()(tokens()).hidden)


def test_jitter_reaches_the_experts_if_asked():
    options = RouterOptions(jitter=0.5, jitter_experts=True)
    layer = moe(num_experts=2, router=options, num_shared_experts=1).train()
    plain = moe(num_experts=2, num_shared_experts=1)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(0)
    factors = torch.empty(64, D, dtype=torch.float64).uniform_(0.5, 1.5)
    torch.manual_seed(0)
    found = layer(tokens()).hidden
    torch.testing.assert_close(found, plain(tokens() * factors).hidden, rtol=0, atol=1e-12)
    assert torch.equal(layer.eval()(tokens()).hidden, plain(tokens()).hidden)


def test_sparse_mixer_samples_by_the_softmax_and_weighs_three_quarters_of_misses_by_a_third():
    logits = torch.tensor([1.0, 0.9, 0.6, 0.1]).repeat(40_000, 1).double()
    torch.manual_seed(0)
    indices, weights = sparse_mixer(logits, 2, 0.25, training=True)
    shares = logits[0, :3].softmax(-1)  # the last is below the best by more than half its size
    first = torch.bincount(indices[:, 0], minlength=4) / len(logits)
    torch.testing.assert_close(first[:3], shares.float(), rtol=0, atol=0.01)
    assert first[3] == 0
    of_second = weights[indices[:, 0] == 1, 0] / shares[1]
    whole = (of_second > 0.9).double().mean()
    torch.testing.assert_close(whole.item(), 0.25, rtol=0, atol=0.02)
    torch.testing.assert_close(of_second.min().item(), 0.3333, rtol=1e-9, atol=0)
    assert (indices[:, 0] != indices[:, 1]).all()
    best, shares_of_best = sparse_mixer(logits[:1], 2, 0.25, training=False)
    assert best.tolist() == [[0, 1]]
    torch.testing.assert_close(shares_of_best[0, 0], shares[0])


def test_bias_chooses_but_does_not_weigh():
    layer = moe(router=RouterOptions(score="sigmoid", selection_bias=True))
    before = layer.route(tokens())
    with torch.no_grad():
        layer.gate.selection_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    after = layer.route(tokens())
    assert not torch.equal(before.indices, after.indices)
    same = (before.indices.sort(-1).values == after.indices.sort(-1).values).all(-1)
    assert same.any()
    for old, new in ((before, after),):
        torch.testing.assert_close(
            old.weights[same].sort(-1).values, new.weights[same].sort(-1).values, rtol=0, atol=0
        )


def test_bias_alone_evens_a_skewed_router():
    layer = moe(router=RouterOptions(score="sigmoid", selection_bias=True, bias_update_rate=1e-3))
    hidden = torch.cat([tokens(4096), torch.ones(4096, 1, dtype=torch.float64)], dim=1)[:, 1:]
    with torch.no_grad():
        layer.gate.weight.mul_(0.5)
        layer.gate.weight[:, -1] = torch.linspace(-0.2, 0.2, 8)
    frozen = layer.gate.weight.clone()
    start = max_violation(layer(hidden).stats["expert_counts"])
    for _ in range(200):
        layer.observe(layer(hidden).stats)
        layer.step()
    assert start > 0.5
    assert max_violation(layer(hidden).stats["expert_counts"]) < 0.1
    assert torch.equal(layer.gate.weight, frozen)


def test_bias_moves_once_per_step_by_the_sign_of_the_summed_load():
    layer = moe(router=RouterOptions(score="sigmoid", selection_bias=True))
    for counts in ([8, 0, 2, 2, 2, 2, 2, 2], [0, 1, 2, 2, 2, 2, 2, 2]):
        layer.observe({"expert_counts": torch.tensor(counts)})
    layer.step()
    expected = torch.tensor([-1, 1, 0, 0, 0, 0, 0, 0]) * 1e-3  # against 37 / 8 per expert
    assert torch.equal(
        layer.gate.selection_bias.sign(), (37 / 8 - torch.tensor([8, 1, 4, 4, 4, 4, 4, 4])).sign()
    )
    assert layer.gate.selection_bias.abs().max() == expected.abs().max()
    before = layer.gate.selection_bias.clone()
    layer.step()  # nothing observed since
    assert torch.equal(layer.gate.selection_bias, before)


def test_bias_stays_fp32_in_a_bf16_model():
    layer = SparseMoE(D, router=RouterOptions(score="sigmoid", selection_bias=True))
    with torch.no_grad():
        layer.gate.selection_bias.fill_(0.5 + 1e-3)
    layer.to(torch.bfloat16)
    assert layer.experts.down_proj.dtype == torch.bfloat16
    assert torch.equal(layer.gate.selection_bias, torch.full((8,), 0.5 + 1e-3))
    with torch.device("meta"):
        ghost = SparseMoE(D, router=RouterOptions(score="sigmoid", selection_bias=True))
    ghost.to_empty(device="cpu").reset_parameters()
    assert torch.equal(ghost.gate.selection_bias, torch.zeros(8))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_score", [None, "max", "sum_of_two"])
def test_groups_limit_where_experts_come_from(bias, group_score):
    options = {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "selection_bias": bias}
    if group_score is not None:  # a configuration of before this option lacks its name
        options["group_score"] = group_score
    layer = moe(num_experts=16, top_k=4, router=RouterOptions(**options))
    indices = layer.route(tokens()).indices
    scores = (tokens() @ layer.gate.weight.t()).sigmoid().reshape(-1, 4, 4)
    of_two = bias if group_score is None else group_score == "sum_of_two"
    best, two = (
        merit.topk(2).indices for merit in (scores.amax(-1), scores.topk(2).values.sum(-1))
    )
    assert not torch.equal(best, two)
    for row, groups in zip(indices, two if of_two else best, strict=True):
        assert {int(e) // 4 for e in row} <= set(groups.tolist())
    free = moe(num_experts=16, top_k=4, router=RouterOptions(score="sigmoid"))
    assert not torch.equal(free.route(tokens()).indices, indices)
    again = moezoo.SparseMoE.from_config(layer.config()).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.route(tokens()).indices, indices)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_expert_choice_fills_every_expert_exactly(top_k):
    layer = moe(top_k=top_k, router=RouterOptions(choice="expert", normalize=False))
    routing = layer.route(tokens())
    assert (expert_counts(routing.indices, 8) == 64 * top_k // 8).all()
    scores = (tokens() @ layer.gate.weight.t()).softmax(-1)
    for expert in range(8):
        best = set(scores[:, expert].topk(64 * top_k // 8).indices.tolist())
        taken = (routing.indices == expert).any(-1).nonzero()[:, 0].tolist()
        assert set(taken) == best
        torch.testing.assert_close(routing.weights[taken, expert], scores[taken, expert])


def test_expert_choice_leaves_padding_out_of_its_capacity():
    layer = moe(router=RouterOptions(choice="expert", normalize=False))
    mask = torch.arange(64) < 24
    padded, alone = layer(tokens(), mask=mask), layer(tokens()[:24])
    torch.testing.assert_close(padded.hidden[:24], alone.hidden)
    assert (padded.hidden[24:] == 0).all()
    assert (padded.stats["expert_counts"] == 6).all()


def test_sigmoid_scores_do_not_compete():
    """Raising a logit that stays unchosen leaves y alone; a softmax gate would not."""

    def output(score: str) -> torch.Tensor:
        layer = moe(router=RouterOptions(score=score, normalize=False))
        hidden = tokens(1)
        with torch.no_grad():
            weights = layer.gate.weight
            weights.copy_(hidden * torch.tensor([2, 1.5, 0.0, 0, 0, 0, 0, -1]).unsqueeze(-1))
            before = layer(hidden).hidden
            weights[7] = -0.5 * hidden
        return (layer(hidden).hidden - before).abs().max()

    assert output("sigmoid") == 0
    assert output("softmax") > 1e-9


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_scores_that_underflow_have_finite_gradients(score):
    layer = moe(router=RouterOptions(score=score)).float()
    with torch.no_grad():
        layer.gate.weight.fill_(-1e3)
    hidden = tokens().abs().float().requires_grad_()
    layer(hidden).hidden.sum().backward()
    assert hidden.grad.isfinite().all()
    assert layer.gate.weight.grad.isfinite().all()


def test_a_bias_on_the_logit_chooses_others_than_one_on_the_score():
    layers = [
        moe(router=RouterOptions(score="sigmoid", selection_bias=True, select_on=on))
        for on in ("score", "logit")
    ]
    for layer in layers:
        with torch.no_grad():
            layer.gate.weight.mul_(20.0)
            layer.gate.selection_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    by_score, by_logit = (layer.route(tokens()).indices for layer in layers)
    logits = tokens() @ layers[1].gate.weight.t()
    expected = (logits + layers[1].gate.selection_bias).topk(2).indices
    assert torch.equal(by_logit, expected)
    assert not torch.equal(by_score, by_logit)


class FirstExpertHalved(SparseMoE):
    """Halves the weights of expert 0, and swaps expert 1 for 2 where the token's id is odd."""

    def adjust(self, routing, hidden, context):
        assert hidden.shape == (len(routing.indices), D)
        indices, weights = routing.indices, routing.weights
        weights = torch.where(indices == 0, weights / 2, weights)
        if context.token_ids is not None:
            odd = (context.token_ids.reshape(-1, 1) % 2).bool()
            swapped = torch.where(indices == 1, 2, torch.where(indices == 2, 1, indices))
            indices = torch.where(odd, swapped, indices)
        return routing._replace(indices=indices, weights=weights)


@pytest.mark.parametrize("apply_to", ["output", "input"])
def test_every_path_runs_by_the_adjusted_routing(apply_to):
    options = RouterOptions(weights=WeightOptions(apply_to=apply_to))
    layer = FirstExpertHalved(D, d_expert=8, balance=NO_LOSS, router=options).double().eval()
    plain = SparseMoE(D, d_expert=8, balance=NO_LOSS, router=options).double().eval()
    plain.load_state_dict(layer.state_dict())
    hidden, ids = tokens(63).reshape(3, 21, D), torch.arange(63).reshape(3, 21)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[1, 15:] = False
    context = {"token_ids": ids, "mask": mask}
    routing = layer.route(hidden, mask=mask, token_ids=ids)
    expected = torch.zeros(63, D, dtype=torch.float64)
    for t, x in enumerate(hidden.reshape(63, D)):
        for e, w in zip(routing.indices[t].tolist(), routing.weights[t], strict=True):
            one = torch.tensor([[e]])
            if apply_to == "input":
                expected[t] += plain.experts(w * x[None], one, torch.ones(1, 1).double(), 1)[0]
            else:
                expected[t] += plain.experts(x[None], one, w.reshape(1, 1), 1)[0]
    expected = expected.reshape(3, 21, D)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(layer(hidden, **context).hidden, expected, **close)
    torch.testing.assert_close(layer.reference(hidden, **context).hidden, expected, **close)
    with torch.no_grad():
        torch.testing.assert_close(layer.infer(hidden, **context), expected, **close)
    assert not torch.allclose(plain(hidden, **context).hidden, expected)
    chosen = slot_choices(layer, hidden, context)
    assert torch.equal(chosen.indices, routing.indices)
    load = layer.slot_load(hidden, **context)
    assert load.counts.tolist() == expert_counts(routing.indices, 8).tolist()
    assert not torch.equal(load.counts, plain.slot_load(hidden, **context).counts)


def test_router_reads_what_it_is_told_to():
    layer = moe()
    other = tokens().flip(0)
    routing = layer.route(other)
    expected = layer.experts.reference(tokens(), routing.indices, routing.weights)
    torch.testing.assert_close(layer(tokens(), router_input=other).hidden, expected)


def test_shared_expert_answers_every_token():
    layer = moe(num_shared_experts=2, shared_gate=True, d_expert=24)
    assert layer.d_shared == 48
    routed = layer.experts.reference(tokens(), *layer.route(tokens())[:2])
    gate = (tokens() @ layer.shared_expert_gate.weight.t()).sigmoid()
    expected = routed + gate * layer.shared_expert(tokens()).hidden
    torch.testing.assert_close(layer(tokens()).hidden, expected)


def test_sequence_balance_is_per_sequence():
    layer = moe(balance=BalanceOptions(load_balancing=0.0, sequence=1.0))
    hidden = tokens(96).reshape(4, 24, D)
    each = [layer(row.unsqueeze(0)).losses["sequence_balance"] for row in hidden]
    whole = layer(hidden).losses["sequence_balance"]
    torch.testing.assert_close(whole, torch.stack(each).mean())
    pooled = layer(hidden.reshape(1, 96, D)).losses["sequence_balance"]
    assert not torch.isclose(whole, pooled, rtol=1e-3)


def test_unused_experts_get_zero_gradients_not_none():
    layer = moe()
    hidden = tokens().abs()
    with torch.no_grad():
        layer.gate.weight.fill_(-1.0)
        layer.gate.weight[:2] = 1.0
    layer(hidden).hidden.sum().backward()
    for parameter in layer.experts.parameters():
        assert (parameter.grad[2:] == 0).all()
        assert parameter.grad[:2].abs().sum() > 0


def test_load_statistics():
    assert max_violation(torch.tensor([3, 1, 0, 0])) == 2.0
    assert load_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([5, 0, 0, 0])) == 0.0
    assert expert_counts(torch.tensor([[0, 2], [-1, 2]]), 4).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "top_k: 9 is more than num_experts=8; lower top_k or raise num_experts"),
        ({"top_k": 0}, "top_k: 0 is out of range; give a whole number ≥ 1"),
        ({"num_experts": "8"}, "num_experts: '8' is not a whole number ≥ 1"),
        ({"top_k": True}, "top_k: True is not a whole number"),
        ({"activation": "swish"}, "activation: 'swish' is not known; choose from: gelu"),
        ({"activation": "gelutanh"}, "did you mean 'gelu_tanh'"),
        ({"d_expert": -1}, "d_expert: -1 is out of range"),
        ({"shared_gate": True}, "shared_gate: there is no shared expert to gate"),
        ({"shared_bias": True}, "shared_bias: there is no shared expert to have biases"),
        ({"shared_glu": {"limit": 1.0}}, "shared_glu: there is no shared expert to bound"),
        ({"glu": {"limit": -1.0}}, "glu.limit: -1.0 is not a number > 0"),
        ({"glu": {"limit": 1.0}, "gated": False}, "glu: bounds a gated linear unit; set gated"),
        ({"glu": {"limits": 1.0}}, "did you mean 'limit'"),
        ({"d_latent": 0}, "d_latent: 0 is out of range"),
        ({"num_identity_experts": -1}, "num_identity_experts: -1 is out of range"),
        (
            {"num_identity_experts": 2, "router": {"choice": "expert", "normalize": False}},
            "num_identity_experts: have no meaning in expert choice",
        ),
        (
            {"num_identity_experts": 2, "capacity": {}},
            "capacity: is not defined with num_identity_experts",
        ),
        ({"d_shared": 4}, "d_shared: goes with num_shared_experts"),
        ({"top_k": 1}, "router.normalize: with top_k=1 a normalized weight is always 1"),
        ({"router": {"num_groups": 3}}, "router.num_groups: 3 does not divide num_experts=8"),
        ({"router": {"group_score": "two"}}, "router.group_score: 'two' is not known"),
        ({"router": {"num_groups": 8}}, "router.top_groups: 1 groups of 1 experts hold fewer"),
        ({"router": {"score": "tanh"}}, "router.score: 'tanh' is not known"),
        ({"router": {"jitter": 2.0}}, "router.jitter: 2 is out of range"),
        ({"router": {"normalise": True}}, "router: unknown option 'normalise'; did you"),
        (
            {"router": {"choice": "expert"}},
            "router.normalize: has no meaning in expert choice; set it to false, "
            "balance.load_balancing to 0 and the model's allow_non_causal to true",
        ),
        ({"router": {"logits": {"softcap": -1.0}}}, "router.logits.softcap: -1 is out of range"),
        ({"router": {"logits": {"mlp": -1}}}, "router.logits.mlp: -1 is out of range"),
        ({"router": {"logits": {"scale": 0.0}}}, "router.logits.scale: 0 makes all experts equal"),
        ({"router": {"logits": {"bias": "no"}}}, "router.logits.bias: 'no' is neither true nor"),
        ({"router": {"logits": {"cap": 3.0}}}, "router.logits: unknown option 'cap'; did you"),
        ({"router": {"logits": 3}}, "logits: 3 is not a mapping of options"),
        ({"router": {"select_on": "logits"}}, "router.select_on: 'logits' is not known; did you"),
        (
            {"router": {"score": "sigmoid", "select_on": "logit", "expert_dropout": 0.1}},
            "router.expert_dropout: acts on scores that choose; set select_on to score",
        ),
        (
            {"router": {"choice": "expert", "normalize": False, "select_on": "logit"}},
            "router.select_on: in expert choice it is the score that chooses",
        ),
        ({"router": {"jitter_experts": True}}, "router.jitter_experts: there is no jitter; set"),
        ({"router": {"mixer_eps": -1.0}}, "router.mixer_eps: -1 is out of range"),
        (
            {"router": {"score": "sparse_mixer"}},
            "router.normalize: has no meaning in sparse_mixer; set it to false",
        ),
        (
            {"router": {"score": "sparse_mixer", "normalize": False, "num_groups": 2}},
            "router.num_groups: has no meaning in sparse_mixer; set it to 1",
        ),
        (
            {"router": {"score": "sparse_mixer", "normalize": False, "select_on": "logit"}},
            "router.select_on: sparse_mixer samples by the score; use score",
        ),
        ({"router": {"closed_groups": "zero"}}, "router.closed_groups: there is one group only"),
        ({"router": {"weights": {"p": 0.5}}}, "router.weights.p: 0.5 is out of range"),
        ({"router": {"weights": {"eps": -1.0}}}, "router.weights.eps: -1 is out of range"),
        (
            {"router": {"normalize": False, "weights": {"minimum": 0.1}}},
            "router.weights.minimum: says how weights are normalized; set normalize to true",
        ),
        (
            {"router": {"weights": {"with_shared": True}}},
            "router.weights.with_shared: a softmax is over routed experts only; set score to",
        ),
        (
            {"router": {"score": "sigmoid", "weights": {"with_shared": True}}},
            "router.weights.with_shared: there is no shared expert; set num_shared_experts",
        ),
        (
            {**WITH_SHARED, "bias": True},
            "bias: shared experts have one output bias, which no weight of theirs belongs to",
        ),
        ({"router": {"weights": {"apply_to": "x"}}}, "router.weights.apply_to: 'x' is not known"),
        (
            {
                "num_shared_experts": 1,
                "router": {
                    "score": "sigmoid",
                    "weights": {"with_shared": True, "apply_to": "input"},
                },
            },
            "router.weights.apply_to: weights of shared experts multiply their output",
        ),
        ({**WITH_SHARED, "shared_gate": True}, "shared_gate: the router weighs the shared"),
        ({**WITH_SHARED, "d_shared": 7}, "d_shared: 7 neurons are not 2 experts of one width"),
        (
            {"router": {"choice": "expert", "normalize": False, "weights": {"expert_scale": True}}},
            "router.weights: expert choice weighs by the scores as they are; leave it out",
        ),
        ({"balance": {"z_loss": -1.0}}, "balance.z_loss: -1 is out of range"),
        ({"balance": {"load": float("nan")}}, "balance.load: nan is out of range"),
        ({"capacity": {"factor": "big"}}, "capacity.factor: 'big' is not a number"),
        ({"capacity": {"fixed": 0}}, "capacity.fixed: 0 is out of range"),
        ({"capacity": {"scope": "global"}}, "capacity.scope: 'global' is not known; choose from:"),
        ({"capacity": {"order": "weight"}}, "capacity.order: 'weight' is not known"),
        (
            {"router": {"normalize": False}, "capacity": {"normalize": "after"}},
            "capacity.normalize: weights are not normalized; set router.normalize to true",
        ),
        ({"num_expert": 4}, "SparseMoE: unknown argument 'num_expert'; did you mean 'num_experts'"),
    ],
)
def test_mistakes_are_named_with_their_fix(arguments, message):
    config = {"class_path": "moezoo.SparseMoE", "init_args": arguments}
    with pytest.raises(InputError) as error:
        moezoo.FeedForward.from_config(config, d_model=D)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_expert_choice_refuses_a_capacity():
    with pytest.raises(InputError, match="capacity: expert choice fills every expert"):
        moe(router=RouterOptions(choice="expert", normalize=False), capacity=CapacityOptions())


def test_stacked_biases_do_not_decay():
    layer = moe(bias=True)
    decaying = [p for g in layer.parameter_groups() if g.weight_decay for p in g.parameters]
    biases = {id(p) for name, p in layer.named_parameters() if name.endswith("bias")}
    assert len(biases) == 2
    assert not biases & {id(p) for p in decaying}
    assert len(decaying) == 3
