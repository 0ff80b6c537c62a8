"""`moezoo compare` from end to end on a page of text, and what it does when run again."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock

from moezoo import InputError
from moezoo.__main__ import main
from moezoo.random_routing import RandomRouting
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.common.records import fingerprint
from moezoo_train.experiments.compare import execution as runs
from moezoo_train.experiments.compare.command import fits
from moezoo_train.experiments.compare.runs import plan
from moezoo_train.experiments.compare.settings import Experiment, parse_methods
from moezoo_train.measure.expert_load import ExpertLoad
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
METHODS = {
    "dense_mlp": {},
    "moe": {"method": "mixtral", "arguments": {"num_experts": 4}, "optimizer": {"lr": 2e-3}},
    "memory": {"method": "memory_plus", "layers": 1, "arguments": {"top_k": 4}, "ablation": False},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        lines = [f"def f{n}(a, b):\n    return a * {n * number} + b\n" for n in range(60)]
        (texts / f"{number}.txt").write_text("\n".join(lines))
    options = {
        "output": "out",
        "seeds": [0, 1],
        "max_steps": 3,
        "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
        "text": {
            "source": "texts", "data_dir": "data", "vocab_size": 300, "sequence_length": 16,
            "batch_size": 4, "val_fraction": 0.2,
        },
        "schedule": {"name": "constant", "warmup_steps": 1},
        "methods": METHODS,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def command(recipe: Path, *more: str) -> int:
    return main(["compare", "--config", str(recipe), *more])


def results(folder: str = "out") -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in Path(folder).glob("*/result.json")}


@pytest.mark.slow
def test_it_trains_compares_and_is_resumed_run_by_run(recipe, capsys):
    assert command(recipe) == 0
    first = results()
    assert set(first) == {
        "dense_mlp-0", "dense_mlp-1", "moe-0", "moe-1", "moe-random-0", "moe-random-1",
        "memory-0", "memory-1",
    }  # fmt: skip
    assert all(r["failure"] is None and 0 < r["val_loss"] < 9 for r in first.values())
    assert len({r["val_loss"] for r in first.values()}) == len(first)
    assert all(r["tokens"] == 3 * 4 * 16 for r in first.values())
    assert first["dense_mlp-0"]["evenness"] is None
    assert 0 < first["moe-0"]["evenness"] <= 1 <= first["moe-0"]["busiest"] <= 4
    assert first["moe-0"]["identity"]["optimizer"]["lr"] == 2e-3
    assert first["memory-0"]["identity"]["layers"] == [1]
    captured = capsys.readouterr()
    assert "8 runs, 0 of them finished before" in captured.err
    assert "[8/8] memory, seed 1: val loss" in captured.err
    assert captured.out.endswith("load.png, load.svg, index.html.\n")
    assert all(300e6 < r["peak_memory"] < 20e9 for r in first.values())
    with open("out/curves.csv") as file:
        curves = [line for line in csv.DictReader(file) if line["method"] == "moe"]
    assert [(line["random_routing"], line["tokens"]) for line in curves] == [
        ("False", "192"),
        ("True", "192"),
    ]
    logged = [read_metrics(f"out/moe-{seed}/metrics.csv")[0] for seed in (0, 1)]
    losses = [float(line["train/loss"]) for line in logged]
    assert float(curves[0]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert float(curves[0]["error"]) == pytest.approx(abs(losses[0] - losses[1]) / 2, rel=1e-4)
    rows = {row["name"]: row for row in json.loads(Path("out/results.json").read_text())["rows"]}
    pair = first["moe-random-0"]["val_loss"] - first["moe-0"]["val_loss"]
    other = first["moe-random-1"]["val_loss"] - first["moe-1"]["val_loss"]
    assert rows["moe"]["gain"]["value"] == pytest.approx((pair + other) / 2)
    assert rows["memory"]["random_loss"] is None

    Path("out/moe-1/result.json").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in Path("out").glob("*/result.json")}
    assert command(recipe) == 0
    assert "8 runs, 7 of them finished before" in capsys.readouterr().err
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert results()["moe-1"]["val_loss"] == first["moe-1"]["val_loss"]  # to the last bit

    Path("out/moe-1/result.json").unlink()
    assert main(["compare", "--config", "out/config.yaml", "--minutes", "0"]) == 0
    captured = capsys.readouterr()
    assert "8 runs, 7 of them finished before" in captured.err
    assert "no time for 1 runs; the same command goes on" in captured.err
    assert "Not trained yet: moe, seed 1." in captured.out
    rows = {row["name"]: row for row in json.loads(Path("out/results.json").read_text())["rows"]}
    assert rows["moe"]["loss"]["count"] == 1
    assert not Path("out/moe-1/result.json").exists()

    assert command(recipe, "--max_steps", "2", "--only", "[dense_mlp]") == 0
    assert "2 runs, 0 of them finished before" in capsys.readouterr().err
    assert results()["dense_mlp-0"]["tokens"] == 2 * 4 * 16


def test_a_failing_run_is_reported_and_the_others_go_on(recipe, capsys, monkeypatch):
    train = runs.train

    def sometimes(run, folder, console):
        if run.row == "moe" and run.random:
            raise RuntimeError("no more\nmemory")
        return train(run, folder, console)

    monkeypatch.setattr(runs, "train", sometimes)
    assert command(recipe, "--seeds", "[0]") == 2
    captured = capsys.readouterr()
    assert "moe, random routing, seed 0: failed, RuntimeError: no more memory" in captured.err
    assert captured.err.splitlines()[-1].startswith(
        "moezoo: error: methods: 1 of 4 runs failed (moe, rand"
    )
    assert "Failed: moe, random routing, seed 0: RuntimeError: no more memory" in captured.out
    assert results()["memory-0"]["failure"] is None
    monkeypatch.setenv("MOEZOO_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="no more"):
        command(recipe, "--seeds", "[0]")
    monkeypatch.setattr(runs, "train", train)
    assert command(recipe, "--seeds", "[0]") == 0
    assert "4 runs, 3 of them finished before" in capsys.readouterr().err


def test_no_run_is_begun_that_would_end_too_late():
    assert fits([], None)
    assert fits([1e9], None)
    assert not fits([], 0)
    assert fits([], 0.1)  # nothing is known of how long one takes
    assert fits([60.0, 120.0], 5)
    assert not fits([60.0, 120.0], 4.9)


def test_without_a_finished_run_there_is_nothing_to_show(recipe, capsys):
    assert command(recipe, "--minutes", "0") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moezoo: error: minutes: no run of out is finished yet; allow more of them"
    )
    assert not Path("out").exists()


def test_two_comparisons_with_one_output_are_refused(recipe, capsys):
    with FileLock(".out.lock"):
        assert command(recipe) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moezoo: error: output: another process is writing out; wait for its end, or name another"
    )
    assert results() == {}


def test_an_interrupted_run_leaves_no_result(recipe, capsys, monkeypatch):
    def interrupted(trainer, *args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:  # as Lightning does
            sys.exit(1)

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", interrupted)
    assert command(recipe) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moezoo: error: interrupted; the same command keeps the runs that are finished"
    )
    assert results() == {}


def experiment(**changes) -> Experiment:
    arguments = {
        "methods": parse_methods({"peer": {}, "hash": {"optimizer": {"lr": 0.5}}}),
        "baseline": "dense_mlp",
        "layers": "every 2",
        "ablation": True,
        "seeds": (3,),
        "max_steps": 200,
        "tolerance": 0.1,
        "model": ModelOptions(d_model=64, num_layers=3, num_heads=2),
        "text": TextOptions(),
        "optimizer": OptimizerConfig(),
        "schedule": ScheduleConfig(),
        "precision": "32-true",
    }
    return Experiment(**(arguments | changes))


@pytest.mark.parametrize("row", [0, 2])
def test_the_ablation_begins_with_the_weights_of_the_method(row):
    own, random = plan(experiment())[row : row + 2]
    assert (own.random, random.random) == (False, True)
    models = [runs.build(run, 1024).model for run in (own, random)]
    kinds = [[type(layer) for layer in ffn_layers(model)] for model in models]
    assert [kind is RandomRouting for kind in kinds[1]] == [False, True, False]
    assert RandomRouting not in kinds[0]
    states = [{k.replace(".layer.", "."): v for k, v in m.state_dict().items()} for m in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    tokens = torch.randint(1024, (1, 20))
    outputs = [model.eval()(input_ids=tokens).logits for model in models]
    assert not torch.allclose(*outputs)


def test_a_row_is_causal_if_it_is_validated_so():
    options = {"own": {}, "rounded": {"router": {"rounding": 32}}}
    rows = {row: {"method": "mixtral", "arguments": given} for row, given in options.items()}
    rows["expert_choice"] = {}
    planned = plan(experiment(methods=parse_methods(rows), ablation=False))
    assert {run.row: run.causal for run in planned} == {
        "own": True,
        "rounded": True,
        "expert_choice": False,
    }
    assert runs.build(planned[1], 1024).model.training


def test_routers_read_what_the_method_or_the_row_says():
    rows = {"smallthinker": {}, "after": {"method": "smallthinker", "router_input": "ffn_input"}}
    own, random, after, _ = plan(experiment(methods=parse_methods(rows)))
    blocks = [list(runs.build(run, 1024).model.model.blocks()) for run in (own, random, after)]
    read = [[block.router_input for block in each] for each in blocks]
    chosen = ["ffn_input", "pre_attention", "ffn_input"]
    assert read == [chosen, chosen, ["ffn_input"] * 3]
    assert isinstance(blocks[1][1].mlp, RandomRouting)
    assert blocks[1][1].mlp._norm == (None,)
    identities = [run.identity({}) for run in (own, after)]
    assert [each.get("router_input") for each in identities] == ["pre_attention", None]
    for name, message in [
        ("hash", "HashLayer chooses nothing by a vector"),
        ("peer", "'x' is not"),
    ]:
        changed = {name: {"router_input": "post_attention" if name == "hash" else "x"}}
        with pytest.raises(InputError, match=rf"methods\.{name}\.router_input: {message}"):
            plan(experiment(methods=parse_methods(changed)))
    baseline = plan(experiment(baseline="smallthinker", methods=parse_methods({"peer": {}})))[0]
    read = [block.router_input for block in runs.build(baseline, 1024).model.model.blocks()]
    assert read == ["pre_attention", "ffn_input", "pre_attention"]


def test_a_memory_stands_beside_a_narrower_baseline():
    rows = {"engram": {"memory": True, "arguments": {"num_rows": 50}}, "dense_mlp": {}}
    baseline, run = plan(experiment(methods=parse_methods(rows)))
    assert (run.memory["class_path"], run.width) == ("moezoo.Engram", "d_ff")
    assert run.memory["init_args"]["convolution"]
    assert abs(run.flops_ratio - 1) < 0.01
    assert "memory" not in baseline.identity({})
    blocks = list(runs.build(run, 1024).model.model.blocks())
    assert [[type(layer).__name__ for layer in b.memories] for b in blocks] == [[], ["Engram"], []]
    widths = [block.mlp.d_ff for block in blocks]
    assert widths[1] < widths[0] == widths[2]
    added = blocks[1].memories[0].cost().flops_per_token + blocks[1].mlp.cost().flops_per_token
    assert added == pytest.approx(blocks[0].mlp.cost().flops_per_token, rel=0.01)


def test_layers_that_are_too_large_to_count_say_nothing_of_their_load():
    counted = ExpertLoad(0, max_over_mean=3.0, entropy=0.5, router_entropy=None, dropped=None)
    large = ExpertLoad(1, max_over_mean=None, entropy=None, router_entropy=None, dropped=None)
    report = SimpleNamespace(
        val_loss=1.0, val_bits_per_byte=1.0, train_loss=1.0, tokens=1, train_seconds=1.0,
        total_parameters=1, active_parameters=1, environment={},
    )  # fmt: skip
    numbers = runs._numbers(report, [counted, large])
    assert (numbers["evenness"], numbers["busiest"]) == (0.5, 3.0)
    numbers = runs._numbers(report, [large])
    assert (numbers["evenness"], numbers["busiest"]) == (None, None)


def test_noise_differs_between_layers_and_seeds():
    seeds = [
        layer.seed
        for seed in (0, 1)
        for layer in ffn_layers(
            runs.build(plan(experiment(layers="all", seeds=(seed,)))[1], 1024).model
        )
    ]
    assert len(set(seeds)) == 6


def test_what_the_numbers_depend_on_is_in_the_hash():
    data = {"source": "a"}

    def hash_of(data=data, index=0, **changes) -> str:
        return fingerprint(plan(experiment(**changes))[index].identity(data))

    assert hash_of() == hash_of()
    others = [
        hash_of(index=1),
        hash_of({"source": "b"}),
        hash_of(seeds=(4,)),
        hash_of(layers="all"),
        hash_of(max_steps=201),
        hash_of(baseline="dense_glu"),
        hash_of(precision="bf16-mixed"),
        hash_of(optimizer=OptimizerConfig(lr=2e-3)),
        hash_of(schedule=ScheduleConfig("wsd")),
        hash_of(model=ModelOptions(d_model=64, num_layers=3, num_heads=4)),
        hash_of(text=TextOptions(batch_size=4)),
        hash_of(methods=parse_methods({"peer": {"arguments": {"num_heads": 4}}})),
    ]
    assert len({hash_of(), *others}) == len(others) + 1


def test_a_run_by_muon_is_known_by_the_dtype_it_computed_in(monkeypatch):
    def hash_of(**optimizer) -> str:
        return fingerprint(plan(experiment(optimizer=OptimizerConfig(**optimizer)))[0].identity({}))

    half, single = (hash_of(name="muon", muon_dtype=d) for d in ("bfloat16", "float32"))
    assert half != single
    for gpu, expected in ((False, single), (True, half)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert hash_of(name="muon") == expected
        # Results of other optimizers, from before there was a choice, still count.
        assert hash_of() == hash_of(muon_dtype="bfloat16")


MISTAKES = [
    ({"methods": {"peerr": {}}}, "methods: 'peerr' is not known; did you mean 'peer'?"),
    ({"methods": {"a": {"method": "pear"}}}, "methods.a.method: 'pear' is not known; did you"),
    ({"methods": {"peer": {"layer": 2}}}, "methods.peer.layer: no such option; did you mean"),
    ({"methods": {"peer": {"layers": 9}}}, "methods.peer.layers: there is no layer 9; the model"),
    ({"methods": {"peer": {"layers": "every 9"}}}, "methods.peer.layers: 'every 9' chooses none"),
    ({"methods": {"peer": 3}}, "methods.peer: 3 is not a mapping"),
    ({"methods": {"peer": {"arguments": 3}}}, "methods.peer.arguments: is no mapping; write names"),
    ({"methods": {"peer": {"arguments": {"x": 1}}}}, "methods.peer.arguments: PEER: unknown arg"),
    ({"methods": {"peer": {"optimizer": {"lt": 1}}}}, "methods.peer.optimizer.lt: no such option"),
    ({"methods": {"peer": {"optimizer": {"lr": -1}}}}, "methods.peer.optimizer: optimizer.lr: -1"),
    ({"methods": {"a/b": {"method": "peer"}}}, "methods: 'a/b' cannot be the name of a folder"),
    ({"methods": {"dense_glu": {"ablation": True}}}, "methods.dense_glu.ablation: it has no rout"),
    ({"methods": {"peer": {"memory": True}}}, "methods.peer.memory: PEER takes the place of a f"),
    ({"methods": {"engram": {"memory": 1}}}, "methods.engram.memory: 1 is neither true nor false"),
    (
        {"methods": {"l3": {"memory": True, "arguments": {"d_up": 9999}}}},
        "methods.l3.memory: it takes ",
    ),
    (
        {"methods": {"engram": {"memory": True, "ablation": True}}},
        "methods.engram.ablation: it has no routing to make random",
    ),
    ({"methods": {"persistent_memory": {}}}, "methods: 'persistent_memory' is not known"),
    ({"methods": {}}, "methods: there is none"),
    ({"baseline": "dense"}, "baseline: 'dense' is not known; did you mean"),
    ({"seeds": [1, 1]}, "seeds: [1, 1] holds one twice"),
    ({"seeds": []}, "seeds: there is none"),
    ({"only": ["mo"]}, "only: 'mo' is not known; did you mean 'moe'?"),
    ({"minutes": -1}, "minutes: -1 is out of range"),
    ({"max_steps": 0}, "max_steps: 0 is out of range"),
    ({"model": {"d_model": 30, "num_heads": 4}}, "d_model: 30 is not divisible by num_heads 4"),
    ({"model": {"d_mdel": 30}}, "model.d_mdel: no such option; did you mean 'model.d_model'?"),
    ({"model": {"preset": "Qwen3-0.6B"}}, "model.preset: fit, validate, test and plan take"),
]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_show_before_anything_is_written(recipe, changes, expected, capsys):
    options = yaml.safe_load(recipe.read_text()) | changes
    recipe.write_text(yaml.safe_dump(options, sort_keys=False))
    assert command(recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moezoo: error: {expected}")
    assert not Path("out").exists()
    assert not Path("data").exists()


def test_options_are_checked_in_python_too():
    with pytest.raises(InputError, match="tolerance: 2 is out of range"):
        experiment(tolerance=2)
