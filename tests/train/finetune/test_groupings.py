"""Groupings of a dense model's neurons: the same start, the same tokens, one table."""

import json

import pytest

from moezoo.__main__ import main
from moezoo_train.data.prepare import prepare
from moezoo_train.data.windows import TrainBatches
from moezoo_train.experiments import carving

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
PLAIN = {"router": "cmoe", "refit": False}
GROUPINGS = {
    "cmoe": {"split": "cmoe", **PLAIN},
    "random": {"split": "random", "shared_by": "cmoe", **PLAIN},
}


@pytest.fixture
def options(directory, corpus, tmp_path):
    start = directory("llama")
    prepare(source=str(corpus), output=tmp_path / "data", tokenizer=str(start))
    values = {
        "source": start,
        "output": tmp_path / "out",
        "groupings": json.dumps(GROUPINGS),
        "sizes": "[S1A2E6]",
        "seeds": "[1, 2]",
        "calibration": corpus,
        "calibration_tokens": 256,
        "max_steps": 2,
        "text.data_dir": tmp_path / "data",
        "text.sequence_length": 16,
        "text.batch_size": 2,
        "schedule.name": "constant",
        "schedule.warmup_steps": 1,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def test_all_groupings_begin_and_learn_alike(options, tmp_path, monkeypatch, capsys):
    read, carved = [], []
    item, carve = TrainBatches.__getitem__, carving.carve

    def recording(self, index):
        batch = item(self, index)
        read.append(batch["input_ids"].tolist())
        return batch

    def held_out(*arguments, **rest):
        carved.append((arguments[2:], rest["seed"], rest["split"]))
        return carve(*arguments, held_out_tokens=128, **rest)

    monkeypatch.setattr(TrainBatches, "__getitem__", recording)
    monkeypatch.setattr(carving, "carve", held_out)
    assert main(["compare", "carving", *options]) == 0
    assert len(read) == 2 * 2 * (1 + 2)
    by_run = [read[start : start + 2] for start in range(0, len(read), 2)]
    dense, of_carves = by_run[:2], by_run[2:]
    assert dense[0] != dense[1]
    assert all(batches == dense[0] for batches in of_carves[:2])
    assert all(batches == dense[1] for batches in of_carves[2:])
    assert [each[1] for each in carved] == [1] * 2 + [2] * 2
    assert {each[0] for each in carved} == {(1, 2, 6)}

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = results["runs"]
    assert len(runs) == 6
    for seed in (1, 2):
        assert runs[f"S1A2E6-random-{seed}"]["before"] != runs[f"dense-{seed}"]["before"]
        assert runs[f"dense-{seed}"]["after"] != runs[f"dense-{seed}"]["before"]
    assert runs["dense-1"]["before"] == runs["dense-2"]["before"]
    assert len(results["verdicts"]) == 2
    first = results["verdicts"][0]
    assert first["claim"] == "S1A2E6, carved, untrained: cmoe is better than random"
    gaps = [
        runs[f"S1A2E6-random-{seed}"]["before"] - runs[f"S1A2E6-cmoe-{seed}"]["before"]
        for seed in (1, 2)
    ]
    assert first["difference"]["value"] == pytest.approx(sum(gaps) / 2)
    assert not list((tmp_path / "out").rglob("start"))

    read.clear()
    assert main(["compare", "carving", *options]) == 0
    assert not read
    capsys.readouterr()
    assert main(["compare", "carving", *options, "--groupings.cmoe", '{"splits": "cmoe"}']) == 2
    assert "groupings.cmoe.splits: no such option; did you mean 'split'?" in capsys.readouterr().err
    assert main(["compare", "carving", *options, "--sizes", "[S1A2E7]"]) == 2
    assert "groupings.cmoe at S1A2E7: experts: 7 does not divide" in capsys.readouterr().err
