"""Experts whose number of tokens is rounded to a multiple while a layer trains."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moezoo import BalanceOptions, CapacityOptions, InputError, RouterOptions, SparseMoE
from moezoo.routing import LogitOptions, WeightOptions
from moezoo.routing.rounding import nearest_multiple

D, EXPERTS, TOP_K = 12, 7, 3
OPTIONS = RouterOptions(rounding=8)


def layer(options: RouterOptions = OPTIONS, **arguments) -> SparseMoE:
    torch.manual_seed(0)
    arguments = {"num_experts": EXPERTS, "top_k": TOP_K, "d_expert": 4, **arguments}
    made = SparseMoE(D, router=options, **arguments).double()
    with torch.no_grad():  # the first experts are more tokens' choice than the last
        made.gate.weight.normal_()
        made.gate.weight[:, 0] += torch.linspace(1, -1, made.num_experts)
    return made


def tokens(count: int = 63, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, D, dtype=torch.float64, generator=generator)
    hidden[:, 0] = hidden[:, 0].abs() + 0.5
    return hidden


def unrounded(module: SparseMoE, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return whom tokens choose, ``(T, E)`` bool."""
    indices = module.route(hidden, mask=mask, limited=False).indices
    there = torch.zeros(len(hidden), EXPERTS + 1, dtype=torch.bool)
    return there.scatter(1, indices + 1, True)[:, 1:]


def test_halves_are_rounded_to_the_even_multiple():
    counts = torch.arange(1000)
    for multiple in (1, 2, 6, 7, 128):
        expected = (torch.round(counts.double() / multiple) * multiple).long()
        assert torch.equal(nearest_multiple(counts, multiple), expected)
    assert nearest_multiple(torch.tensor([64, 192, 320]), 128).tolist() == [0, 256, 256]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("multiple", [2, 5, 8, 16])
def test_counts_are_the_nearest_multiples_within_the_bound(multiple, masked):
    module, hidden = layer(replace(OPTIONS, rounding=multiple)), tokens(200)
    mask = torch.rand(200, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    before = unrounded(module, hidden, mask)
    routing = module.route(hidden, mask=mask)
    after = routing.indices >= 0
    assert routing.indices.shape == routing.weights.shape == (200, EXPERTS)
    counts, wanted = after.sum(dim=0), before.sum(dim=0)
    assert not (counts % multiple).any()
    assert (2 * (counts - wanted).abs() <= multiple).all()
    assert (counts != wanted).any()
    for e in range(EXPERTS):  # it is either dropped or added
        assert not ((before & ~after)[:, e].any() and (after & ~before)[:, e].any())
    assert after.sum() <= routing.max_assignments <= 200 * TOP_K + EXPERTS * multiple // 2
    assert not after.logical_not().logical_and(routing.weights != 0).any()
    if mask is not None:
        assert not after[~mask].any()


def test_the_least_weights_go_and_the_best_scores_come():
    module, hidden = layer(replace(OPTIONS, scale=1.7)), tokens(200)
    scores = (hidden @ module.gate.weight.detach().t()).softmax(dim=-1)
    before = unrounded(module, hidden)
    routing = module.route(hidden)
    after, weights = routing.indices >= 0, routing.weights.detach()
    kept = 1.7 * scores / scores.masked_fill(~before, 0.0).sum(dim=-1, keepdim=True)
    expected = torch.where(before, kept, 1.7 * scores).masked_fill(~after, 0.0)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    assert (before & ~after).any()
    assert (after & ~before).any()
    for e in range(EXPERTS):
        lost, stayed = before[:, e] & ~after[:, e], before[:, e] & after[:, e]
        came, away = after[:, e] & ~before[:, e], ~after[:, e] & ~before[:, e]
        if lost.any():
            assert kept[lost, e].max() < kept[stayed, e].min()
        if came.any():
            assert scores[came, e].min() > scores[away, e].max()


def test_statistics_and_losses_are_of_the_choice_and_say_what_rounding_did():
    module, plain = layer(), layer(RouterOptions())
    found, expected = module(tokens(200)), plain(tokens(200))
    assert found.losses.keys() == expected.losses.keys()
    assert all(torch.equal(found.losses[n], expected.losses[n]) for n in found.losses)
    assert torch.equal(found.stats["expert_counts"], expected.stats["expert_counts"])
    before = unrounded(module, tokens(200))
    after = module.route(tokens(200)).indices >= 0
    assert found.stats["dropped"] == (before & ~after).sum() > 0
    assert found.stats["rounded_down"].item() == pytest.approx(
        (before & ~after).sum().item() / (200 * TOP_K)
    )
    assert found.stats["rounded_up"].item() == pytest.approx(
        (after & ~before).sum().item() / (200 * TOP_K)
    )
    assert found.stats["rounded_up"] > 0
    assert module(tokens(), mask=torch.zeros(63, dtype=torch.bool)).stats["rounded_up"] == 0


def test_evaluation_is_plain_top_k_bit_for_bit():
    module, plain = layer().eval(), layer(RouterOptions()).eval()
    assert torch.equal(module(tokens()).hidden, plain(tokens()).hidden)
    assert torch.equal(module.infer(tokens()), plain.infer(tokens()))
    found, expected = module.route(tokens()), plain.route(tokens())
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.weights, expected.weights)
    assert found.max_assignments == expected.max_assignments
    assert found.stats.keys() == expected.stats.keys()
    module.train()
    assert not torch.equal(module(tokens()).hidden, plain(tokens()).hidden)


