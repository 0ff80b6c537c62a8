"""Selection biases set by quantiles, and biases that are centred."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moezoo import BalanceOptions, InputError, RouterOptions, SparseMoE
from moezoo.routing.margins import NUM_BINS, bin_edges, margin_histogram, upper_quantile
from moezoo.routing.selection_bias import StepLoad, move_bias, selection_margins

sys.path.insert(0, str(Path(__file__).parent))

from plain.quantiles import quantile_bias
from plain.quantiles import upper_quantile as plain_quantile

D = 12
QUANTILE = RouterOptions(score="sigmoid", selection_bias=True, bias_rule="quantile")
NO_LOSS = BalanceOptions(load_balancing=0.0)


def layer(options: RouterOptions = QUANTILE, **arguments) -> SparseMoE:
    torch.manual_seed(0)
    arguments = {"num_experts": 7, "top_k": 3, "d_expert": 4, **arguments}
    made = SparseMoE(D, router=options, balance=NO_LOSS, **arguments).double()
    with torch.no_grad():  # the first experts are everyone's
        made.gate.weight.normal_()
        made.gate.weight[:, 0] += torch.linspace(2, -2, len(made.gate.weight))
    return made


def tokens(count: int = 63) -> Tensor:
    hidden = torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden[:, 0] = hidden[:, 0].abs() + 0.5
    return hidden


def step(bias_E: Tensor, scores_TE: Tensor, options: RouterOptions, top_k: int) -> float:
    """Move the bias by one step's scores; return MaxVio before that."""
    selection_TE = scores_TE + bias_E
    chosen = selection_TE.topk(top_k).indices
    counts_E = torch.bincount(chosen.flatten(), minlength=len(bias_E))
    load = StepLoad()
    margins_TE = selection_margins(selection_TE, top_k)
    load.add({"expert_counts": counts_E, "margins": margin_histogram(margins_TE, None)})
    move_bias(bias_E, load, options, top_k)
    return float(counts_E.max() / counts_E.double().mean() - 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_steps_balance_what_the_sign_rule_has_hardly_touched_after_a_hundred(seed):
    experts, top_k = 64, 4
    generator = torch.Generator().manual_seed(seed)
    means_E = 1.5 * torch.randn(experts, generator=generator)

    def draw() -> Tensor:
        return torch.randn(8192, experts, generator=generator) + means_E

    bias_E = torch.zeros(experts)
    violations = [step(bias_E, draw(), QUANTILE, top_k) for _ in range(4)]
    assert violations[0] > 10
    assert violations[1] < 1
    assert violations[2] < 0.4
    assert violations[3] < 0.3
    assert bias_E.mean().abs() < 1e-6

    bias_E = torch.zeros(experts)
    sign = RouterOptions(selection_bias=True)
    by_sign = [step(bias_E, draw(), sign, top_k) for _ in range(101)]
    assert by_sign[100] > 7
    assert by_sign[100] < by_sign[0]


@pytest.mark.parametrize("scale", [1e-3, 0.3, 20.0])
def test_the_histograms_quantile_is_within_a_bin_of_the_plain_one(scale):
    generator = torch.Generator().manual_seed(3)
    values_TE = scale * torch.randn(997, 5, generator=generator, dtype=torch.float64)
    low_H, high_H = bin_edges()
    for share in (0.05, 0.5, 0.95):
        found_E = upper_quantile(margin_histogram(values_TE, None), share)
        for e in range(5):
            exact = plain_quantile(values_TE[:, e].tolist(), share)
            bin_of = int((high_H < exact).sum())
            width = float(high_H[bin_of] - low_H[bin_of])
            assert abs(float(found_E[e]) - exact) <= 2 * width
            assert width <= abs(exact) / 15


def test_every_number_is_in_the_bin_whose_edges_hold_it():
    low_H, high_H = bin_edges()
    inner = torch.cat([low_H[1:511], low_H[513:1023]])
    for value in inner[::7].tolist():
        histogram = margin_histogram(torch.tensor([[value]]), None)
        place = int(histogram[0].nonzero())
        assert low_H[place] <= value <= high_H[place]
    assert bool((high_H[1:] >= high_H[:-1]).all())
    outside = margin_histogram(torch.tensor([[1e30], [-1e30], [0.0], [-0.0], [1e-30]]), None)
    assert outside[0, 0] == outside[0, NUM_BINS - 1] == 1
    assert outside[0, 511:513].sum() == 3
    assert bool((outside >= 0).all())


def moved(module: SparseMoE, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    module.observe(module(hidden, mask=mask).stats)
    module.step()
    return module.gate.selection_bias.clone()


@pytest.mark.parametrize("select_on", ["score", "logit"])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_the_bias_is_that_of_the_plain_reference(select_on, top_k):
    options = RouterOptions(
        score="sigmoid",
        normalize=top_k > 1,
        selection_bias=True,
        bias_rule="quantile",
        select_on=select_on,
    )
    module = layer(options, top_k=top_k)
    before = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.05, -0.1, 0.2])
    module.gate.selection_bias.copy_(before)
    hidden, mask = tokens(800), torch.rand(800, generator=torch.Generator().manual_seed(2)) < 0.7
    logits = (hidden @ module.gate.weight.detach().t())[mask]
    scores = logits if select_on == "logit" else 1 / (1 + (-logits).exp())
    expected = quantile_bias(list(scores), before.double(), top_k)
    found = moved(module, hidden, mask).double()
    # Bins are at most a sixteenth of how far a bias moves; each has one, and so has the mean.
    far = (expected - before.double()).abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(far) / 8)
    torch.testing.assert_close(found.mean(), torch.zeros((), dtype=torch.float64))
    assert far > 0.05


