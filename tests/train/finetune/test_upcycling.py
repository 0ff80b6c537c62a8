"""Upcycled against continued dense training: equal FLOPs, the same tokens, one table."""

import json

import pytest

from moezoo.__main__ import main
from moezoo_train.data.prepare import prepare
from moezoo_train.data.windows import TrainBatches
from moezoo_train.experiments.upcycling import ContenderResult, verdict

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture
def options(directory, corpus, tmp_path):
    start = directory("llama")
    prepare(source=str(corpus), output=tmp_path / "data", tokenizer=str(start))
    values = {
        "source": start,
        "output": tmp_path / "out",
        "experts": 4,
        "to": "mixtral",
        "max_steps": 6,
        "text.data_dir": tmp_path / "data",
        "text.sequence_length": 16,
        "text.batch_size": 2,
        "schedule.warmup_steps": 1,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def test_contenders_cost_the_same_and_read_the_same(options, tmp_path, monkeypatch, capsys):
    read = []
    own = TrainBatches.__getitem__

    def recording(self, index):
        batch = own(self, index)
        read.append(batch["input_ids"].tolist())
        return batch

    monkeypatch.setattr(TrainBatches, "__getitem__", recording)
    assert main(["compare", "upcycling", *options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    rows = {row["name"]: row for row in results}
    assert list(rows) == ["dense", "upcycled", "drop-upcycled, 0.5", "dense, same tokens"]
    dense, upcycled, dropped, shorter = rows.values()
    per_token = dense["flops"] / dense["tokens"], upcycled["flops"] / upcycled["tokens"]
    assert upcycled["steps"] == dropped["steps"] == round(6 * per_token[0] / per_token[1]) < 6
    assert shorter["tokens"] == upcycled["tokens"] == 32 * upcycled["steps"]
    assert upcycled["flops"] == pytest.approx(dense["flops"], rel=0.5 / upcycled["steps"])
    # One block more is active per token and layer, and four are there instead of one.
    block = 3 * 16 * 48
    assert upcycled["active_parameters"] == dense["total_parameters"] + 2 * (block + 4 * 16)
    assert upcycled["total_parameters"] == dense["total_parameters"] + 2 * (3 * block + 4 * 16)
    assert upcycled["start_loss"] == pytest.approx(dense["start_loss"], rel=1e-6)
    assert dropped["start_loss"] != pytest.approx(dense["start_loss"], rel=1e-6)
    assert all(row["val_loss"] < row["start_loss"] for row in rows.values())

    n = upcycled["steps"]
    first = read[:6]
    assert read[6 : 6 + n] == read[6 + n : 6 + 2 * n] == first[:n]
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{dense['val_loss']:.4f}" in table
    assert "At equal FLOPs" in table
    assert "At equal FLOPs" in capsys.readouterr().out

    assert main(["compare", "upcycling", *options]) == 2
    assert "output: " in (message := capsys.readouterr().err)
    assert "is there already; name a new directory" in message


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((2.0, 1.9, 1.95), "upcycled is ahead of continued dense training by 0.1000"),
        ((1.9, 2.0, 1.95), "continued dense training is ahead of drop-upcycled, 0.5 by 0.0500"),
    ],
)
def test_the_verdict_names_who_is_ahead(losses, said):
    names = ("dense", "upcycled", "drop-upcycled, 0.5")
    outcomes = [
        ContenderResult(name, 1, 1, 1.0, 1, 1, 3.0, loss, 1.0, 1.0)
        for name, loss in zip(names, losses, strict=True)
    ]
    assert said in verdict(outcomes)
