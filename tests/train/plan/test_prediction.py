"""The loss that laws expect of a planned run, and plans of models with masks."""

import json
from functools import partial

import pytest

from moezoo import DenseFFN, InputError
from moezoo.matrices import LowRank, Pruned
from moezoo_train.plan.command import Options, plan
from moezoo_train.plan.estimate import Planner
from moezoo_train.plan.laws import AverageLaw, MeanCount, Reach, SparseLaw, as_json
from moezoo_train.plan.machine import machine

AVERAGE = AverageLaw(E=1.6, A=300.0, alpha=0.33, B=500.0, beta=0.3)
SPARSE = SparseLaw(a_S=14.0, b_S=0.8, c_S=40.0, b_N=0.24, a_D=5e8, b_D=0.22, c=0.7)
PRUNED = partial(DenseFFN, d_ff=64, matrices=Pruned(sparsity=0.5, start=0.25, end=0.75))
TOKENS = 3 * 21 * 4  # of a step on four GPUs


@pytest.fixture
def laws(tmp_path):
    wide, narrow = (1e3, 1e9), (1e6, 1e9)
    both = [
        as_json(AVERAGE, Reach(wide, wide)),
        as_json(SPARSE, Reach(wide, narrow, (0.0, 0.9))),
    ]
    (tmp_path / "laws.json").write_text(json.dumps(both))
    return str(tmp_path / "laws.json")


def options(**changes):
    return Options(gpus=4, gpu="a100", layout="ddp", pictures=None, **changes)


def test_a_plan_says_the_losses_of_laws_each_with_its_own_count(make_setup, laws, capsys):
    setup = make_setup("dense", ffn=PRUNED)
    plan(setup, options(law=laws, json=True), steps=100)
    losses = json.loads(capsys.readouterr().out)["losses"]
    attention, ffn = 4 * (2 * 32 * 32 + 2 * 32 * 16), 4 * 3 * 32 * 64
    assert losses[0]["count"]["value"] == pytest.approx(attention + (1 - 0.3125) * ffn, rel=1e-4)
    assert losses[1]["count"]["value"] == attention + 0.5 * ffn
    count = MeanCount(losses[0]["count"]["value"])
    assert losses[0]["loss"] == AVERAGE.loss(count, 100 * TOKENS)
    assert [one["within"] for one in losses] == [True, False]
    plan(setup, options(law=laws), steps=100)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == (
        f"Loss by the average law: {losses[0]['loss']:.3f} (N 29.2 k mean over training, D 25.2 k)"
    )
    assert second.startswith(f"Loss by the sparse law: {losses[1]['loss']:.3f} (N 24.6 k left at")
    assert second.endswith("; beyond the runs that it was fitted to, a guess")


def test_what_no_law_can_say_is_refused(make_setup, laws, tmp_path, capsys):
    setup = make_setup("dense")
    with pytest.raises(InputError, match=r"law: a loss is that of so many tokens; give"):
        plan(setup, options(law=laws))
    with pytest.raises(InputError, match="law: layer 0 is a SparseMoE; these laws are of dense"):
        plan(make_setup("moe"), options(law=laws), steps=100)
    with pytest.raises(InputError, match=r"law: .*none.json cannot be read as laws; make it by"):
        plan(setup, options(law=str(tmp_path / "none.json")), steps=100)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match=r"law: .*empty.json holds no laws"):
        plan(setup, options(law=str(tmp_path / "empty.json")), steps=100)
    assert capsys.readouterr().out == ""


def test_zero_is_refused_where_fit_refuses_it(make_setup):
    planner = Planner(make_setup("dense", ffn=PRUNED), machine("a100"), cpu=True)
    for stage in ("zero1", "zero2", "zero3"):
        assert "ZeRO keeps weights where their masks are not" in (planner.refusal(stage, 4) or "")
    assert planner.refusal("fsdp2", 4) is None
    factored = make_setup("dense", ffn=partial(DenseFFN, matrices=LowRank(rank=4)))
    assert factored.zero_refused is None
