"""Runs over each other: what they came to, how they differ, and what is no run."""

import json

import numpy as np
import pytest
import yaml

from moezoo.__main__ import main
from moezoo_models import MoezooConfig
from moezoo_train.experiments.overlay import differences, read_run
from moezoo_train.experiments.overlay_picture import draw_runs

COLUMNS = "step,tokens,train/loss,train/tokens_per_second,train/flops,val/loss,val/bits_per_byte"


def write(folder, losses, options, report=True, flops=True, val=True):
    """Write what a run leaves: 10 tokens a step, 5 of them per second, 100 FLOPs a token."""
    folder.mkdir(parents=True)
    rows = [COLUMNS]
    for number, loss in enumerate(losses, start=1):
        work = 1000 * number if flops else ""
        rows.append(f"{number},{10 * number},{loss},5,{work},,")
    if val:
        rows.append(f"{len(losses)},{10 * len(losses)},,,,{losses[-1] + 0.5},1.25")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    if report:
        found = {"steps": len(losses), "total_parameters": 1234, "active_parameters": 567}
        (folder / "report.json").write_text(json.dumps(found))


OPTIONS = {
    "output": "runs/a",
    "model": {"d_model": 16, "ffn_rules": [{"layers": "all", "ffn": {"class_path": "x"}}]},
    "trainer": {"max_steps": 4},
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "a", [4.0, 3.0, 2.5, 2.25], OPTIONS)
    other = yaml.safe_load(yaml.safe_dump(OPTIONS)) | {"output": "runs/b", "seed": 3}
    other["model"]["ffn_rules"][0]["ffn"]["class_path"] = "y|z"
    write(tmp_path / "runs" / "b", [4.5, 3.5], other, report=False)
    return tmp_path / "runs"


def test_a_run_is_read_as_it_was_logged(runs):
    run = read_run("runs/a")
    assert (run.finished, run.steps, run.tokens) == (True, 4, 40)
    assert run.train_loss == 2.25
    assert run.val_loss == run.best_val_loss == 2.75
    assert run.val_bits_per_byte == 1.25
    assert (run.total_parameters, run.active_parameters) == (1234, 567)
    assert (run.flops, run.seconds) == (4000.0, 8.0)
    assert run.train.tokens.tolist() == [10, 20, 30, 40]
    assert run.train.seconds.tolist() == [2, 4, 6, 8]
    assert run.val.flops.tolist() == [4000]
    assert str(run) == "runs/a"


def test_an_unfinished_run_is_taken_as_far_as_it_is(runs):
    run = read_run("runs/b")
    assert str(run) == "runs/b (unfinished, step 2)"
    assert run.total_parameters is None
    model = runs / "b" / "model"
    model.mkdir()
    fields = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    MoezooConfig(**fields).save_pretrained(model)
    run = read_run("runs/b")
    assert run.total_parameters == run.active_parameters > 9 * 16
    # One that goes on has the report of when it had ended before.
    report = {"steps": 1, "total_parameters": 1, "active_parameters": 1}
    (runs / "b" / "report.json").write_text(json.dumps(report))
    assert not read_run("runs/b").finished


def test_options_that_differ_are_those_that_differ(runs):
    found = differences([read_run("runs/a"), read_run("runs/b")])
    assert found == [
        ("model.ffn_rules[0].ffn.class_path", ["x", "y|z"]),
        ("seed", [None, 3]),
    ]


def test_the_command_draws_and_says_it(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["compare", "runs/a", "runs/b", "--output", "out"]) == 0
    said = capsys.readouterr().out
    for text in ("unfinished", "1,234", "567", "2.250", "3.500", "4e+03", "class_path"):
        assert text in said
    page = (runs.parent / "out" / "table.md").read_text()
    assert "| state | finished | unfinished |" in page
    assert "| model.ffn_rules[0].ffn.class_path | x | y\\|z |" in page
    assert (runs.parent / "out" / "runs.png").read_bytes().startswith(b"\x89PNG")
    first, second = json.loads((runs.parent / "out" / "results.json").read_text())
    assert first["train"]["loss"] == [4.0, 3.0, 2.5, 2.25]
    assert second["finished"] is False


def test_what_was_not_recorded_is_not_drawn(runs):
    write(runs / "c", [3.0, 2.0], OPTIONS, flops=False, val=False)
    run = read_run("runs/c")
    assert (run.flops, run.val_loss) == (None, None)
    figure = draw_runs([("c", run.train, run.val)])
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens", "training time (s)"]
    both = draw_runs([("a", (a := read_run("runs/a")).train, a.val), ("c", run.train, run.val)])
    assert len(both.axes) == 3
    drawn = [len(line.get_xdata()) for line in both.axes[1].lines]
    assert drawn == [4, 1, 0, 0]  # of the second, nothing over FLOPs


def test_a_single_point_has_a_mark(runs):
    write(runs / "one", [3.0], OPTIONS)
    run = read_run("runs/one")
    for axes in draw_runs([("one", run.train, run.val)]).axes:
        assert [len(line.get_xdata()) for line in axes.lines] == [1, 1]
        assert all(line.get_marker() not in (None, "None", "") for line in axes.lines)
    many = np.linspace(4, 3, 60).tolist()
    write(runs / "many", many, OPTIONS)
    run = read_run("runs/many")
    line = draw_runs([("many", run.train, run.val)]).axes[0].lines[0]
    assert line.get_marker() == "None"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a"], "runs: give at least two directories of moezoo fit"),
        (["runs/a", "runs/../runs/a"], "runs: one directory is given twice"),
        (["runs/a", "runs"], "runs: runs is no run of moezoo fit: it has no config.yaml"),
        (["runs/a", "nowhere"], "runs: nowhere is no run of moezoo fit: there is no such direct"),
        (["runs/a", "runs/empty"], "runs: runs/empty has logged no loss yet"),
        (["runs/a", "runs/bad"], "runs: runs/bad/metrics.csv is damaged"),
        (["runs/a", "runs/b", "--seeds", "[1]"], "seeds: no such option"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(words, message, runs, capsys):
    write(runs / "empty", [1.0], OPTIONS)
    (runs / "empty" / "metrics.csv").write_text(COLUMNS + "\n")
    write(runs / "bad", [1.0], OPTIONS)
    (runs / "bad" / "metrics.csv").write_text(COLUMNS + "\n1,10,much,5,1000,,\n")
    assert main(["compare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (runs / "compare").exists()
