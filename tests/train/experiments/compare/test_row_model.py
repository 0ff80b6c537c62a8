"""Rows whose models differ in more than the feed-forward layer, at the FLOPs of whole blocks."""

from __future__ import annotations

import pytest

from moezoo import InputError
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.compare.curves import flops_per_token
from moezoo_train.experiments.compare.execution import build
from moezoo_train.experiments.compare.runs import Run, plan
from moezoo_train.experiments.compare.settings import Experiment, configuration, parse_methods
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig

UMOE = {
    "method": "mixtral",
    "model": {"attention_experts": {"top_k": 2, "rank": 4}},
    "arguments": {"num_experts": 4},
}


def experiment(rows: dict, **changes) -> Experiment:
    arguments = {
        "baseline": "dense_mlp",
        "layers": "all",
        "ablation": True,
        "seeds": (3,),
        "max_steps": 200,
        "tolerance": 0.05,
        "model": ModelOptions(d_model=64, num_layers=2, num_heads=2),
        "text": TextOptions(),
        "optimizer": OptimizerConfig(),
        "schedule": ScheduleConfig(),
        "precision": "32-true",
    }
    return Experiment(methods=parse_methods(rows), **(arguments | changes))


def flops_of_layers(run: Run) -> int:
    return next(build(run, 1024).model.model.blocks()).mlp.cost().flops_per_token


def test_whole_blocks_have_the_baselines_flops():
    rows = {
        "dense_mlp": {},
        "umoe": UMOE,
        "beside": {"method": "dense_glu", "model": {"parallel": "two_norms", "num_kv_heads": 1}},
    }
    planned = plan(experiment(rows))
    assert [(run.row, run.random) for run in planned] == [(row, False) for row in rows]
    whole, *others = (flops_per_token(run) for run in planned)
    assert others == [pytest.approx(whole, rel=0.01)] * 2
    assert [run.flops_ratio for run in planned] == [pytest.approx(1.0, rel=0.02)] * 3
    # The layers alone do not: they make up for what attention costs more or less.
    dense, *layers = (flops_of_layers(run) for run in planned)
    assert all(flops != pytest.approx(dense, rel=0.02) for flops in layers)


def test_a_runs_model_has_the_options_and_its_identity_them():
    baseline, run = plan(experiment({"dense_mlp": {}, "umoe": UMOE}))
    assert "row_model" not in baseline.identity({})
    assert run.identity({})["row_model"] == UMOE["model"]
    blocks = list(build(run, 1024).model.model.blocks())
    assert [block.self_attn.options.rank for block in blocks] == [4, 4]
    assert build(baseline, 1024).model.config.attention_experts is None
    written = configuration(experiment({"dense_mlp": {}, "umoe": UMOE}), "out")
    assert "attention_experts" in written
    assert "model: {}" not in written


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"model": {"paralel": 1}}, "model: 'paralel' is not known; did you mean 'parallel'"),
        ({"model": 3}, "model: is no mapping; write names"),
        ({"model": {"parallel": "three_norms"}}, "model.parallel: 'three_norms' is not known"),
        ({"model": {"attention_experts": {"k": 1}}}, "model.attention_experts: "),
        ({"model": {"attention_experts": {"top_k": 99}}}, "model.attention_experts.top_k: 99 is"),
        ({"model": {"qk_norm": True}, "layers": 1}, "model: is of all blocks, and layers chooses"),
        ({"model": {"qk_norm": True}, "ablation": True}, "ablation: it has no routing to make"),
        (
            {"model": {"qk_norm": True}, "method": "engram", "memory": True},
            "model: does not go with memory; leave out one of them",
        ),
        (
            {"model": {"attention_experts": {}}, "method": "dense_glu"},
            "model.attention_experts: no layer has experts to share",
        ),
    ],
)
def test_mistakes_are_named_by_row(row, message):
    with pytest.raises(InputError) as caught:
        plan(experiment({"mine": {"method": "mixtral"} | row}))
    assert str(caught.value).startswith(f"methods.mine.{message}")
    assert "\n" not in str(caught.value)
