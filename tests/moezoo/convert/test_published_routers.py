"""CMoE as its paper and code have it, and FactorLLM's loss, against plain readings of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from moezoo.convert import CarveOptions, carve_block
from moezoo.convert.carve.activity import mark_distances
from moezoo.convert.carve.prior_approximate import (
    fit_prior_approximate,
    prior_approximate_loss,
    pseudo_labels,
)

PUBLISHED = {"split": "cmoe", "router": "cmoe", "refit": False, "held_out": 0.0}


def markers(x, gate, up, count, profile):
    """Mark the ``count`` largest |h| of every token, in a dense (T, F) matrix."""
    if profile == "cosine":
        x, gate, up = (F.normalize(t, dim=-1) for t in (x, gate, up))
    h = F.silu(x @ gate.t()) * (x @ up.t())
    marked = torch.zeros_like(h)
    for row, values in zip(marked, h.abs(), strict=True):
        row[values.topk(count).indices] = 1.0
    return marked


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_distances_from_marks_equal_those_of_the_binary_matrix(metric):
    marks = torch.stack([torch.randperm(20)[:4] for _ in range(30)])
    labels = torch.randint(-1, 3, (20,))
    labels[:3] = torch.arange(3)
    marked = torch.zeros(30, 20, dtype=torch.float64).scatter_(1, marks, 1.0)
    means = torch.stack([marked[:, labels == j].mean(dim=1) for j in range(3)])
    expected = torch.cdist(marked.t(), means, p=1 if metric == "l1" else 2)
    found = mark_distances(marks, labels, 3, metric)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("profile", ["cosine", "raw"])
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_one_iteration_of_cmoe_is_the_published_one(profile, metric, planted):
    """Shared: most marked. Seeds: the next ones. One exact assignment. Nearest to the new mean."""
    x, gate, up, down = planted(300, dtype=torch.float64).weights()
    used = torch.arange(240) % 20 == 0  # twelve neurons, so that all assignments can be tried
    gate, up, down = gate[used], up[used], down[:, used]
    options = CarveOptions(
        1, 1, 4, top_activations=3, profile=profile, distance=metric, **PUBLISHED
    )
    plan = carve_block(x, gate, up, down, options).plan
    marked = markers(x, gate, up, 3, profile)
    order = marked.sum(dim=0).argsort(descending=True, stable=True)
    shared, rest = order[:3].sort().values, order[3:].sort().values
    assert torch.equal(plan.shared.neurons, shared)
    p = 1 if metric == "l1" else 2
    distance = torch.cdist(marked[:, rest].t(), marked[:, order[3:6]].t(), p=p)
    labels = {int(n): e for e, expert in enumerate(plan.experts) for n in expert.neurons}
    cost = sum(distance[i, labels[int(n)]].item() for i, n in enumerate(rest))
    best = min(
        sum(distance[i, e].item() for i, e in enumerate(chosen))
        for chosen in itertools.product(range(3), repeat=9)
        if all(chosen.count(e) == 3 for e in range(3))
    )
    assert cost == pytest.approx(best, rel=1e-12)
    for e, expert in enumerate(plan.experts):
        members = marked[:, expert.neurons].t()
        to_mean = torch.cdist(members, members.mean(dim=0, keepdim=True), p=p).squeeze(1)
        chosen = (expert.neurons == plan.router_neurons[e]).nonzero().item()
        assert to_mean[chosen].item() == pytest.approx(to_mean.min().item(), rel=1e-9)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("profile", ["cosine", "raw"])
def test_scores_are_the_representatives_activations(profile, signed, planted):
    x, gate, up, down = planted(300, dtype=torch.float64).weights()
    options = CarveOptions(2, 3, 8, profile=profile, signed=signed, **PUBLISHED)
    plan = carve_block(x, gate, up, down, options).plan
    rows, other = gate[plan.router_neurons], up[plan.router_neurons]
    if profile == "cosine":  # of the weights only: the code gives its router the inputs as they are
        rows, other = (t / t.square().sum(1, keepdim=True).sqrt() for t in (rows, other))
    score = F.silu(x @ rows.t()) * (x @ other.t())
    torch.testing.assert_close(plan.logits(x), score if signed else score.abs())
    chosen = plan.weights(x)
    assert set(chosen.unique().tolist()) == {0.0, 1.0}
    best = (score if signed else score.abs()).topk(3, dim=1).indices
    torch.testing.assert_close(chosen.gather(1, best), torch.ones(300, 3).double())


def test_the_published_representative_is_nearly_dead_and_its_router_nearly_blind(planted):
    """The cause of CMoE's routing at chance; active neurons route better, ridge far better."""
    weights = planted().weights()
    options = {**PUBLISHED, "held_out": 0.1}
    published = carve_block(*weights, CarveOptions(3, 3, 8, **options)).figures
    assert published["representative_rate"] < 0.5 * published["median_rate"]
    assert published["overlap"] < published["chance_overlap"] + 0.15
    active = carve_block(
        *weights,
        CarveOptions(3, 3, 8, profile="raw", representative="most_active", **options),
    ).figures
    assert active["representative_rate"] > 1.5 * active["median_rate"]
    assert active["error"] < 0.8 * published["error"]
    ridge = carve_block(*weights, CarveOptions(3, 3, 8, **{**options, "router": "ridge"})).figures
    assert ridge["overlap"] > published["overlap"] + 0.15
    assert ridge["error"] < published["error"]


