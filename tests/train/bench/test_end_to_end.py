"""Whole steps, replies and commands: everyone does the same, and who does not gets no speed."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moezoo import __main__ as main
from moezoo.bench import end_to_end
from moezoo.bench.case import Case, Package, Peer, Setting, Target
from moezoo.bench.end_to_end import Finished, Job, Spent, Task, run_command, run_whole, take_turns
from moezoo.bench.runner import Options
from moezoo.command import bench
from moezoo_train.bench import CASES, commands, decoding, muon, preparing, training

QUICK = Options(quick=True, runs=2)
BY_NAME = {case.name: case for case in CASES}
KINDS = [  # one of each kind: the others differ in sizes, which a quick run replaces
    "train-e8",
    "train-dense",
    "train-e8-bf16",
    "muon-demo",
    "token-table-1gb",
    "decode-e8",
    "decode-e8-b8",
    "decode-dense",
    "decode-engram",
    "stock-train-mixtral",
    "stock-train-qwen3moe",
    "stock-train-glm4moe",
    "stock-decode-mixtral",
    "stock-decode-glm4moe",
    "prepare",
]


@pytest.fixture
def fast_bf16(monkeypatch):
    monkeypatch.setattr(training, "_check_worth", lambda: None)


@pytest.mark.usefixtures("fast_bf16")
@pytest.mark.parametrize("name", KINDS)
def test_everyone_agrees(name):
    case = BY_NAME[name]
    results = run_whole(case, QUICK)
    assert [result.peer for result in results] == list(case.peers)
    for result in results:
        assert result.outcome == "measured", (result.peer, result.note)
        assert len(result.ratios) == 2
        assert (result.error is not None) == case.peers[result.peer].same
        assert result.ours.forward.median > 0
        if "train" in name:
            assert result.ours.memory > 0
            assert result.theirs.memory > 0


def only(name: str, build, same: bool = True) -> Case:
    return dataclasses.replace(BY_NAME[name], peers={"peer": Peer(build, same=same)})


def check_caught(case: Case, where: str) -> None:
    (result,) = run_whole(case, QUICK)
    assert result.outcome == "differs"
    assert where in result.note
    assert result.ours is None
    assert result.theirs is None
    assert result.ratios == ()


def forgets_a_norm(parts):
    return without(parts, "model.layers.0.input_layernorm.weight")


def without(parts, name: str) -> Job:
    weights = {**parts.weights, name: 1.01 * parts.weights[name]}
    return training._transformers(dataclasses.replace(parts, weights=weights))


def learns_slower(parts):
    """The loss and its gradients are right, the optimizer is not."""

    def job(self, model, loss):
        right = training.Training.job(self, model, loss)
        with torch.no_grad():
            start = [p.clone() for p in model.parameters()]

        def answer():
            made = dict(right.answer())
            with torch.no_grad():
                for parameter, old in zip(model.parameters(), start, strict=True):
                    parameter.lerp_(old, 0.5)
                made["the loss after steps"] = loss().detach()[None]
            return made

        return dataclasses.replace(right, answer=answer)

    model = parts.architecture.theirs(parts.weights)

    def loss():
        ids, labels = parts.input_ids, parts.labels
        return model(input_ids=ids, labels=labels, shift_labels=labels).loss

    return job(parts, model, loss)


def shifts_labels(parts):
    labels = parts.labels.roll(1, dims=1)
    return training._transformers(dataclasses.replace(parts, labels=labels))


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (forgets_a_norm, "the gradient of"),
        (learns_slower, "the loss after steps"),
        (shifts_labels, "the gradient of"),
    ],
)
def test_a_wrong_training_step_is_caught(build, where):
    check_caught(only("train-dense", build), where)


@pytest.mark.usefixtures("fast_bf16")
def test_a_wrong_step_in_bf16_is_caught():
    check_caught(only("train-e8-bf16", shifts_labels), "the gradient of")


def test_bf16_is_skipped_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(training, "_WORTH_IT", 1e9)
    (result,) = run_whole(BY_NAME["train-e8-bf16"], QUICK)
    assert result.outcome == "skipped"
    assert "nothing to gain" in result.note


@pytest.mark.parametrize("change", [{"lr": 0.022}, {"momentum": 0.5}])
def test_a_wrong_muon_is_caught(change):
    def build(parts):
        return muon._torch(dataclasses.replace(parts, options={**parts.options, **change}))

    check_caught(only("muon-demo", build), "matrix")


@pytest.mark.parametrize("name", ["decode-e8", "decode-e8-b8"])
def test_a_wrong_token_is_caught(name):
    def build(parts):
        def answer():
            tokens = decoding.transformers_reply(parts).answer()["the tokens"]
            tokens[-1, -1] += 1
            return {"the tokens": tokens}

        return Job(lambda: Spent(1e-9), answer)

    check_caught(only(name, build), "differs by inf in the tokens")


@pytest.mark.parametrize(
    "spoil", [lambda ids: ids[:-1], lambda ids: [ids[0][::-1], *ids[1:]], lambda ids: ids + ids[:1]]
)
def test_wrong_tokens_of_a_text_are_caught(spoil):
    def build(parts):
        words = preparing._tokenizers(parts)
        assert words.answer()["the tokens"].numel()
        from tokenizers import Tokenizer

        right = Tokenizer.from_file(str(parts.tokenizer / "tokenizer.json"))
        right.encode_special_tokens = True
        return parts.job(lambda: spoil([right.encode(text).ids for text in parts.documents]))

    check_caught(only("prepare", build), "differs by inf in the tokens")


def in_this_process(words) -> Finished:
    """Run a command of moezoo or of python as a process of its own would, without one."""
    if tuple(words[:3]) == commands._MOEZOO:
        assert main.main(words[3:]) == 0
    else:
        source, target = Path(words[-2]), Path(words[-1])
        target.parent.mkdir()
        save_file(load_file(source), target)
    return Finished(Spent(1.0, 1 << 20), "")


def mixture_of(words, factor: float = 1.0) -> Finished:
    """Do what mergekit-moe does, by its recipe."""
    recipe, target = json.loads(Path(words[1]).read_text()), Path(words[2])
    assert recipe["architecture"] == "mixtral"
    dense = load_file(Path(recipe["base_model"]) / "model.safetensors")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    made = {}
    for name, tensor in dense.items():
        layer, found, projection = name.partition(".mlp.")
        if not found:
            made[name] = tensor
            continue
        for number in range(len(recipe["experts"])):
            kind = names[projection.removesuffix(".weight")]
            full = f"{layer}.block_sparse_moe.experts.{number}.{kind}.weight"
            made[full] = tensor * factor if number else tensor.clone()
    target.mkdir()
    save_file(made, target / "model.safetensors")
    return Finished(Spent(2.0, 2 << 20), "")


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, "measured"), (1.0001, "differs")])
def test_upcycling_against_mergekit(factor, outcome, monkeypatch, capsys):
    def run(words):
        if words[0] == "mergekit-moe":
            return mixture_of(words, factor)
        return in_this_process(words)

    monkeypatch.setattr(commands, "run_command", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    results = {result.peer: result for result in run_whole(BY_NAME["upcycle"], QUICK)}
    assert results["mergekit"].outcome == outcome, results["mergekit"].note
    assert results["reading and writing it"].outcome == "measured", results[
        "reading and writing it"
    ].note
    if outcome == "measured":
        assert results["mergekit"].ratios == (2.0, 2.0)
        assert results["mergekit"].theirs.memory == 2 << 20
    capsys.readouterr()


def test_carving_and_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(commands, "run_command", in_this_process)
    results = {result.peer: result for result in run_whole(BY_NAME["carve"], QUICK)}
    assert results["mergekit"].outcome == "missing"
    assert "cannot carve" in results["mergekit"].note
    assert results["reading and writing it"].outcome == "measured", results[
        "reading and writing it"
    ].note
    capsys.readouterr()


def test_start_up_checks_what_is_printed(monkeypatch):
    printed = {"text": "moezoo COMMAND methods at d_model --model.d_model"}
    monkeypatch.setattr(
        commands, "run_command", lambda words: Finished(Spent(0.5, 1), printed["text"])
    )
    for name in ("start-help", "start-zoo", "start-fit-help"):
        (result,) = run_whole(BY_NAME[name], QUICK)
        assert (result.outcome, result.ratios) == ("measured", (1.0, 1.0))
    printed["text"] = "nothing"
    (result,) = run_whole(BY_NAME["start-zoo"], QUICK)
    assert (result.outcome, result.note) == (
        "failed",
        "ours: RuntimeError: moezoo zoo does not print 'methods at d_model'",
    )


def test_commands_take_their_own_seconds_and_memory():
    busy = (
        "import time\nwhile time.process_time() < 0.3: pass\nprint('done')\nb = b'x' * (64 << 20)"
    )
    spent, output = run_command([sys.executable, "-S", "-c", busy])
    assert output == "done\n"
    assert 0.3 <= spent.seconds < 3
    assert 64 << 20 < spent.memory < 1 << 30
    with pytest.raises(RuntimeError, match="fails with 3: no good"):
        run_command([sys.executable, "-S", "-c", "print('no good'); raise SystemExit(3)"])


def test_turns_are_equal_and_go_back_and_forth():
    called = []

    def job(name: str, memory: int | None = None) -> Job:
        return Job(lambda: (called.append(name), Spent(1.0, memory))[1], dict)

    spent = take_turns({"a": job("a"), "b": job("b")}, runs=3, budget=9.0)
    assert "".join(called) == "ab" + "abbaab"  # the first round is a warm-up
    assert {name: len(each) for name, each in spent.items()} == {"a": 3, "b": 3}
    called.clear()
    spent = take_turns({"a": job("a", 5), "b": job("b", 6)}, runs=2, budget=0.0)
    assert "".join(called) == "abab"
    assert [each.memory for each in spent["b"]] == [6, 6]


def test_a_row_by_hand(tmp_path, capsys):
    seconds = {"ours": iter((9.0, 1.0, 2.0, 1.0)), "theirs": iter((9.0, 2.0, 2.0, 3.0))}

    def build(setting: Setting, folder: Path) -> Task:
        ours = Job(lambda: Spent(next(seconds["ours"])), lambda: {"x": torch.ones(2)}, lambda: 100)
        return Task(ours, None, amount=4.0)

    def peer(parts) -> Job:
        return Job(
            lambda: Spent(next(seconds["theirs"])), lambda: {"x": torch.ones(2)}, lambda: 400
        )

    case = Case(
        "made-up",
        "end-to-end",
        "made up",
        {"N": 4},
        {},
        build,
        {
            "peer": Peer(peer, target=Target(forward=2.5, memory=0.6)),
            "gone": Peer(peer, Package("no_such_package", "pip install it")),
            "empty": Peer(lambda parts: Job(lambda: Spent(1.0), dict)),
        },
        unit="ms/token",
    )
    measured, gone, empty = run_whole(case, Options(runs=3))
    assert (gone.outcome, gone.note) == ("missing", "not installed; pip install it")
    assert (empty.outcome, empty.note) == ("differs", "differs by inf in x, which is missing")
    row = bench.row(measured, None)
    assert (row.value, row.peer_value) == (250.0, 500.0)
    assert (row.ratio_low, row.forward_ratio, row.ratio_high) == (1.5, 2.0, 2.5)
    assert row.memory_ratio == 0.25
    assert row.target == "ratio ≥ 2.5×, memory ≤ 0.6×"
    assert row.verdict == "ratio misses by 20 %"


def test_nothing_to_compare_is_no_agreement():
    found = end_to_end.difference({}, {"x": torch.ones(1)})
    assert found.error == float("inf")
    ids = {"ids": torch.tensor([1, 2])}
    assert end_to_end.difference(ids, {"ids": torch.tensor([1, 2])}).error == 0
    assert end_to_end.difference(ids, {"ids": torch.tensor([1, 3])}).error == float("inf")
    assert end_to_end.difference(ids, {"ids": torch.tensor([1])}).error == float("inf")


def test_the_command_writes_table_files_and_picture(tmp_path, capsys):
    words = ["decode-e8", "--quick", "--runs", "2", "--output", str(tmp_path)]
    assert main.main(["bench", *words]) == 0
    captured = capsys.readouterr()
    assert "end-to-end (quick)" in captured.out
    assert "ms/token" in captured.out
    assert "(one read of the weights)" in captured.out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.csv", "results.json", "ratios.png", "ratios.svg"}
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["environment"]["quick"] is True
    for row in document["rows"]:
        assert row["kind"] == "end-to-end"
        assert row["ratio_low"] <= row["forward_ratio"] <= row["ratio_high"]
        assert row["value"] > 0


def test_names_are_unique_and_all_is_ops_and_layers():
    every = bench.every_case()
    assert len({case.name for case in every}) == len(every)
    assert bench.select("end-to-end", "cpu") == CASES
    assert not {case.name for case in CASES} & {case.name for case in bench.select("all", "cpu")}
    for case in CASES:
        assert set(case.quick) <= {*case.sizes}, case.name
        assert case.unit
