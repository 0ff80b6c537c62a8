"""Carving: nothing is lost, nothing is counted twice, and routers and refits do what they claim."""

import pytest
import torch
import torch.nn.functional as F

from moezoo import InputError
from moezoo.convert import Block, CarveOptions, carve_block, prune_block
from moezoo.convert.carve.activity import contribution_features
from moezoo.convert.carve.clusters import balanced_kmeans
from moezoo.convert.carve.least_squares import ridge, solve
from moezoo.convert.carve.options import ROUTERS, SHARED_BY, SPLITS


def neurons(plan) -> torch.Tensor:
    shared = [] if plan.shared is None else [plan.shared.neurons]
    return torch.cat([*shared, *(e.neurons for e in plan.experts)])


@pytest.mark.parametrize("shared_by", SHARED_BY)
@pytest.mark.parametrize("split", SPLITS)
def test_every_neuron_is_used_once_and_sizes_are_equal(split, shared_by, planted):
    for shared, active, experts in ((3, 3, 8), (0, 2, 6), (1, 1, 2), (2, 13, 15)):
        options = CarveOptions(shared, active, experts, split, shared_by, refit=False)
        plan = carve_block(*planted(tokens=300).weights(), options).plan
        assert torch.equal(neurons(plan).sort().values, torch.arange(240))
        assert plan.d_shared == 240 // experts * shared
        assert {e.neurons.numel() for e in plan.experts} == {240 // experts}
        assert (plan.num_experts, plan.top_k) == (experts - shared, active)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("refit", [True, False])
def test_with_all_experts_active_it_is_the_dense_block(router, gated, refit, planted):
    x, gate, up, down = planted(300, gated, torch.float64).weights()
    bias_in = None if gated else torch.randn(240, dtype=torch.float64)
    bias_out = torch.randn(48, dtype=torch.float64)
    options = CarveOptions(2, 4, 6, split="random", router=router, refit=refit)
    rest = (F.gelu, bias_in, bias_out)
    carved = carve_block(x, gate, up, down, options, *rest)
    dense = Block(gate, up, down, *rest).run(x)
    found = carved.plan.run(x, gate, up, down, *rest)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)
    assert carved.figures["error"] < 1e-12
    assert carved.figures["exact"] == 1.0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("router", ["ridge", "cmoe"])
def test_plans_repeat_and_other_numbers_of_threads_only_round_otherwise(split, router, planted):
    weights = planted().weights()
    options = CarveOptions(2, 6, 16, split=split, router=router, features=64)
    before = torch.get_num_threads()
    plans = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            plans.append(carve_block(*weights, options).plan)
    finally:
        torch.set_num_threads(before)
    one, *others = plans
    for other in others:
        assert torch.equal(neurons(one), neurons(other))
        # On some processors MKL divides the sums of tall products among threads.
        again = other is others[0]
        tolerance = {"rtol": 0, "atol": 0} if again else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(other.router, one.router, **tolerance)
        torch.testing.assert_close(other.down, one.down, **tolerance)


@pytest.mark.parametrize("rule", ["cmoe", "contribution"])
@pytest.mark.parametrize("split", ["random", "contiguous", "coactivation"])
def test_shared_neurons_are_those_of_the_rule(split, rule, planted):
    weights = planted(tokens=300).weights()
    own, other = (
        carve_block(*weights, CarveOptions(3, 3, 8, each, rule, refit=False)).plan
        for each in (rule, split)
    )
    assert torch.equal(own.shared.neurons, other.shared.neurons)
    if split == "contiguous":
        rest = torch.cat([expert.neurons for expert in other.experts])
        assert torch.equal(rest, rest.sort().values)
    elif split == "random":
        dealt = carve_block(*weights, CarveOptions(3, 3, 8, "random", refit=False)).plan
        assert not torch.equal(dealt.shared.neurons, other.shared.neurons)
        assert not torch.equal(own.experts[0].neurons, other.experts[0].neurons)


def test_seeds_matter():
    x, up, down = torch.randn(50, 8), torch.randn(32, 8), torch.randn(8, 32)
    plans = [
        carve_block(x, None, up, down, CarveOptions(0, 1, 4, split="random", seed=seed)).plan
        for seed in (0, 1)
    ]
    assert not torch.equal(neurons(plans[0]), neurons(plans[1]))