def test_plain_blocks_have_a_router_of_one_matrix(planted):
    x, _, up, down = planted(400, gated=False, dtype=torch.float64).weights()
    bias = torch.randn(240, dtype=torch.float64)
    for profile in ("raw", "cosine"):
        options = CarveOptions(1, 2, 8, profile=profile, **PUBLISHED)
        plan = carve_block(x, None, up, down, options, F.gelu, bias).plan
        assert plan.router_up is None
        rows = up[plan.router_neurons]
        before = x @ rows.t() + bias[plan.router_neurons]
        if profile == "cosine":
            before = x @ F.normalize(rows, dim=1).t()
        torch.testing.assert_close(plan.logits(x, F.gelu), F.gelu(before).abs())


def test_gate_mean_is_the_mean_of_the_experts_gates(planted):
    x, gate, up, down = planted(300, dtype=torch.float64).weights()
    plan = carve_block(x, gate, up, down, CarveOptions(2, 2, 8, router="gate_mean")).plan
    means = torch.stack([gate[e.neurons].mean(dim=0) for e in plan.experts])
    expected = (x @ means.t()).argsort(dim=1, descending=True)[:, :2].sort(dim=1).values
    found = plan.weights(x).nonzero()[:, 1].view(-1, 2)
    assert torch.equal(found, expected)


def test_prior_approximate_loss_is_the_divergence_and_reaches_the_router():
    errors = torch.rand(50, 4, dtype=torch.float64)
    labels = pseudo_labels(errors, 2)
    hard = torch.zeros_like(errors).scatter_(1, errors.topk(2, largest=False).indices, 1.0)
    torch.testing.assert_close(labels, hard.softmax(dim=1))
    logits = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    loss = prior_approximate_loss(logits, labels)
    p = logits.softmax(dim=1)
    expected = (p * (p / labels).log()).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad.abs().sum(dim=1) > 0).all()
    assert prior_approximate_loss(labels.log(), labels).item() == pytest.approx(0.0, abs=1e-12)


def test_prior_approximate_training_learns_the_labels():
    x = torch.randn(1000, 8, dtype=torch.float64) * 3 + 1
    errors = -(x @ torch.randn(8, 5, dtype=torch.float64))
    labels = pseudo_labels(errors, 2)
    losses = []
    for steps in (0, 20, 200):
        weight, bias = fit_prior_approximate(x, errors, active=2, seed=0, steps=steps)
        losses.append(prior_approximate_loss(x @ weight.t() + bias, labels).item())
    assert losses[2] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)
    chosen = (x @ weight.t() + bias).topk(2, dim=1).indices
    best = errors.topk(2, dim=1, largest=False).indices
    common = (chosen.unsqueeze(2) == best.unsqueeze(1)).sum() / best.numel()
    assert common > 0.85  # 0.4 by chance


def test_factor_llm_routes_well_to_most_experts_and_badly_to_few(planted):
    """Its label asks for an answer near K/N of the teacher's; below 1/2, that is rather none."""
    weights = planted(tokens=1000).weights()
    most = CarveOptions(3, 3, 8, router="prior_approximate", refit=False)
    figures = carve_block(*weights, most).figures
    assert figures["overlap"] > figures["chance_overlap"] + 0.15
    few = CarveOptions(2, 2, 16, router="prior_approximate", refit=False)
    assert carve_block(*weights, few).figures["overlap"] < 0.2
    whole = CarveOptions(2, 2, 16, router="prior_approximate", refit=False, teacher_share=1.0)
    assert carve_block(*weights, whole).figures["overlap"] > 0.6


def test_factor_llm_cuts_contiguous_slices(planted):
    options = CarveOptions(
        0, 2, 4, split="contiguous", router="prior_approximate", refit=False, output_scale=2.0
    )
    plan = carve_block(*planted(300).weights(), options).plan
    slices = torch.arange(240).view(4, 60)
    assert all(torch.equal(e.neurons, s) for e, s in zip(plan.experts, slices, strict=True))
    assert {e.out_scale for e in plan.experts} == {2.0}
