"""What calibration decides: strengths on held-out tokens, targets, tokens that are set apart."""

import pytest
import torch
import torch.nn.functional as F

from moezoo import InputError
from moezoo.convert import CarveOptions, carve_block, carved_layer, prune_block
from moezoo.convert.carve.refit import STRENGTHS, Missing, fit_change

FINE = CarveOptions(4, 2, 12, router="ridge_shared", router_ridge=None, refit_ridge=None)


def drawn(tokens, width=9, d=4):
    return Missing(
        torch.randn(tokens, width, dtype=torch.float64),
        torch.randn(tokens, d, dtype=torch.float64),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_change_solves_the_normal_equations(bias, scaled):
    fitted, held_out = drawn(70), drawn(20)
    strengths = (0.3, 0.3) if scaled else (0.3,)
    fitted.counted[:, 3] *= 50.0
    change = fit_change(iter([fitted]), strengths, bias, held_out if scaled else None)
    counted, residual = fitted.counted, fitted.residual
    if bias:
        mean = residual.mean(0) - counted.mean(0) @ change.weight.t()
        torch.testing.assert_close(change.constant, mean)
        counted, residual = counted - counted.mean(0), residual - residual.mean(0)
    gram = counted.t() @ counted
    penalty = gram.diagonal() if scaled else gram.diagonal().mean().expand(len(gram))
    expected = torch.linalg.solve(gram + 0.3 * torch.diag(penalty), counted.t() @ residual)
    torch.testing.assert_close(change.weight, expected.t(), rtol=1e-9, atol=1e-12)


def test_held_out_tokens_choose_the_strength():
    truth = torch.randn(4, 9, dtype=torch.float64)
    many = drawn(400)
    clean = Missing(many.counted, many.counted @ truth.t())
    noise = drawn(12)
    assert fit_change(iter([clean]), STRENGTHS, False, clean).strength == min(STRENGTHS)
    assert fit_change(iter([noise]), STRENGTHS, False, drawn(200)).strength == max(STRENGTHS)


@pytest.mark.parametrize("bias", [False, True])
def test_exact_tokens_lack_nothing_and_others_move_least(bias):
    fitted, exact = drawn(70), drawn(2)
    exact = Missing(torch.cat([exact.counted] * 2), torch.cat([exact.residual / 2] * 2))  # alike
    change = fit_change(iter([fitted]), (0.2,), bias, exact=exact)
    assert exact.error(change.weight, change.constant) < 1e-6
    free = fit_change(iter([fitted]), (0.2,), bias)
    centred = fitted.counted - fitted.counted.mean(0) * bias
    gram = centred.t() @ centred
    gram += 0.2 * gram.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    # Least in the metric of the ridge: gram times the difference lies in the exact tokens' span.
    moved = (change.weight - free.weight) @ gram
    span = exact.counted[:2]
    inside = moved @ torch.linalg.pinv(span) @ span
    torch.testing.assert_close(inside, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strengths", [(0.2,), STRENGTHS])
def test_exact_tokens_at_which_hardly_anything_counts_do_not_ruin_others(strengths):
    # Behind a layer that puts out thousands, they miss what no change could make up for.
    fitted, held_out, exact = drawn(70), drawn(30), drawn(3)
    exact = Missing(exact.counted * 1e-2, exact.residual * 30.0)
    change = fit_change(iter([fitted]), strengths, True, held_out, exact)
    free = fit_change(iter([fitted]), strengths, True, held_out)
    moved = ((change.weight - free.weight) @ fitted.counted.t()).square().sum()
    assert 0.0 < moved < 0.3 * fitted.residual.square().sum()
    assert held_out.error(change.weight, change.constant) < 1.5 * float(held_out.residual.norm())


def test_tokens_apart_decide_nothing_and_keep_their_output(planted):
    x, gate, up, down = planted(600, dtype=torch.float64).weights()
    apart = torch.zeros(600, dtype=torch.bool)
    apart[::60] = True
    rest = carve_block(x[~apart], gate, up, down, FINE)
    x = x.clone()
    x[apart] = 4.0 * x[0]
    found = carve_block(x, gate, up, down, FINE, apart=apart)
    wanted = (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    output = found.plan.run(x, gate, up, down)
    assert (output - wanted)[apart].norm() < 1e-6 * wanted[apart].norm()
    assert (output - wanted)[~apart].norm() > 1e-3 * wanted[~apart].norm()
    # Its neurons come first, the largest of them if there is no room for all.
    size = down.norm(dim=0) * (F.silu(x[:1] @ gate.t()) * (x[:1] @ up.t())).abs()[0]
    needed = int((size > wanted[~apart][:540].norm(dim=1).mean()).sum())
    first = set(size.argsort(descending=True)[: min(needed, 80)].tolist())
    shared = set(found.plan.shared.neurons.tolist())
    assert needed > 0
    assert first <= shared
    assert not first <= set(rest.plan.shared.neurons.tolist())
    assert found.figures["held_out_tokens"] == rest.figures["held_out_tokens"]


def test_a_target_is_aimed_at(planted):
    x, gate, up, down = planted(900, dtype=torch.float64).weights()
    wanted = (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    target = wanted + 0.3 * x @ torch.randn(48, 48, dtype=torch.float64) / 7
    for router in ("ridge", "ridge_shared"):
        options = CarveOptions(4, 4, 12, router=router, refit_ridge=None)
        plain = carve_block(x, gate, up, down, options).plan
        aimed = carve_block(x, gate, up, down, options, target=target)
        off = [(p.run(x, gate, up, down) - target).norm() for p in (plain, aimed.plan)]
        assert off[1] < 0.9 * off[0]
        assert aimed.figures["refit_ridge"] in STRENGTHS
    small = [
        prune_block(x, gate, up, down, 160, "eliminated", refit_ridge=None, target=t).run(x)
        for t in (None, target)
    ]
    assert (small[1] - target).norm() < 0.97 * (small[0] - target).norm()


@pytest.mark.parametrize("gated", [True, False])
def test_the_router_reads_shared_neurons(gated, planted):
    x, gate, up, down = planted(500, gated, torch.float64).weights()
    bias = None if gated else torch.randn(240, dtype=torch.float64)
    act = F.silu if gated else F.gelu
    plan = carve_block(x, gate, up, down, FINE, act, bias).plan
    neurons = plan.shared.neurons
    inner = x @ up[neurons].t() + (0 if bias is None else bias[neurons])
    inner = act(x @ gate[neurons].t()) * inner if gated else act(inner)
    logits = torch.cat([x, inner.abs()], 1) @ plan.router.t() + plan.router_bias
    chosen = logits.topk(2, dim=1).indices.sort().values
    seen = plan.router_input(x, gate, up, act, bias)
    found = plan.weights(seen, act).nonzero()[:, 1].view(-1, 2)
    assert torch.equal(found, chosen)
    layer = carved_layer(plan, gate, up, down, "silu" if gated else "gelu", bias)
    expected = plan.run(x, gate, up, down, act, bias)
    torch.testing.assert_close(layer.eval()(x).hidden, expected, rtol=1e-11, atol=1e-11)


def test_reading_shared_neurons_helps_where_they_tell(planted):
    weights = planted(2000).weights()
    overlap = {
        router: carve_block(*weights, CarveOptions(6, 2, 20, router=router)).figures["overlap"]
        for router in ("ridge", "ridge_shared")
    }
    assert overlap["ridge_shared"] > overlap["ridge"]


def test_mistakes_name_the_field(planted):
    x, gate, up, down = planted(100).weights()
    for message, arguments in {
        r"target: shape \(99, 48\) is not \(100, 48\)": {"target": x[1:]},
        "apart: give a bool for each of the 100 tokens": {"apart": torch.zeros(99).bool()},
        "apart: it leaves no token to fit to": {"apart": torch.ones(100).bool()},
    }.items():
        with pytest.raises(InputError, match=message):
            carve_block(x, gate, up, down, CarveOptions(2, 2, 8), **arguments)
    for name in ("router_ridge", "refit_ridge"):
        with pytest.raises(InputError, match=f"{name}: is chosen on held-out tokens"):
            CarveOptions(2, 2, 8, **{name: None}, held_out=0.0).check(240)
