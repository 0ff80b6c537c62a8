"""The formulas of exchanges: papers' totals, expert parallelism, padding."""

from dataclasses import replace

import pytest

from moezoo_train.plan.layouts import Collective, Plan
from moezoo_train.plan.trace import Trace


def test_what_rings_and_all_to_alls_send():
    def sent(kind: str, group: int) -> float:
        return Collective(kind, "", 120.0, group).sent

    assert sent("all_reduce", 4) == 2 * 90
    assert sent("all_gather", 4) == sent("reduce_scatter", 4) == sent("all_to_all", 4) == 90
    assert sent("broadcast", 4) == 120
    assert {kind: sent(kind, 1) for kind in ("all_reduce", "broadcast")} == {
        "all_reduce": 0,
        "broadcast": 0,
    }


def test_one_gpu_sends_nothing(make_setup):
    setup = make_setup("moe")
    assert Plan(setup, Trace(collectives={"all_reduce": 96.0}), "fsdp", gpus=1).collectives() == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_travel_four_times_and_twice_again_when_recomputed(checkpointing, make_setup):
    setup = make_setup("moe", "bf16-mixed", accumulation=2, activation_checkpointing=checkpointing)
    plan = Plan(setup, Trace(), "ep", gpus=6, expert_parallel=3)
    kinds = {(one.kind, one.what): one for one in plan.collectives()}
    tokens = kinds["all_to_all", "tokens"]
    exchanges = 6 if checkpointing else 4
    one_layer = 3 * 21 * 2 * 32 * 2  # tokens × top_k × d_model × bytes of bf16
    assert tokens.size == exchanges * 4 * one_layer * 2
    assert tokens.sent == pytest.approx(tokens.size * (1 - 1 / 3))
    assert tokens.group == 3
    experts = kinds["all_reduce", "experts' gradients"]
    assert (experts.group, experts.stride) == (2, 3)
    numbers = sum(p.numel() for p in setup.parameters)
    assert experts.size * 3 + kinds["all_reduce", "gradients"].size == 4 * numbers


def test_zero_exchanges_twice_or_three_times_the_parameters(make_setup):
    """Rajbhandari et al. 2020, section 7: 2 Psi for stages 1 and 2, 3 Psi for stage 3."""
    setup = make_setup("dense", "bf16-mixed")
    psi = 2 * sum(p.numel() for p in setup.parameters)
    for layout, times in {"zero1": 2, "zero2": 2, "zero3": 3}.items():
        plan = Plan(setup, Trace(), layout, gpus=1000)
        assert sum(one.size for one in plan.collectives()) == pytest.approx(times * psi, rel=0.02)
        accumulating = Plan(replace(setup, accumulation=4), Trace(), layout, gpus=1000)
        again = {"zero1": 2, "zero2": 5, "zero3": 12}[layout]
        total = sum(one.size for one in accumulating.collectives())
        assert total == pytest.approx(again * psi, rel=0.02)


def test_fsdp_pads_stacked_experts_to_the_number_of_gpus(make_setup):
    """Three experts on 8 GPUs are gathered as 8: a GPU's shard is whole rows."""
    setup = make_setup("moe")
    held = Plan(setup, Trace(), "fsdp", gpus=8).memory().parameters
    dense = sum(-(-len(p) // 8) * p[0].numel() for p in setup.parameters)
    assert held == 4 * dense + sum(b.nbytes for b in setup.buffers)
    experts = setup.model.model.layers[0].mlp.experts
    assert experts.num_experts == 3
    assert Plan(setup, Trace(), "fsdp", gpus=8)._local(experts.down_proj, True) == 24 * 32