def test_multiples_of_one_change_nothing():
    one, plain = layer(replace(OPTIONS, rounding=1)), layer(RouterOptions())
    torch.testing.assert_close(one(tokens()).hidden, plain(tokens()).hidden, rtol=1e-12, atol=0)
    assert one(tokens()).stats["dropped"] == one(tokens()).stats["rounded_up"] == 0


def test_an_expert_has_no_more_tokens_than_there_are():
    module = layer(replace(OPTIONS, rounding=50))
    with torch.no_grad():
        module.gate.weight[0, 0] += 50  # everyone's
    counts = (module.route(tokens()).indices >= 0).sum(dim=0)
    assert counts[0] == 50  # of 63
    module = layer(replace(OPTIONS, rounding=40), top_k=EXPERTS)
    assert (module.route(tokens()).indices >= 0).all()  # 63 would be rounded to 80
    mask = torch.arange(63) < 30
    counts = (module.route(tokens(), mask=mask).indices >= 0).sum(dim=0)
    assert (counts == 30).all()


def test_few_tokens_have_no_expert():
    """Nothing is nearer to a large multiple than zero."""
    output = layer(replace(OPTIONS, rounding=128))(tokens())
    assert not output.hidden.any()
    assert output.stats["rounded_down"] == 1


def test_a_layer_is_causal_where_it_does_not_round():
    module = layer(replace(OPTIONS, rounding=16))
    assert not module.causal
    assert module.eval().causal
    assert layer(RouterOptions()).causal
    hidden, other = tokens(), tokens()
    other[40:] = 3 * other[:23].flip(0)
    for training in (True, False):
        module.train(training)
        same = torch.allclose(module(hidden).hidden[:40], module(other).hidden[:40], rtol=1e-12)
        assert same == module.causal


def test_how_many_tokens_change_and_what_the_added_weigh():
    """The paper's ratio: four tiles per expert, eight experts per token."""
    torch.manual_seed(0)
    module = SparseMoE(
        32, num_experts=64, top_k=8, d_expert=4, router=replace(OPTIONS, rounding=128)
    )
    torch.nn.init.normal_(module.gate.weight, std=32**-0.5)
    hidden = torch.randn(4096, 32)
    routing = module.route(hidden)
    before = module.route(hidden, limited=False)
    own = torch.zeros(4096, 64, dtype=torch.bool).scatter(1, before.indices, True)
    after = routing.indices >= 0
    per_token = after.sum(dim=-1)
    assert not (after.sum(dim=0) % 128).any()
    assert 0.33 < (per_token != 8).float().mean() < 0.39
    assert 1 <= per_token.min() < 8 < per_token.max() <= 16
    weights = routing.weights.detach()
    kept, added = weights[own & after].mean(), weights[after & ~own].mean()
    assert kept == pytest.approx(1 / 8, rel=0.1)
    assert added == pytest.approx(0.033, rel=0.1)


def test_gradients_are_those_of_finite_differences():
    weights = WeightOptions(learned_scale=True, expert_scale=True)
    module = layer(replace(OPTIONS, weights=weights, logits=LogitOptions(bias=True)))
    hidden = tokens(40).requires_grad_()
    assert (module.route(hidden).indices >= 0).sum() != 40 * TOP_K
    names = ["gate.weight", "gate.bias", "gate.learned_scale", "gate.expert_scale"]
    values = [module.get_parameter(name).detach().requires_grad_() for name in names]

    def output(hidden: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, given, (hidden,)).hidden

    assert torch.autograd.gradcheck(output, (hidden, *values), eps=1e-7, atol=1e-6)


def test_16_bits_and_reruns():
    module, hidden = layer().to(torch.bfloat16), tokens().to(torch.bfloat16)
    first, second = module(hidden).hidden, module(hidden).hidden
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"rounding": -1}, {}, "router.rounding: "),
        ({"choice": "expert", "normalize": False}, {}, "router.rounding: .* in expert choice"),
        (
            {"choice": "threshold", "normalize": False},
            {},
            "router.rounding: has no meaning in threshold choice; set it to 0",
        ),
        ({"score": "relu", "normalize": False}, {}, "router.rounding: .* in relu scores"),
        (
            {"score": "sparse_mixer", "normalize": False},
            {},
            "router.rounding: has no meaning in sparse_mixer scores",
        ),
        ({"num_groups": 7, "top_groups": 7}, {}, "router.rounding: is not defined within groups"),
        (
            {"score": "sigmoid", "weights": WeightOptions(with_shared=True)},
            {"num_shared_experts": 1},
            "router.rounding: is not defined with weights.with_shared",
        ),
        (
            {"weights": WeightOptions(apply_to="input")},
            {},
            "router.rounding: weighs outputs alone; set it to 0, or weights.apply_to to output",
        ),
        ({}, {"capacity": CapacityOptions()}, "capacity: is not defined with router.rounding"),
        (
            {},
            {"num_identity_experts": 1},
            "router.rounding: is not defined with num_identity_experts",
        ),
    ],
)
def test_what_is_not_defined_is_refused(options, arguments, message):
    with pytest.raises(InputError, match=message):
        layer(replace(OPTIONS, **options), balance=BalanceOptions(0.0), **arguments)
