"""ReMoE: experts of a positive score run, and a coefficient makes them as many as asked for."""

import copy

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo import BalanceOptions, CapacityOptions, InputError, RouterOptions, SparseMoE

D, EXPERTS, TOP_K = 12, 8, 2
OPTIONS = RouterOptions(score="relu", normalize=False)


def layer(options: RouterOptions = OPTIONS, sparsity: float = 1e-8, **arguments) -> SparseMoE:
    torch.manual_seed(0)
    arguments = {"num_experts": EXPERTS, "top_k": TOP_K, "d_expert": 4, **arguments}
    balance = BalanceOptions(load_balancing=0.0, sparsity=sparsity)
    return SparseMoE(D, router=options, balance=balance, **arguments).double()


def tokens(count: int = 63, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, dtype=torch.float64, generator=generator)


def moved(module: SparseMoE, *parts: Tensor) -> Tensor:
    for part in parts:
        module.observe(module(part).stats)
    module.step()
    return module.gate.sparsity_weight.clone()


def test_half_of_the_experts_run_at_first_and_tell_it():
    module = layer()
    routing = module.route(tokens(1000))
    taken = int((routing.indices >= 0).sum())
    assert taken == routing.max_assignments
    assert taken / 1000 == pytest.approx(EXPERTS / 2, rel=0.1)
    assert bool(((routing.weights > 0) == (routing.indices >= 0)).all())


def test_the_coefficient_grows_while_too_many_run_and_shrinks_after():
    module = layer(sparsity=1e-3)
    first = moved(module, tokens())
    torch.testing.assert_close(first, torch.tensor([1.2e-3]))
    torch.testing.assert_close(moved(module, tokens()), torch.tensor([1.44e-3]))
    with torch.no_grad():
        module.gate.weight.zero_()  # no expert runs
    torch.testing.assert_close(moved(module, tokens()), torch.tensor([1.2e-3]))
    module.discard()
    module.step()  # nothing was observed
    torch.testing.assert_close(module.gate.sparsity_weight, torch.tensor([1.2e-3]))


def test_exactly_as_many_as_asked_for_leave_it():
    module = layer(top_k=4)
    module.observe({"expert_counts": torch.full((8,), 5), "tokens": torch.tensor(10)})
    module.step()
    assert module.gate.sparsity_weight == torch.tensor(1e-8)


def test_training_by_the_loss_alone_arrives_at_top_k():
    module = layer(sparsity=1e-3)
    optimizer = torch.optim.Adam(module.gate.parameters(), lr=3e-3)
    means = []
    for seed in range(250):
        hidden = tokens(200, seed)
        # Without a part in common half of all scores are positive, whatever the weights.
        hidden[:, 0] = 2.0
        output = module(hidden)
        optimizer.zero_grad()
        output.losses["sparsity"].backward()
        optimizer.step()
        module.observe(output.stats)
        module.step()
        means.append(float(output.stats["expert_counts"].sum()) / 200)
    assert means[0] == pytest.approx(EXPERTS / 2, rel=0.3)
    assert min(means) <= TOP_K


def test_micro_batches_share_one_count():
    parts, whole = layer(sparsity=1.0), layer(sparsity=1.0)
    first, second = tokens(40), tokens(23, 2)
    parts.observe(parts(first).stats)
    loss = parts(second).losses["sparsity"]
    counts = sum(whole(part).stats["expert_counts"] for part in (first, second))
    gates = (second @ whole.gate.weight.detach().t()).clamp(min=0)
    expected = (counts * EXPERTS / (TOP_K * 63) * gates.mean(dim=0)).sum()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(moved(parts, second), moved(whole, first, second))


def pair(scope: str = "model") -> tuple[SparseMoE, SparseMoE]:
    """Return two layers of a model, of other sizes: 4 of 8 experts asked for, and 1 of 4."""
    balance = BalanceOptions(load_balancing=0.0, sparsity=1.0, sparsity_scope=scope)
    with moezoo.shared_values():
        sizes = ((EXPERTS, 4), (4, 1))
        return tuple(
            SparseMoE(D, num_experts=n, top_k=k, d_expert=4, router=OPTIONS, balance=balance)
            for n, k in sizes
        )


def seen(experts: int, ran: int, of_tokens: int = 10) -> dict[str, Tensor]:
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[0] = ran
    return {"expert_counts": counts, "tokens": torch.tensor(of_tokens)}


def coefficients(layers) -> list[float]:
    return [round(float(layer.gate.sparsity_weight), 6) for layer in layers]


