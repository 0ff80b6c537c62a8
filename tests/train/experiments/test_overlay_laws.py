"""Scaling laws of directories of runs, on the command line."""

import json
from pathlib import Path

import pytest
import yaml

from moezoo.__main__ import main
from moezoo_models import MoezooConfig
from moezoo_train.plan.laws import AverageLaw, MeanCount, read_laws

LAW = AverageLaw(E=2.0, A=40.0, alpha=0.4, B=60.0, beta=0.35)
WIDTHS, STEPS = (16, 32, 64), (200, 3000)


def weights(width):
    return 2 * (4 * width**2 + 3 * width * 48)


def write(folder, width, steps, report=True, ffn=None):
    """Write what a run leaves whose loss follows the law: a hundred tokens a step."""
    (folder / "model").mkdir(parents=True)
    loss = LAW.loss(MeanCount(weights(width)), 100 * steps)
    header = "step,tokens,train/loss,train/tokens_per_second,val/loss"
    rows = [header, f"{steps},{100 * steps},{loss},5,", f"{steps},{100 * steps},,,{loss}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"d_model": width}}))
    if report:
        (folder / "report.json").write_text(json.dumps({"steps": steps}))
    rule = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 48}}
    fields = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
    MoezooConfig(hidden_size=width, ffn=[ffn or rule], **fields).save_pretrained(folder / "model")


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for width in WIDTHS:
        for steps in (*STEPS, 600 + 10 * width):
            found.append(f"runs/{width}_{steps}")
            write(tmp_path / found[-1], width, steps)
    return found


def test_a_law_is_fitted_and_written_beside_the_runs(names, capsys):
    assert main(["compare", *names, "--law", "all", "--output", "out"]) == 0
    ((law, reach),) = read_laws("out/laws.json")  # none is sparse, so there is one law
    for name, value in vars(LAW).items():
        assert getattr(law, name) == pytest.approx(value, rel=0.02), name
    assert reach.parameters == pytest.approx((weights(16), weights(64)))
    assert reach.tokens == (20_000, 300_000)
    (written,) = json.loads(Path("out/laws.json").read_text())
    assert [run["name"] for run in written["runs"]] == names
    assert max(abs(run["error_left_out"]) for run in written["runs"]) < 1e-3
    page = Path("out/table.md").read_text()
    assert "published (Chinchilla, dense: arXiv:2203.15556)" in page
    assert "L = E + A / N^alpha + B / D^beta" in page
    assert "laws.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("law", "spoil", "message"),
    [
        ("averge", None, "law: 'averge' is not known; did you mean 'average'?"),
        ("sparse", None, "runs: the sparse law wants three values of sparsity or more, and these"),
        ("average", "report", "runs: runs/16_200 has not ended with a validation, which laws are"),
        ("average", "model", "runs: runs/16_200/model/config.json is no model of this library"),
        ("all", "mixture", "runs: runs/16_200: layer 0 is a SparseMoE; these laws are of dense"),
    ],
)
def test_what_makes_no_law_is_said_before_anything_is_written(names, law, spoil, message, capsys):
    first = Path(names[0])
    if spoil == "mixture":
        for file in (*first.glob("model/*"), *(p for p in first.iterdir() if p.is_file())):
            file.unlink()
        (first / "model").rmdir()
        first.rmdir()
        rule = {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": {"num_experts": 2}}
        write(first, 16, 200, ffn=rule)
    elif spoil:
        (first / {"report": "report.json", "model": "model/config.json"}[spoil]).unlink()
    assert main(["compare", *names, "--law", law, "--output", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moezoo: error: {message}")
    assert not Path("out").exists()