def test_repeated_on_one_batch_it_arrives_at_an_even_load():
    module, hidden = layer(), tokens(800)
    first = module(hidden).stats["expert_counts"].double()
    for _ in range(12):
        moved(module, hidden)
    last = module(hidden).stats["expert_counts"].double()
    assert first.max() / first.mean() > 1.7
    assert last.max() / last.mean() < 1.05


def test_micro_batches_add_up_and_a_skipped_step_leaves_nothing():
    whole, parts = layer(), layer()
    expected = moved(whole, tokens())
    parts.observe(parts(tokens()[:5]).stats)
    parts.discard()
    for part in tokens().split(17):
        parts.observe(parts(part).stats)
    parts.step()
    assert torch.equal(parts.gate.selection_bias, expected)
    parts.step()
    assert torch.equal(parts.gate.selection_bias, expected)


def test_going_on_from_a_state_dict_changes_no_bit():
    module = layer()
    for part in tokens(300).split(100):
        moved(module, part)
    again = layer()
    again.load_state_dict(module.state_dict())
    assert torch.equal(moved(again, tokens(50)), moved(module, tokens(50)))


def test_ties_all_experts_and_no_tokens():
    module = layer()
    with torch.no_grad():
        module.gate.weight.zero_()
    assert not moved(module, tokens()).any()  # all scores are equal: nothing to move
    module = layer(top_k=7)
    assert not moved(module, tokens()).any()
    module = layer()
    before = moved(module, tokens())
    nothing = moved(module, tokens(), torch.zeros(63, dtype=torch.bool))
    torch.testing.assert_close(nothing, before, rtol=0, atol=1e-7)


def test_an_expert_that_no_token_is_near_gets_its_share():
    module = layer()
    with torch.no_grad():
        module.gate.weight[-1, 0] -= 9.0
    hidden = tokens(700)
    for _ in range(12):
        moved(module, hidden)
    counts = module(hidden).stats["expert_counts"]
    assert counts.min() > 200  # of 300 each


def test_margins_are_part_of_the_statistics_only_where_a_rule_reads_them():
    module, hidden = layer(), tokens()
    assert module(hidden).stats["margins"].shape == (7, NUM_BINS)
    assert "margins" not in module.eval()(hidden).stats
    assert "margins" not in layer(RouterOptions(selection_bias=True))(hidden).stats


def test_a_reference_to_the_last_chosen_expert_in_place_of_the_next_is_noticed(monkeypatch):
    """Some public code has the k-th largest, not the (k+1)-th."""

    def kth(selection_TE: Tensor, top_k: int) -> Tensor:
        return selection_TE - selection_TE.topk(top_k).values[:, -1:]

    expected = moved(layer(top_k=1, options=ONE), tokens(800))
    monkeypatch.setattr("moezoo.routing.router.selection_margins", kth)
    assert (moved(layer(top_k=1, options=ONE), tokens(800)) - expected).abs().max() > 0.02


ONE = RouterOptions(score="sigmoid", normalize=False, selection_bias=True, bias_rule="quantile")


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"bias_rule": "median"}, {}, r"router.bias_rule: .*sign"),
        ({"bias_rule": "quantile"}, {}, "router.bias_rule: there is no selection bias; set"),
        ({"bias_recentre": True}, {}, "router.bias_recentre: there is no selection bias; set"),
        (
            {"bias_rule": "quantile", "selection_bias": True, "num_groups": 2},
            {"num_experts": 8},
            "router.bias_rule: quantile is not defined within groups; set num_groups to 1",
        ),
        (
            {"bias_rule": "quantile", "selection_bias": True},
            {"num_identity_experts": 2},
            "router.bias_rule: LongCat's rule moves the bias .* leave it out",
        ),
        (
            {"bias_recentre": True, "selection_bias": True},
            {"num_identity_experts": 2},
            "router.bias_recentre: LongCat's rule moves the bias .* leave it out",
        ),
    ],
)
def test_what_is_not_defined_is_refused(options, arguments, message):
    with pytest.raises(InputError, match=message):
        layer(RouterOptions(score="sigmoid", **options), **arguments)


def test_a_centred_bias_chooses_the_same_and_does_not_drift():
    drifting = layer(RouterOptions(score="sigmoid", selection_bias=True, bias_update_rate=0.05))
    centred = layer(
        RouterOptions(
            score="sigmoid", selection_bias=True, bias_update_rate=0.05, bias_recentre=True
        )
    )
    means = []
    for part in tokens(630).split(63):
        one, two = drifting(part), centred(part)
        assert torch.equal(one.stats["expert_counts"], two.stats["expert_counts"])
        drifting.observe(one.stats)
        centred.observe(two.stats)
        drifting.step()
        centred.step()
        means.append(float(centred.gate.selection_bias.mean()))
    assert max(map(abs, means)) < 1e-7
    assert drifting.gate.selection_bias.mean().abs() > 0.01
    offset = drifting.gate.selection_bias - centred.gate.selection_bias
    torch.testing.assert_close(offset, offset.mean().expand(7))
