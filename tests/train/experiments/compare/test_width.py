"""Widths are solved so that every method's active FLOPs are the baseline's."""

from pathlib import Path

import pytest
import yaml

import moezoo
from moezoo import InputError
from moezoo.command.parser import function_parser
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.compare import compare
from moezoo_train.experiments.compare.curves import flops_per_token
from moezoo_train.experiments.compare.runs import plan
from moezoo_train.experiments.compare.settings import Experiment, feed_forward_methods, find_method
from moezoo_train.experiments.compare.settings import parse_methods as parse
from moezoo_train.experiments.compare.width import WIDTHS, match_flops
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.presets import FOLDER

CONFIGS = sorted((Path(__file__).parents[4] / "configs/experiments/compare").glob("*.yaml"))
TARGET = 4 * 128 * 512


def experiment_of(path: Path) -> Experiment:
    parser = function_parser(compare, "moezoo compare")
    options = parser.instantiate(parser.parse_args(["--config", str(path)])).as_dict()
    for name in ("config", "output", "only", "minutes"):
        options.pop(name)
    methods, seeds = parse(options.pop("methods")), tuple(options.pop("seeds"))
    return Experiment(methods=methods, seeds=seeds, **options)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_row_of_the_recipes_meets_the_baseline(path):
    experiment = experiment_of(path)
    first = experiment.seeds[0]
    runs = [run for run in plan(experiment) if not run.random and run.seed == first]
    assert [run.row for run in runs] == list(experiment.methods)
    runs = [run for run in runs if run.width]  # the others are to keep their own size
    flops = {}
    for run in runs:
        assert abs(run.flops_ratio - 1) <= 0.05, run.row
        flops[run.row] = flops_per_token(run)
    for row, total in flops.items():
        assert total == pytest.approx(flops[experiment.baseline], rel=0.02), row


def test_the_zoo_recipe_holds_every_feed_forward_method():
    (path,) = (path for path in CONFIGS if path.stem == "zoo")
    expected = {method.name for method in feed_forward_methods()}
    rows = experiment_of(path).methods
    assert {options.method or row for row, options in rows.items()} == expected


@pytest.mark.parametrize("layer", WIDTHS, ids=lambda layer: layer.__name__)
def test_the_width_is_the_nearest_one(layer):
    method = next(method for method in feed_forward_methods() if method.layer is layer)
    arguments = {"depth": 3} if "depth" in method.build(8).config()["init_args"] else {}
    if layer is moezoo.Finedeep:  # else widths are multiples
        arguments = {"num_sublayers": 1, "num_experts": 1}
    if layer is moezoo.MoLE:  # all of its experts run in training
        arguments = {"num_experts": 2, "d_expert": 32}
    match = match_flops(method, 128, TARGET, arguments=arguments)
    size = match.arguments[WIDTHS[layer]]

    def flops(width: int) -> int:
        return method.build(128, **arguments, **{WIDTHS[layer]: width}).cost().flops_per_token

    assert flops(size) == match.flops == round(match.ratio * TARGET)
    assert abs(flops(size) - TARGET) <= abs(flops(size + 1) - TARGET)
    assert abs(flops(size) - TARGET) <= abs(flops(size - 1) - TARGET)
    assert match.argument == WIDTHS[layer]


def test_a_width_may_have_to_be_a_multiple():
    match = match_flops(find_method("", "multi_hash"), 100, TARGET, arguments={"num_hashes": 7})
    assert match.arguments["d_expert"] % 7 == 0
    assert abs(match.ratio - 1) <= 7 * 4 * 100 / TARGET
    keys = match_flops(
        find_method("", "product_key_memory"), 128, TARGET, arguments={}, width="d_key"
    )
    assert keys.arguments["d_key"] % 2 == 0
    assert keys.ratio == pytest.approx(1, abs=0.01)


def test_a_layer_may_be_left_as_it_is():
    method = find_method("", "fast_feed_forward")
    match = match_flops(method, 128, TARGET, arguments={"d_leaf": 9}, width="none")
    assert match.argument is None
    assert match.arguments == {"d_leaf": 9}
    assert match.ratio == method.build(128, d_leaf=9).cost().flops_per_token / TARGET < 0.1


MISTAKES = [
    ("peer", {"top_k": 3}, None, "arguments: top_k is solved for; leave it out, or set width"),
    ("peer", {"num_head": 3}, None, "arguments: PEER: unknown argument 'num_head'; did you mean"),
    ("peer", {}, "d_ky", "arguments: PEER: unknown argument 'd_ky'; did you mean 'd_key'"),
    ("peer", {"num_experts": 64}, None, "width: the nearest top_k is 8, at .* times the baseline"),
    ("peer", {"num_heads": 99}, None, "width: the nearest top_k is 1, at .* times the baseline"),
]


@pytest.mark.parametrize(("name", "arguments", "width", "expected"), MISTAKES)
def test_what_cannot_be_met_is_said(name, arguments, width, expected):
    with pytest.raises(InputError, match=expected):
        match_flops(find_method("", name), 128, TARGET, arguments=arguments, width=width)


def test_a_layer_of_ones_own_must_name_its_width():
    class Own(moezoo.DenseFFN):
        pass

    method = moezoo.Method("own", Own, moezoo.zoo()[0].paper)
    with pytest.raises(
        InputError, match="width: it is not known which argument of Own to solve for; name one"
    ):
        match_flops(method, 128, TARGET, arguments={})
    assert match_flops(method, 128, TARGET, arguments={}, width="d_ff").arguments == {"d_ff": 341}


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "GPT-OSS-20B", "Mixtral-8x7B", "Qwen3-8B"])
def test_a_presets_layer_is_a_row_of_the_width_that_costs_the_same(name):
    options = {"ablation": False, "baseline": "dense_mlp", "max_steps": 1, "tolerance": 0.05}
    experiment = Experiment(
        methods=parse({"dense_mlp": {}, name: {}, "again": {"method": name}}),
        layers="all",
        seeds=(0,),
        model=ModelOptions(),
        text=TextOptions(),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        precision="32-true",
        **options,
    )
    _, run, again = plan(experiment)
    assert again.ffn == run.ffn
    assert abs(run.flops_ratio - 1) <= 0.05
    published = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["ffn"]
    options = published["init_args"] | {run.width: run.ffn["init_args"][run.width]}
    assert options != published["init_args"]
    kind = published["class_path"].removeprefix("moezoo.")
    method = next(m for m in moezoo.zoo() if kind in (m.name, m.layer.__name__))
    if kind != method.name:  # a class's own defaults, not those of a method
        method = moezoo.Method(name, method.layer, method.paper)
    expected = method.build(128, **options).config()["init_args"]
    assert {"d_model": 128, **run.ffn["init_args"]} == expected