@pytest.mark.parametrize(
    ("split", "least"),
    [("contribution", 0.7), ("coactivation", 0.7), ("weight_kmeans", 0.7), ("random", 0.0)],
)
def test_splits_find_the_groups_there_are(split, least, planted):
    block = planted()
    plan = carve_block(
        *block.weights(), CarveOptions(2, 4, 15, split=split, iterations=30, refit=False)
    ).plan
    same = 0
    for expert in plan.experts:
        groups = block.group[expert.neurons]
        same += int(torch.bincount(groups[groups >= 0], minlength=12).max())
    assert (same / 192 > least) if least else (same / 192 < 0.35)


def test_shared_are_the_neurons_that_vary_most(planted):
    x, gate, up, down = planted(dtype=torch.float64).weights()
    plan = carve_block(x, gate, up, down, CarveOptions(2, 6, 16, held_out=0.0, refit=False)).plan
    h = F.silu(x @ gate.t()) * (x @ up.t())
    rating = h.var(dim=0, correction=0).sqrt() * down.square().sum(dim=0).sqrt()
    assert set(plan.shared.neurons.tolist()) == set(rating.topk(30).indices.tolist())


def test_balanced_kmeans_never_gets_worse():
    points = torch.randn(240, 6, dtype=torch.float64) + torch.randn(8, 6).repeat(30, 1) * 2
    sums = []
    for iterations in (1, 2, 4, 8, 40):
        labels = balanced_kmeans(points, 8, iterations, seed=0)
        assert torch.equal(torch.bincount(labels), torch.full((8,), 30))
        means = torch.stack([points[labels == j].mean(dim=0) for j in range(8)])
        sums.append((points - means[labels]).square().sum().item())
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[0]


def brute_force_agreement(plan, x, gate, up, down, active):
    """Compare with the contribution oracle token by token, in words."""
    overlap = exact = 0
    for token in x:
        h = F.silu(gate @ token) * (up @ token)
        sizes = [(down[:, e.neurons] @ h[e.neurons]).norm().item() for e in plan.experts]
        wanted = set(sorted(range(len(sizes)), key=lambda e: -sizes[e])[:active])
        chosen = set(plan.weights(token.unsqueeze(0))[0].nonzero().flatten().tolist())
        overlap += len(wanted & chosen) / active
        exact += wanted == chosen
    return overlap / len(x), exact / len(x)


@pytest.mark.parametrize("sizes", [(3, 3, 8), (2, 6, 16), (2, 2, 16)])
def test_the_ridge_router_is_far_above_chance_on_held_out_tokens(sizes, planted):
    x, gate, up, down = planted(dtype=torch.float64).weights()
    carved = carve_block(x, gate, up, down, CarveOptions(*sizes))
    figures = carved.figures
    assert figures["held_out_tokens"] == 200
    assert figures["overlap"] >= figures["chance_overlap"] + 0.15
    assert figures["exact"] >= figures["chance_exact"] + 0.05
    overlap, exact = brute_force_agreement(carved.plan, x[-200:], gate, up, down, sizes[1])
    assert figures["overlap"] == pytest.approx(overlap)
    assert figures["exact"] == pytest.approx(exact)