@pytest.mark.parametrize(
    ("ran", "model", "layer"),
    [
        # Of 10 tokens, 40 and 10 were asked for: shares of 1/2 and 1/4.
        ((32, 20), 1.2, (1 / 1.2, 1.2)),  # -1 + 2.5
        ((16, 20), 1 / 1.2, (1 / 1.2, 1.2)),  # -3 + 2.5
        ((32, 14), 1.0, (1 / 1.2, 1.2)),  # -1 + 1: as many as asked for
    ],
)
def test_the_coefficient_of_a_model_follows_the_mean_share_of_its_layers(ran, model, layer):
    for scope, expected in (("model", (model, model)), ("layer", layer)):
        layers = pair(scope)
        for one, count in zip(layers, ran, strict=True):  # in two micro-batches
            one.observe(seen(one.num_experts, count - 1, 7))
        for one in layers:
            one.observe(seen(one.num_experts, 1, 3))
        for one in layers:
            one.step()
        assert coefficients(layers) == [round(value, 6) for value in expected]
        for one in layers:  # nothing was observed since
            one.step()
        assert coefficients(layers) == [round(value, 6) for value in expected]


def test_steps_of_a_model_follow_each_other_and_skipped_ones_leave_nothing():
    layers = pair()
    for ran in ((80, 0), (0, 0), (80, 0)):
        for one, count in zip(layers, ran, strict=True):
            one.observe(seen(one.num_experts, count))
        for one in layers:
            one.step()
    assert coefficients(layers) == [1.2, 1.2]
    for one in layers:
        one.observe(seen(one.num_experts, 0))
    for one in layers:
        one.discard()
    for one, count in zip(layers, (80, 0), strict=True):
        one.observe(seen(one.num_experts, count))
    for one in layers:
        one.step()
    assert coefficients(layers) == [1.44, 1.44]


def test_copies_of_a_model_share_among_themselves():
    layers = pair()
    copies = copy.deepcopy(layers)
    for one in copies:
        one.observe(seen(one.num_experts, 0))
    for one in (*copies, *layers):
        one.step()
    assert coefficients(copies) == [round(1 / 1.2, 6)] * 2
    assert coefficients(layers) == [1.0, 1.0]


def test_the_loss_of_a_model_is_the_mean_of_its_layers():
    torch.manual_seed(0)
    shared, apart = pair()[0].double(), pair("layer")[0].double()
    apart.load_state_dict(shared.state_dict())
    hidden = tokens()
    found, whole = (layer(hidden).losses["sparsity"] for layer in (shared, apart))
    torch.testing.assert_close(found, whole / 2)
    alone = BalanceOptions(load_balancing=0.0, sparsity=1.0, sparsity_scope="model")
    single = SparseMoE(D, num_experts=8, top_k=4, d_expert=4, router=OPTIONS, balance=alone)
    single.double().load_state_dict(shared.state_dict())
    torch.testing.assert_close(single(hidden).losses["sparsity"], whole)


def test_going_on_from_a_state_dict_changes_no_bit():
    module, again = layer(), layer()
    for seed in range(9):
        moved(module, tokens(seed=seed))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.gate.sparsity_weight, module.gate.sparsity_weight)
    assert torch.equal(moved(again, tokens()), moved(module, tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_coefficient_stays_fp32(dtype):
    module = layer().to(dtype)
    assert module.gate.sparsity_weight.dtype == torch.float32
    assert module.gate.sparsity_weight > 0  # 1e-8 is zero in fp16


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"normalize": True}, {}, "router.normalize: has no meaning in relu scores"),
        ({"noise": True}, {}, "router.noise: has no meaning in relu scores"),
        ({"selection_bias": True}, {}, "router.selection_bias: has no meaning in relu scores"),
        ({"num_groups": 2, "top_groups": 2}, {}, "router.num_groups: has no meaning in relu"),
        ({"choice": "threshold"}, {}, "router.score: relu has no meaning in threshold choice"),
        ({"choice": "expert"}, {}, "router.score: expert choice is defined with softmax"),
        ({}, {"capacity": CapacityOptions()}, "capacity: relu scores set .* set it to null"),
        ({}, {"num_identity_experts": 1}, "num_identity_experts: have no meaning in relu"),
    ],
)
def test_what_is_not_defined_is_refused(options, arguments, message):
    with pytest.raises(InputError, match=message):
        layer(RouterOptions(**{"score": "relu", "normalize": False, **options}), **arguments)


@pytest.mark.parametrize("field", ["sparsity", "sparsity_growth"])
def test_coefficients_out_of_range_are_refused(field):
    with pytest.raises(InputError, match=f"balance.{field}: "):
        SparseMoE(D, router=OPTIONS, balance=BalanceOptions(**{field: -1.0}))
