"""Experts that take the tokens above a threshold, which follows the scores of earlier steps."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moezoo import BalanceOptions, CapacityOptions, InputError, RouterOptions, SparseMoE
from moezoo.routing import ragged

sys.path.insert(0, str(Path(__file__).parent))

from plain.quantiles import upper_quantile

D, EXPERTS, TOP_K = 12, 7, 3
OPTIONS = RouterOptions(choice="threshold", score="sigmoid", normalize=False)


def layer(options: RouterOptions = OPTIONS, **arguments) -> SparseMoE:
    torch.manual_seed(0)
    arguments = {"num_experts": EXPERTS, "top_k": TOP_K, "d_expert": 4, **arguments}
    balance = BalanceOptions(load_balancing=0.0)
    made = SparseMoE(D, router=options, balance=balance, **arguments).double()
    with torch.no_grad():  # the first experts are everyone's
        made.gate.weight.normal_()
        made.gate.weight[:, 0] += torch.linspace(2, -2, EXPERTS)
    return made


def tokens(count: int = 63, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, D, dtype=torch.float64, generator=generator)
    hidden[:, 0] = hidden[:, 0].abs() + 0.5
    return hidden


def scores(module: SparseMoE, hidden: Tensor) -> Tensor:
    return (hidden @ module.gate.weight.detach().t()).sigmoid()


def moved(module: SparseMoE, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    module.observe(module(hidden, mask=mask).stats)
    module.step()
    return module.gate.threshold.clone()


def test_thresholds_are_the_moving_average_of_the_plain_quantiles():
    module = layer()
    expected = torch.full((EXPERTS,), -1.0, dtype=torch.float64)
    for seed in range(4):
        hidden = tokens(500, seed)
        mask = torch.rand(500, generator=torch.Generator().manual_seed(seed)) < 0.7
        found = moved(module, hidden, mask)
        for e in range(EXPERTS):
            seen = scores(module, hidden[mask])[:, e].tolist()
            quantile = upper_quantile(seen, TOP_K / EXPERTS)
            expected[e] = quantile if seed == 0 else 0.9 * expected[e] + 0.1 * quantile
        assert found.dtype == torch.float32
        # The first step's bins are a sixteenth of the score wide, later ones of the distance.
        torch.testing.assert_close(found.double(), expected, rtol=1 / 16, atol=1e-3)


def test_the_load_becomes_even_and_tokens_differ_in_how_many_take_them():
    module = layer()
    cold = module(tokens(2000)).stats["expert_counts"].double()
    for seed in range(40):
        moved(module, tokens(2000, seed))
    module.eval()
    found = module(tokens(2000, 99))
    counts = found.stats["expert_counts"].double()
    assert cold.max() / cold.mean() > 1.7
    assert counts.max() / counts.mean() < 1.1
    assert counts.mean() == pytest.approx(2000 * TOP_K / EXPERTS, rel=0.05)
    routing = module.route(tokens(2000, 99))
    per_token = (routing.indices >= 0).sum(dim=-1)
    assert len(per_token.unique()) > 4
    assert found.stats["without_expert"] == (per_token == 0).float().mean()
    assert routing.max_assignments == per_token.sum()


def test_cold_experts_take_the_tokens_that_would_choose_them():
    module = layer().eval()
    assert (module.gate.threshold == ragged.COLD).all()
    routing = module.route(tokens())
    best = scores(module, tokens()).topk(TOP_K).indices.sort().values
    chosen = [row[row >= 0].tolist() for row in routing.indices]
    assert chosen == best.tolist()
    assert module(tokens()).stats["without_expert"] == 0


def test_evaluation_goes_by_the_stored_threshold_alone():
    module = layer()
    moved(module, tokens(500))
    module.eval()
    together = module(tokens().reshape(3, 21, D)).hidden.reshape(63, D)
    alone = torch.stack([module.infer(token.unsqueeze(0))[0] for token in tokens()])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    before = module.gate.threshold.clone()
    module.step()
    assert torch.equal(module.gate.threshold, before)


def test_micro_batches_add_up_and_a_skipped_step_leaves_nothing():
    whole, parts = layer(), layer()
    expected = moved(whole, tokens())
    parts.observe(parts(tokens()[:5]).stats)
    parts.discard()
    for part in tokens().split(17):
        parts.observe(parts(part).stats)
    parts.step()
    assert torch.equal(parts.gate.threshold, expected)


def test_going_on_from_a_state_dict_changes_no_bit():
    module, again = layer(), layer()
    moved(module, tokens())
    moved(module, tokens(seed=2))
    assert "gate.threshold" in module.state_dict()
    again.load_state_dict(module.state_dict())
    assert torch.equal(moved(again, tokens(seed=3)), moved(module, tokens(seed=3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_stay_fp32_in_16_bits(dtype):
    module = layer()
    expected = moved(module, tokens())
    assert torch.equal(module.to(dtype).gate.threshold, expected)
    module.gate.threshold = expected.to(dtype)
    module.step()
    assert module.gate.threshold.dtype == torch.float32


def test_no_token_and_all_experts():
    module = layer()
    nothing = moved(module, tokens(), torch.zeros(63, dtype=torch.bool))
    assert (nothing == ragged.COLD).all()
    module = layer(top_k=EXPERTS)
    assert not moved(module, tokens()).any()
    assert (module.route(tokens()).indices >= 0).all()


def test_equal_scores_are_above_no_threshold_of_theirs():
    module = layer()
    with torch.no_grad():
        module.gate.weight.zero_()
        moved(module, tokens())
        module.gate.threshold.fill_(0.5)
    assert (module.route(tokens()).indices == -1).all()
    found = module(tokens())
    assert found.stats["without_expert"] == 1
    assert not found.hidden.any()


def test_without_a_threshold_of_their_own_experts_are_noticed(monkeypatch):
    """A threshold that is taken over all experts together gives the first ones everything."""
    module = layer()
    moved(module, tokens(500))
    right = module.route(tokens()).indices
    module.gate.threshold.fill_(float(module.gate.threshold.mean()))
    assert not torch.equal(module.route(tokens()).indices, right)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"normalize": True}, {}, "router.normalize: has no meaning in threshold choice"),
        ({"noise": True}, {}, "router.noise: has no meaning in threshold choice"),
        ({"selection_bias": True}, {}, "router.selection_bias: has no meaning in threshold"),
        (
            {"num_groups": 7, "top_groups": 7},
            {},
            "router.num_groups: has no meaning in threshold choice",
        ),
        ({"select_on": "logit"}, {}, "router.select_on: in threshold choice"),
        ({"score": "sparse_mixer"}, {}, "router.score: sparse_mixer has no meaning"),
        ({"score": "sigmoid", "expert_dropout": 0.1}, {}, "router.expert_dropout: has no meaning"),
        ({"threshold_decay": 1.5}, {}, "router.threshold_decay: "),
        ({}, {"capacity": CapacityOptions()}, "capacity: threshold choice sets .* set it to null"),
        (
            {},
            {"num_identity_experts": 1},
            "num_identity_experts: have no meaning in threshold choice",
        ),
    ],
)
def test_what_is_not_defined_is_refused(options, arguments, message):
    router = RouterOptions(**{"choice": "threshold", "normalize": False, **options})
    with pytest.raises(InputError, match=message):
        layer(router, **arguments)
