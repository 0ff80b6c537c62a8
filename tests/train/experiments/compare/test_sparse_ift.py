"""Sparse blocks that are enlarged until what is kept has the FLOPs of a dense one."""

import pytest

import moezoo
from moezoo import InputError
from moezoo.matrices import Doped, Factorized, Parallel
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.compare.runs import plan
from moezoo_train.experiments.compare.settings import Experiment, find_method, parse_methods
from moezoo_train.experiments.compare.sparse_ift import RULES, kept_flops, match_kept_flops
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig

D = 64
TARGET = moezoo.DenseFFN(D, 256, gated=False).cost().flops_per_token


def experiment(rows):
    return Experiment(
        methods=parse_methods(rows),
        baseline="dense_mlp",
        layers="all",
        ablation=False,
        seeds=(0,),
        max_steps=10,
        tolerance=0.02,
        model=ModelOptions(d_model=D, num_layers=2, num_heads=2),
        text=TextOptions(),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        precision="32-true",
    )


def solve(rule, sparsity=0.75, method="rigl", tolerance=0.01, **arguments):
    given = {"gated": False, **arguments}
    if method == "rigl":
        given.setdefault("matrices", {"kind": "pruned", "sparsity": sparsity, "growth": 0.3})
    found = find_method("", method)
    match = match_kept_flops(rule, found, D, TARGET, arguments=given, tolerance=tolerance)
    return match, found.build(D, **match.arguments)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.75])
@pytest.mark.parametrize("rule", ["wide", "factorized", "doped"])
def test_what_is_kept_has_the_flops_of_the_dense_block(rule, sparsity):
    match, layer = solve(rule, sparsity)
    masks = {name: m for name, m in layer.named_buffers() if name.endswith("mask")}
    kept = sum(int(mask.sum()) for mask in masks.values())
    kept += sum(p.numel() for name, p in layer.named_parameters() if "latent" not in name)
    assert match.flops == kept_flops(layer) == 2 * kept
    assert match.ratio == pytest.approx(1.0, abs=0.01)
    if rule == "wide":
        assert layer.d_ff == pytest.approx(256 / (1 - sparsity), rel=0.02)
    else:
        assert isinstance(layer.matrices, Factorized if rule == "factorized" else Doped)
        assert layer.matrices.growth == 0.3  # the method's other options stay
        assert layer.d_ff == pytest.approx(256, rel=0.05)


def test_as_many_branches_in_parallel_as_fit_and_never_a_rounded_number():
    match, layer = solve("parallel", 0.75)
    assert layer.d_ff == 4 * 256
    assert match.argument == "d_ff"
    assert match.ratio == pytest.approx(1.0, abs=1e-6)
    assert isinstance(layer.matrices, Parallel)
    masks = {name: mask for name, mask in layer.named_buffers() if name.endswith("mask")}
    branches = [masks.pop(f"down_proj.branches.{number}.mask") for number in range(4)]
    assert [tuple(mask.shape) for mask in branches] == [(D, 256)] * 4
    units = masks.pop("up_proj.mask").split(256)  # four matrices, one under the other
    assert not masks
    for mask in (*units, *branches):
        assert int(mask.sum()) == D * 256 // 4
    assert match.flops == 2 * sum(int(mask.sum()) for mask in (*units, *branches))
    assert solve("parallel", 0.5)[1].d_ff == 2 * 256
    with pytest.raises(InputError, match=r"sparse_ift: parallel wants 1 / \(1 - sparsity\) whole"):
        solve("parallel", 0.6)


def test_masks_of_other_kinds_are_widened_too_and_biases_are_no_products():
    match, layer = solve("wide", method="sr_ste", bias=True)
    assert layer.d_ff == 512
    assert match.flops == TARGET
    for rule in ("doped", "parallel"):
        with pytest.raises(InputError, match=f"sparse_ift: {rule} is of matrices of kind pruned"):
            solve(rule, method="sr_ste")


def test_a_dense_block_keeps_all_that_it_computes():
    for layer in (moezoo.DenseFFN(D, bias=True), moezoo.DenseFFN(D, gated=False)):
        assert kept_flops(layer) == layer.cost().flops_per_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dense_glu", "sparse_ift": "wide"}, "sparse_ift: the method has no sparse"),
        ({"method": "low_rank", "sparse_ift": "wide"}, "sparse_ift: the method has no sparse"),
        ({"method": "mixtral", "sparse_ift": "wide"}, "sparse_ift: the method has no sparse"),
        ({"method": "rigl", "sparse_ift": "wider"}, "sparse_ift: 'wider' is not known; did you"),
        ({"method": "rigl", "sparse_ift": "wide", "width": "none"}, "width: sparse_ift says what"),
        (
            {"method": "rigl", "sparse_ift": "wide", "arguments": {"d_ff": 9}},
            "arguments: d_ff is solved for",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=rf"methods.row.{message}"):
        plan(experiment({"row": options}))


def test_runs_say_that_they_count_what_is_kept():
    rows = {"dense_mlp": {}, **{f"sparse_{rule}": {"sparse_ift": rule} for rule in RULES}}
    for name in rows:
        if name != "dense_mlp":
            rows[name] |= {"method": "spdf", "arguments": {"gated": False}}
    runs = plan(experiment(rows))
    assert [run.kept for run in runs] == [False, True, True, True, True]
    assert all(run.flops_ratio == pytest.approx(1.0, abs=0.02) for run in runs)
