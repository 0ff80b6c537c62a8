"""The formulas of exchanges: papers' totals, shared experts, replicas, padding."""

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
    assert Plan(setup, Trace(collectives={"all_reduce": 96.0}), "fsdp2", gpus=1).collectives() == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_travel_four_times_and_twice_again_when_recomputed(checkpointing, make_setup):
    setup = make_setup("moe", "bf16-mixed", accumulation=2, activation_checkpointing=checkpointing)
    plan = Plan(setup, Trace(), "fsdp2", gpus=6, expert_parallel=3)
    kinds = {(one.kind, one.what): one for one in plan.collectives()}
    tokens = kinds["all_to_all", "tokens"]
    exchanges = 6 if checkpointing else 4
    one_layer = 3 * 21 * 2 * 32 * 2  # tokens × top_k × d_model × bytes of bf16
    assert tokens.size == exchanges * 4 * one_layer * 2
    assert tokens.sent == pytest.approx(tokens.size * (1 - 1 / 3))
    assert tokens.group == 3
    experts = kinds["reduce_scatter", "experts' gradients"]
    assert (experts.group, experts.stride) == (2, 3)
    one_expert = 4 * 3 * 24 * 32  # of four layers
    assert experts.size == 2 * 4 * one_expert  # micro-batches × bytes of fp32
    assert kinds["all_gather", "experts' parameters"].size == 2 * experts.size


def test_zero_exchanges_twice_or_three_times_the_parameters(make_setup):
    """Rajbhandari et al. 2020, section 7: 2 Psi for stages 1 and 2, 3 Psi for stage 3."""
    setup = make_setup("dense", "bf16-mixed")
    psi = 4 * setup.size
    for layout, times in {"zero1": 2, "zero2": 2, "zero3": 3}.items():
        plan = Plan(setup, Trace(), layout, gpus=1000)
        assert sum(one.size for one in plan.collectives()) == pytest.approx(times * psi, rel=0.02)
        accumulating = Plan(replace(setup, accumulation=4), Trace(), layout, gpus=1000)
        again = {"zero1": 2, "zero2": 5, "zero3": 12}[layout]
        total = sum(one.size for one in accumulating.collectives())
        assert total == pytest.approx(again * psi, rel=0.02)


def test_experts_are_cut_by_rows_where_gpus_do_not_divide_them(make_setup):
    """Three experts of 48 and of 32 rows; where neither can be cut evenly, they are padded."""
    setup = make_setup("moe")
    one_expert = 3 * 24 * 32
    for gpus, held, padding in [
        (3, one_expert, []),  # whole experts
        (8, 3 * one_expert // 8, []),  # rows
        (16, 3 * one_expert // 16, []),
        (5, one_expert, ["3 experts as 5"]),
        (24, 3 * 48 * 32 // 24 + 24 * 32, ["3 experts as 24"]),  # 24 does not divide 32 rows
    ]:
        plan = Plan(setup, Trace(), "fsdp2", gpus=gpus)
        experts = setup.model.model.layers[0].mlp.experts.parameters()
        assert sum(plan._local(p, True) for p in experts) == held
        assert plan.padding == padding
    shared = Plan(setup, Trace(), "fsdp2", gpus=15, expert_parallel=3)
    assert shared.padding == ["1 experts as 5"]
    assert Plan(setup, Trace(), "zero3", gpus=5).padding == []


def test_replicas_sum_what_their_shards_have(make_setup):
    setup = make_setup("moe", accumulation=2)
    found = Plan(setup, Trace(), "fsdp2", gpus=8, replicas=4).collectives()
    by_kind = {one.kind: one for one in found}
    assert (by_kind["all_gather"].group, by_kind["all_gather"].stride) == (2, 1)
    summed = by_kind["all_reduce"]
    assert (summed.group, summed.stride) == (4, 2)
    assert summed.size == by_kind["reduce_scatter"].size / 2
