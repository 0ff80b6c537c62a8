"""The command, the machines, and what bounds a step."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import StrategyRegistry
from torch.utils.flop_counter import FlopCounterMode

from moezoo import __main__ as command
from moezoo.errors import InputError
from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.plan.choices import Choice, yaml_lines
from moezoo_train.plan.command import duration, size
from moezoo_train.plan.estimate import Bounds, Planner, best, network_seconds, touched
from moezoo_train.plan.layouts import Collective
from moezoo_train.plan.machine import MACHINES, machine

ROOT = Path(__file__).parents[3]
CONFIG = ["--config", str(ROOT / "configs" / "moe.yaml")]


def fail(capsys, *arguments: str) -> str:
    assert command.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("moezoo: error: ")


MISTAKES = [
    (["--gpuz", "8"], "gpuz: no such option; did you mean 'gpu'?"),
    (["--model.ffn.num_expert", "4"], "has no option 'num_expert'; did you mean 'num_experts'?"),
    (["--gpu", "h300"], "gpu: 'h300' is not known; did you mean 'h200'?"),
    (["--memory", "80"], "gpu: missing; give one of h200, h100"),
    (["--gpu", "h200", "--gpus", "0"], "gpus: 0 is out of range; give a whole number ≥ 1"),
    (
        ["--gpu", "h200", "--layout", "ddp,fsdp"],
        "layout: 'fsdp' is not known; did you mean 'fsdp2'",
    ),
    (["--gpu", "h200", "--layout", "ep"], "'ep' is not known; give fsdp2 with --expert_parallel"),
    (
        ["--gpu", "h200", "--layout", "ddp", "--replicas", "2"],
        "replicas: only fsdp2 takes it; add ",
    ),
    (["--gpu", "h200", "--replicas", "0"], "replicas: 0 is out of range; give a whole number ≥ 1"),
    (
        ["--gpu", "h200", "--layout", "fsdp2", "--expert_parallel", "3"],
        "layout: fsdp2 cannot be had: expert_parallel: 3 does not divide 8 experts; change it",
    ),
    (
        ["--gpu", "h200", "--trainer.precision", "64-true"],
        "trainer.precision: there are no formulas for '64-true'",
    ),
    (["--gpu", "h200", "--model.initialize_from", "x"], "initialize_from: plan reads no weights"),
    (["--gpu", "h200", "--data.sequence_length", "2048"], "is more than model.max_length 1024"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistakes_are_one_line_and_write_nothing(
    arguments, expected, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert expected in fail(capsys, *CONFIG, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_of_a_file_are_refused(capsys, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {d_modl: 64}\n")
    message = fail(capsys, "--config", str(config), "--gpu", "h200")
    assert message == "model.d_modl: no such option; did you mean 'model.d_model'?"


def test_tables_and_pictures(capsys, tmp_path):
    folder = tmp_path / "pictures"
    arguments = ["--gpus", "48", "--gpu", "h200", "--pictures", str(folder)]
    assert command.main(["plan", *CONFIG, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("15.6 M parameters, 5.88 M active per token, bf16-mixed; 48 × H200")
    for layout in ("ddp", "zero1", "zero2", "zero3"):
        assert sum(line.startswith(f"{layout} ") for line in lines) == 2
    memory, *_, both = [line for line in lines if line.startswith("fsdp2 ")][:4]
    assert memory.endswith("yes   8 experts as 48")  # 48 GPUs divide no rows either
    assert [number.isdigit() for number in both.split()[1:3]] == [True, True]
    assert sum(line.startswith("fsdp2 ") for line in lines) == 2 * 4  # shared experts, replicas
    assert lines[lines.index("trainer:") + 1 :][:2] == ["  devices: 8", "  num_nodes: 6"]
    assert sorted(path.name for path in folder.iterdir()) == ["plan.png", "plan.svg"]
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_the_same_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--memory", "0.5", "--bandwidth", "1000", "--flops", "100", "--layout", "ddp,fsdp2"]
    options += ["--pictures", "null", "--json", "true", "--gpus", "4", "--network", "10"]
    assert command.main(["plan", *CONFIG, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["memory"] == 2**29
    assert found["machine"]["network"] == 10e9
    ddp, fsdp2, *_ = found["layouts"]
    assert (fsdp2["expert_parallel"], fsdp2["replicas"]) == (1, 1)
    assert ddp["trainer"] == {"devices": 4, "num_nodes": 1, "strategy": "ddp"}
    assert (ddp["layout"], ddp["fits"]) == ("ddp", False)
    memory = ddp["memory_bytes"]
    assert memory.pop("total") == sum(memory.values()) > 2**29
    assert fsdp2["memory_bytes"]["gradients"] < memory["gradients"]
    assert ddp["bound_seconds"]["compute"] == pytest.approx(ddp["flops_per_gpu"] / 100e12)
    assert ddp["tokens_per_step"] == 4 * 16 * 256
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_flops_are_those_that_torch_counts(kind, make_setup, make_module, batch):
    setup = make_setup(kind, attention="eager")
    with FlopCounterMode(display=False) as counter:
        make_module(kind, attention="eager")(batch).loss.backward()
    assert setup.flops_per_token * setup.tokens == counter.get_total_flops()


def test_recomputation_repeats_the_blocks_but_not_the_head(make_setup):
    plain, again = (make_setup("dense", activation_checkpointing=on) for on in (False, True))
    forward, head = plain.flops_per_token / 3, 2 * 75 * 32
    assert again.flops_per_token == pytest.approx(4 * forward - head)


def test_few_tokens_touch_few_experts(make_setup):
    setup = make_setup("memory_plus")
    numbers = sum(p.numel() for p in setup.parameters)
    assert touched(setup) == numbers  # 63 tokens × 2 heads × 4 values are more than 49
    one_token = touched(setup, 1 / setup.tokens)
    costs = [block.mlp.cost() for block in setup.model.model.blocks()]
    idle = sum(cost.total_parameters - cost.active_parameters for cost in costs)
    assert idle > 0
    assert one_token == numbers - idle


def test_a_layout_fits_until_memory_is_a_byte_too_small(make_setup):
    setup = make_setup("dense")
    roomy = Planner(setup, machine("h200"), cpu=True).estimate(Choice("ddp"), 4)
    needed = roomy.plan.memory().total
    for memory, fits in ((needed, True), (needed - 1, False)):
        kind = machine("h200", memory=memory / 2**30)
        assert Planner(setup, kind, cpu=True).estimate(Choice("ddp"), 4).fits is fits


def test_a_held_batch_is_shared_as_long_as_there_is_a_window_for_each(make_setup):
    planner = Planner(make_setup("dense"), machine("a100"), cpu=True)
    held = planner.scale("ddp", global_batch_of=4)
    assert [one.plan.gpus for one in held] == [1, 2, 4, 8]  # 12 windows; 16 GPUs lack some
    assert {one.tokens_per_step for one in held} == {4 * 63}
    activations = [one.plan.memory().activations * one.plan.gpus for one in held]
    assert activations == pytest.approx([activations[0]] * 4)
    assert [one.plan.gpus for one in planner.scale("ddp")][-1] == 10_000


def test_what_divides_gpus_and_experts_is_tried(make_setup):
    planner = Planner(make_setup("moe"), machine("a100"), cpu=True)

    def tried(gpus: int) -> list[tuple[int, ...]]:
        return [tuple(one.choice[1:]) for one in planner.estimates("fsdp2", gpus)]

    assert tried(1) == [(1, 1)]
    assert tried(4) == [(1, 1), (1, 2)]  # 3 experts
    assert tried(6) == [(1, 1), (1, 2), (1, 3), (3, 1), (3, 2)]
    assert [one.choice[0] for one in planner.estimates("ddp", 6)] == ["ddp"]
    kinds = [tuple(n > 1 for n in one.choice[1:]) for one in planner.rows("fsdp2", 6)]
    assert kinds == [(False, False), (False, True), (True, False), (True, True)]
    asked = Planner(make_setup("moe"), machine("a100"), 3, cpu=True)
    assert [tuple(one.choice[1:]) for one in asked.estimates("fsdp2", 6)] == [(3, 1), (3, 2)]


def test_numbers_that_cannot_be_had_are_named(make_setup):
    def refused(kind: str, gpus: int, *numbers: int) -> str | None:
        return Planner(make_setup(kind), machine("a100"), *numbers).refusal("fsdp2", gpus)

    assert refused("moe", 6, 3, 2) is None
    assert refused("moe", 4, 2) == "expert_parallel: 2 does not divide 3 experts; change it"
    assert refused("moe", 4, 3) == (
        "expert_parallel 3 × replicas 1 does not divide 4 GPUs; change them"
    )
    assert refused("dense", 4, 2) == "expert_parallel: no layer has routed experts; leave it out"
    assert "no layer has routed" in (refused("peer", 4, 2) or "")
    assert refused("dense", 4, 1, 2) is None


def test_the_best_fits_and_is_fastest_or_takes_least(make_setup):
    planner = Planner(make_setup("moe"), machine("a100", network=1, gpus_per_node=1), cpu=True)
    tried = planner.estimates("fsdp2", 6)
    assert best(tried).tokens_per_second == max(one.tokens_per_second for one in tried)
    least = min(one.plan.memory().total for one in tried)
    tight = Planner(make_setup("moe"), machine("a100", memory=1e-6), cpu=True)
    assert best(tight.estimates("fsdp2", 6)).plan.memory().total == least


@pytest.mark.parametrize(
    "choice", [Choice("ddp"), Choice("zero2"), Choice("fsdp2"), Choice("fsdp2", 4, 2)]
)
def test_the_lines_for_fit_give_the_layout(choice):
    written = yaml.safe_load("\n".join(yaml_lines(choice.trainer(24, 8))))["trainer"]
    assert written == choice.trainer(24, 8)
    assert written["devices"] * written["num_nodes"] == 24
    if isinstance(written["strategy"], str):
        assert written["strategy"] == choice.layout
        assert written["strategy"] in StrategyRegistry.available_strategies()
    else:
        assert written["strategy"]["class_path"] == f"{FSDP2Strategy.__module__}.FSDP2Strategy"
        strategy = FSDP2Strategy(**written["strategy"]["init_args"])
        assert (strategy.expert_parallel, strategy.replicas) == choice[1:]


def test_muon_has_no_deepspeed(make_setup):
    from moezoo_train.optim.optimizer import OptimizerConfig

    setup = make_setup("dense", optimizer=OptimizerConfig("muon"))
    planner = Planner(setup, machine("a100"), cpu=True)
    assert "Muon wants whole matrices" in (planner.refusal("zero2", 4) or "")
    assert planner.refusal("fsdp2", 4) is None


def test_sparse_gradients_are_refused(make_setup):
    from functools import partial

    from moezoo import MemoryPlus

    with pytest.raises(InputError, match="sparse: the size of sparse gradients"):
        make_setup("dense", ffn=partial(MemoryPlus, num_keys=7, top_k=4, sparse=True))


def test_links_that_bound_an_exchange():
    kind = machine("h100", link=100, network=10, gpus_per_node=8)

    def seconds(name: str, group: int, stride: int = 1) -> float:
        return network_seconds(Collective(name, "", 1e9, group, stride), kind)

    assert seconds("all_gather", 8) == pytest.approx(7 / 8 / 100)
    # A ring over nodes leaves each by all of its eight cards; four rings share them.
    assert seconds("all_gather", 16) == pytest.approx(15 / 16 / 80)
    assert seconds("all_reduce", 16, stride=4) == pytest.approx(2 * 15 / 16 / 20)
    assert seconds("all_reduce", 2, stride=4) == pytest.approx(1 / 100)
    # Of an all-to-all over two nodes, half of the whole leaves the node.
    assert seconds("all_to_all", 16) == pytest.approx(1 / 2 / 10)


def test_bounds_name_the_largest():
    bounds = Bounds(compute=1.0, memory=3.0, network=2.0)
    assert (bounds.step, bounds.largest) == (3.0, "memory")


def test_machines_are_ordered_as_their_data_sheets():
    for kind in MACHINES.values():
        assert kind.half > kind.single
        assert kind.link >= kind.network
    with pytest.raises(InputError, match="flops: 0 is out of range; give a number above 0"):
        machine("h200", flops=0)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "-"), (999, "999 B"), (1000, "0.977 KiB"), (2**30, "1 GiB"), (1.5 * 2**40, "1.5 TiB")],
)
def test_sizes_have_three_digits(number, text):
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "-"), (12.34, "12.3 s"), (0.00123, "1.23 ms"), (2e-8, "20 ns")]
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text


def test_no_process_group_is_left_behind(make_setup):
    Planner(make_setup("moe"), machine("a100"), cpu=True).estimate(Choice("ddp"), 2)
    assert not torch.distributed.is_initialized()