@pytest.mark.parametrize("sizes", [(3, 3, 8), (2, 6, 16), (2, 2, 16)])
def test_carving_beats_static_pruning_of_the_same_budget(sizes, planted):
    x, gate, up, down = planted().weights()
    keep = (sizes[0] + sizes[1]) * 240 // sizes[2]
    dense = Block(gate, up, down).run(x[-200:])

    def pruned(method):
        small = prune_block(x[:-200], gate, up, down, keep, method)
        return float((small.run(x[-200:]) - dense).norm() / dense.norm())

    ours = carve_block(x, gate, up, down, CarveOptions(*sizes)).figures
    rand = carve_block(x, gate, up, down, CarveOptions(*sizes, split="random")).figures
    assert ours["error_static"] == pytest.approx(pruned("static"), rel=1e-4)
    assert ours["error"] < 0.9 * pruned("static_ls")
    assert ours["error_unfitted"] < 0.9 * pruned("static")
    assert ours["error"] < 0.9 * ours["error_unfitted"]
    assert ours["error"] < 0.9 * rand["error"]


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_the_least_squares_solution(bias, planted):
    x, gate, up, down = planted(600, dtype=torch.float64).weights()
    options = CarveOptions(2, 2, 8, held_out=0.0, refit_ridge=0.03, bias=bias)
    plan = carve_block(x, gate, up, down, options).plan
    h = F.silu(x @ gate.t()) * (x @ up.t())
    weights = plan.weights(x)
    counted = torch.zeros_like(h)
    counted[:, plan.shared.neurons] = h[:, plan.shared.neurons]
    for e, expert in enumerate(plan.experts):
        counted[:, expert.neurons] = h[:, expert.neurons] * weights[:, e : e + 1]
    residual = h @ down.t() - counted @ down.t()
    centre = (lambda t: t - t.mean(dim=0)) if bias else (lambda t: t)
    ridge = (0.03 * centre(counted).square().sum(dim=0).mean()).sqrt() * torch.eye(240).double()
    stacked = torch.cat([centre(counted), ridge])
    target = torch.cat([centre(residual), torch.zeros(240, 48).double()])
    change = torch.linalg.lstsq(stacked, target).solution.t()
    torch.testing.assert_close(plan.down, down + change, rtol=1e-8, atol=1e-9)
    if bias:
        expected = residual.mean(dim=0) - change @ counted.mean(dim=0)
        torch.testing.assert_close(plan.bias, expected, rtol=1e-8, atol=1e-9)
    else:
        assert plan.bias is None


def test_a_bias_pays_where_activations_have_a_mean(planted):
    x, gate, up, down = planted(gated=False).weights()
    bias_in, bias_out = 0.3 * torch.randn(240), torch.randn(48)
    rest = (F.gelu, bias_in, bias_out)

    def carved(**options):
        return carve_block(x, gate, up, down, CarveOptions(1, 3, 16, **options), *rest)

    with_bias, without = carved(), carved(bias=False)
    assert with_bias.plan.bias is not None
    assert without.plan.bias is None
    assert with_bias.figures["error"] < without.figures["error"]
    assert with_bias.figures["overlap"] >= with_bias.figures["chance_overlap"] + 0.15


@pytest.mark.parametrize("intercept", [False, True])
def test_blocks_of_the_squares_are_all_there(intercept):
    # More regressors than two blocks, and a last block of another size; tokens in unequal parts.
    x, y = torch.randn(700, 1100, dtype=torch.float64), torch.randn(700, 3, dtype=torch.float64)
    weight, bias = ridge(zip(x.split(300), y.split(300), strict=True), 0.1, intercept)
    p = x - x.mean(dim=0) if intercept else x
    q = y - y.mean(dim=0) if intercept else y
    gram = p.t() @ p
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(1100, dtype=torch.float64)
    expected = torch.linalg.solve(gram + penalty, p.t() @ q).t()
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)
    if intercept:
        torch.testing.assert_close(bias, y.mean(dim=0) - expected @ x.mean(dim=0))
    else:
        assert bias is None


def test_of_many_tokens_evenly_spaced_ones_describe_neurons():
    hidden = torch.randn(3 * 4096 + 5, 10, dtype=torch.float64)
    found = contribution_features(hidden, 32, seed=1)
    assert torch.equal(found, contribution_features(hidden[::3], 32, seed=1))


def test_singular_squares_are_solved_in_double_precision():
    gram, rhs = torch.ones(6, 6), torch.ones(6, 2)
    # 1 + 1e-9 is 1 in fp32, so Cholesky meets a zero there.
    found = solve(gram, rhs, 1e-9)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((6, 2), 1 / 6), rtol=1e-5, atol=0)
    assert not solve(torch.zeros(3, 3), torch.ones(3, 1), 0.1).any()
    with pytest.raises(InputError, match=r"ridge: the least squares have no solution"):
        solve(-gram, rhs, 0.1)


