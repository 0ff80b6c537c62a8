"""`moezoo bench` from the command line to the files."""

import json

import pytest
import torch

from moezoo import __main__ as main
from moezoo.bench.cases import CASES
from moezoo.command import bench, bench_cases
from moezoo_kernels import backends

FILES = {
    "results.csv",
    "results.json",
    *(f"{name}.{kind}" for name in ("ratios",) for kind in ("svg", "png")),
}


def test_one_case_end_to_end(tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["--quick", "--runs", "2", "--threads", "1", "--output", str(folder)]
    assert main.main(["bench", "top-k-n256-k16", *words]) == 0
    captured = capsys.readouterr()
    assert "product-key top-k" in captured.out
    assert "agrees" in captured.out
    assert f"{folder}/ holds results.csv" in captured.out
    assert captured.err.startswith("[1/1] top-k-n256-k16 ... ")
    assert {path.name for path in folder.iterdir()} == FILES
    document = json.loads((folder / "results.json").read_text())
    assert document["environment"]["threads"] == 1
    measured = {row["peer"]: row for row in document["rows"]}["torch.topk"]
    assert measured["outcome"] == "measured"
    assert measured["forward_runs"] == 2
    assert measured["error"] < 1e-6


def test_no_time_is_a_row_for_everyone(tmp_path, capsys):
    words = ["--cases", "peer-core,memory-layer", "--minutes", "0", "--quick"]
    assert main.main(["bench", *words, "--output", str(tmp_path)]) == 0
    assert "not begun within 0 minutes" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"skipped"}
    assert {row["case"] for row in rows} == {"peer-core", "memory-layer"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["peer-265"], "cases: there is no 'peer-265' on cpu; did you mean 'peer-256'?"),
        (["--cases", "qwen3-30b"], "cases: there is no 'qwen3-30b' on cpu"),
        (["op", "--peers", "transfomers"], "peers: none of the cases has 'transfomers'; did you"),
        (["--runs", "0"], "runs: 0 is out of range"),
        (["--threads", "0"], "threads: 0 is out of range"),
        (["--minutes", "-1"], "minutes: -1 is out of range"),
        (["--dtype", "float16"], "dtype: 'float16' is not one of auto, float32, bfloat16"),
        (["op", "layer"], "unexpected argument 'layer'"),
    ],
)
def test_mistakes(words, message, capsys):
    assert main.main(["bench", *words]) == 2
    assert capsys.readouterr().err.startswith(f"moezoo: error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_cuda_is_refused(capsys):
    assert main.main(["bench", "--device", "cuda"]) == 2
    assert "there is no usable CUDA device" in capsys.readouterr().err


def test_selections():
    ops, layers = bench.select("op", "cpu"), bench.select("layer", "cpu")
    assert {case.kind for case in ops} == {"op"}
    assert len(ops) + len(layers) == len(bench.select("all", "cpu"))
    assert len(bench.select("all", "cpu")) + len(bench.select("all", "cuda")) == len(CASES)
    assert bench.select("op,layer", "cpu") == bench.select("all", "cpu")
    two = bench.select("peer-512, peer-128", "cpu")
    assert [case.name for case in two] == ["peer-128", "peer-512"]
    assert bench.select_peers("all", two) is None
    assert bench.select_peers("PEER-pytorch", two) == {"PEER-pytorch"}


def test_ops_that_doctor_prints_are_names_of_cases():
    for op in sorted({row.op for row in backends.table()}):
        chosen = bench.select(op, "cpu")
        assert chosen, f"no case has {op} in its ops"
        assert all(op in case.ops for case in chosen)


@pytest.mark.parametrize(
    "ops", sorted({case.ops for case in CASES if case.device == "cpu"}), ids=str
)
def test_cases_run_the_ops_that_they_name(ops, monkeypatch):
    case = next(case for case in CASES if case.device == "cpu" and case.ops == ops)
    asked = set()
    choose = backends._choose

    def noting(op, *rest):
        asked.add(op)
        return choose(op, *rest)

    monkeypatch.setattr(backends, "_choose", noting)
    problem = case.build(case.setting(True, None))
    asked.clear()
    with torch.set_grad_enabled(case.step):
        problem.ours.forward()
    assert asked == set(ops)


def test_the_listed_cases_are_those_that_there_are():
    listed = json.loads(bench_cases.TABLE.read_text(encoding="utf-8"))
    fix = "moezoo.command.bench_cases.write_table() writes it anew"
    assert list(listed.items()) == list(bench_cases.named_cases().items()), fix


def test_the_help_lists_the_cases_and_ops(capsys):
    with pytest.raises(SystemExit):
        main.main(["bench", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {case.name for case in CASES} <= words
    assert {row.op for row in backends.table()} <= words