def test_pruning_keeps_what_matters_and_makes_up_for_the_mean(planted):
    x, gate, up, down = planted(dtype=torch.float64).weights()
    h = F.silu(x @ gate.t()) * (x @ up.t())
    dense = Block(gate, up, down).run(x)
    small = prune_block(x, gate, up, down, 100)
    kept = (h.abs().mean(dim=0) * down.norm(dim=0)).topk(100).indices.sort().values
    assert torch.equal(small.up, up[kept])
    assert small.bias_out is None
    errors = []
    for method in ("static", "static_mean", "static_ls"):
        small = prune_block(x, gate, up, down, 100, method)
        errors.append(float((small.run(x) - dense).norm()))
        everything = prune_block(x, gate, up, down, 240, method)
        torch.testing.assert_close(everything.run(x), dense, rtol=1e-10, atol=1e-10)
    assert errors == sorted(errors, reverse=True)
    mean = prune_block(x, gate, up, down, 100, "static_mean", bias_out=torch.ones(48).double())
    torch.testing.assert_close(mean.run(x).mean(dim=0), dense.mean(dim=0) + 1, rtol=1e-9, atol=1e-9)
    fitted = prune_block(x, gate, up, down, 100, "static_ls", bias=True)
    assert float((fitted.run(x) - dense).norm()) < errors[1]


def test_output_scale_weighs_the_routed_experts_only(planted):
    x, gate, up, down = planted(200, dtype=torch.float64).weights()
    options = CarveOptions(1, 2, 4, split="random", refit=False, output_scale=1.5)
    plan = carve_block(x, gate, up, down, options).plan
    h = F.silu(x @ gate.t()) * (x @ up.t())
    shared = h[:, plan.shared.neurons] @ down[:, plan.shared.neurons].t()
    weights = plan.weights(x)
    routed = sum(
        weights[:, e : e + 1] * (h[:, i.neurons] @ down[:, i.neurons].t())
        for e, i in enumerate(plan.experts)
    )
    torch.testing.assert_close(plan.run(x, gate, up, down), shared + 1.5 * routed)
    refitted = carve_block(x, gate, up, down, CarveOptions(1, 2, 4, output_scale=1.5))
    assert refitted.figures["error"] < refitted.figures["error_unfitted"]


def test_linear_routers_have_even_logits_and_known_flatness(planted):
    x, gate, up, down = planted().weights()
    for router in ("ridge", "gate_mean"):
        options = CarveOptions(2, 4, 12, router=router, held_out=0.0, refit=False)
        plan = carve_block(x, gate, up, down, options).plan
        logits = plan.logits(x)
        assert logits.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-4)
        torch.testing.assert_close(logits.mean(dim=1), torch.zeros(len(x)), rtol=0, atol=1e-4)
        assert plan.flatness * logits.abs().max().item() == pytest.approx(0.01, rel=1e-4)


def test_low_precision_inputs_are_carved_in_fp32(planted):
    weights = [t.bfloat16() for t in planted(500).weights()]
    plan = carve_block(*weights, CarveOptions(2, 4, 12)).plan
    assert plan.router.dtype == plan.down.dtype == torch.float32
    assert plan.run(*weights).dtype == torch.bfloat16


MISTAKES = {
    r"experts: 7 does not divide the block's 240 neurons; choose 6 or 8": {"experts": 7},
    r"shared: 8 is out of range": {"shared": 8},
    r"active: 6 is out of range": {"active": 6},
    r"split: 'contribuion' is not known; did you mean 'contribution'": {"split": "contribuion"},
    r"router: 'ridg' is not known": {"router": "ridg"},
    r"bias: comes from the refit": {"bias": True, "refit": False},
    r"held_out: 1 is out of range": {"held_out": 1.0},
    r"top_activations: 241 is out of range": {"top_activations": 241},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_in_options_are_named(message, planted):
    with pytest.raises(InputError, match=message):
        carve_block(*planted(50).weights(), CarveOptions(**MISTAKES[message]))


def test_mistakes_in_tensors_are_named(planted):
    x, gate, up, down = planted(50).weights()
    with pytest.raises(InputError, match=r"x: shape \(50, 47\) is not \(tokens, 48\)"):
        carve_block(x[:, 1:], gate, up, down)
    with pytest.raises(InputError, match=r"x: the calibration inputs hold NaN"):
        carve_block(x / 0, gate, up, down)
    with pytest.raises(InputError, match=r"down: shape \(240, 48\) should be \(48, 240\)"):
        carve_block(x, gate, up, down.t())
    with pytest.raises(InputError, match=r"bias_in: gated blocks with inner biases"):
        carve_block(x, gate, up, down, bias_in=torch.zeros(240))
    with pytest.raises(InputError, match=r"keep: 0 is out of range"):
        prune_block(x, gate, up, down, 0)
