"""The experiments from end to end on little text: what is paired, resumed, measured and refused."""

import json
import math
from pathlib import Path

import pytest

from moezoo import FastFeedForward
from moezoo.__main__ import main
from moezoo_train.experiments import facts as recall
from moezoo_train.experiments import hardening
from moezoo_train.measure.throughput import ffn_layers

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
SMALL = [
    "--max_steps=3",
    "--seeds=[0, 1]",
    "--model.d_model=16",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--schedule.name=constant",
    "--schedule.warmup_steps=1",
]


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        lines = [f"def f{n}(a, b):\n    return a * {n * number} + b\n" for n in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def trees(texts, tmp_path) -> list[str]:
    options = {
        "trees": json.dumps({"none": {"hardening": 0.0}, "firm": {"hardening": 30.0}}),
        "depths": "[2]",
        "output": tmp_path / "out",
        "text.source": texts,
        "text.data_dir": tmp_path / "data",
        "text.vocab_size": 300,
        "text.sequence_length": 16,
        "text.batch_size": 4,
        "text.val_fraction": 0.2,
    }
    return [*SMALL, *(f"--{name}={value}" for name, value in options.items())]


def test_the_same_trees_are_validated_soft_and_hard(trees, tmp_path, monkeypatch, capsys):
    seen = []
    own = hardening.validate

    def spying(module, *rest):
        layers = [each for each in ffn_layers(module.model) if isinstance(each, FastFeedForward)]
        weights = sum(float(p.detach().double().abs().sum()) for p in module.parameters())
        seen.append(({layer.hard for layer in layers}, len(layers), weights))
        return own(module, *rest)

    monkeypatch.setattr(hardening, "validate", spying)
    assert main(["compare", "hardening", *trees]) == 0
    assert len(seen) == 2 * 2 * (1 + 2)
    for soft, hard in zip(seen[::2], seen[1::2], strict=True):
        assert soft == ({False}, 2, soft[2])
        assert hard == ({True}, 2, soft[2])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = results["runs"]
    for seed in (0, 1):
        dense = runs[f"dense-{seed}"]
        assert dense["soft"] == pytest.approx(dense["hard"], rel=1e-6)
        free, firm = (runs[f"{name}-2-{seed}"] for name in ("none", "firm"))
        assert free["soft"] != free["hard"]
        assert firm["entropy"] < free["entropy"] < math.log(2)
        assert 0.25 <= free["busiest"] <= 1
    assert [verdict["claim"].split(":")[0] for verdict in results["verdicts"]] == [
        f"depth 2, hardening {name}" for name in ("none", "firm")
    ]
    gaps = [runs[f"none-2-{seed}"]["hard"] - runs[f"none-2-{seed}"]["soft"] for seed in (0, 1)]
    assert results["verdicts"][0]["difference"]["value"] == pytest.approx(sum(gaps) / 2)
    assert (tmp_path / "out" / "losses.png").stat().st_size > 10_000

    # Again: what is finished is not repeated, and another strength trains its own runs only.
    seen.clear()
    changed = [option.replace("30.0", "20.0") for option in trees]
    assert main(["compare", "hardening", *changed]) == 0
    assert len(seen) == 2 * 2
    again = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert {n: f for n, f in again.items() if not n.startswith("firm")} == {
        name: figures for name, figures in runs.items() if not name.startswith("firm")
    }
    capsys.readouterr()
    bad = [option.replace("30.0", "-1.0") for option in trees]
    assert main(["compare", "hardening", *bad]) == 2
    assert capsys.readouterr().err == (
        "moezoo: error: trees.firm.hardening: -1 is out of range; give a number ≥ 0\n"
    )


@pytest.fixture
def facts(tmp_path) -> list[str]:
    options = {
        "methods": json.dumps(
            {"dense_mlp": {}, "memory_plus": {"arguments": {"num_keys": 8, "top_k": 4}}}
        ),
        "claims": "[[memory_plus, dense_mlp]]",
        "facts": "[8, 16]",
        "values": 4,
        "asked": 10,
        "output": tmp_path / "out",
        "vocab_size": 300,
        "sequence_length": 16,
        "batch_size": 2,
    }
    return [*SMALL, *(f"--{name}={value}" for name, value in options.items())]


def test_all_are_asked_for_the_facts_they_read(facts, tmp_path, monkeypatch, capsys):
    asked = []
    own = recall.recall

    def spying(model, tokenizer, told, wordings):
        asked.append((tuple(fact.subject for fact in told), tokenizer.fingerprint()))
        return own(model, tokenizer, told, wordings)

    monkeypatch.setattr(recall, "recall", spying)
    assert main(["compare", "facts", *facts]) == 0
    assert len(asked) == 8
    # One tokenizer for all; the fewer facts are the first of the many.
    assert len({tokenizer for _, tokenizer in asked}) == 1
    assert {len(subjects) for subjects, _ in asked} == {8, 10}
    (few, *_), (many, *_) = ([s for s, _ in asked if len(s) == n] for n in (8, 10))
    assert few == many[:8]
    for number in (8, 16):
        file = tmp_path / "out" / "data" / str(number) / "facts.jsonl"
        text = "\n".join(json.loads(line)["text"] for line in file.read_text().splitlines())
        assert all(subject in text for subject in few)
        assert (many[-1] in text) == (number == 16)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = results["runs"]
    assert len(runs) == 8
    assert all(0 <= run["accuracy"] <= 1 and run["loss"] > 0 for run in runs.values())
    assert all(abs(run["flops_ratio"] - 1) < 0.05 for run in runs.values())
    (first, _) = results["verdicts"]
    differences = [
        runs[f"8-memory_plus-{seed}"]["accuracy"] - runs[f"8-dense_mlp-{seed}"]["accuracy"]
        for seed in (0, 1)
    ]
    assert first["difference"]["value"] == pytest.approx(sum(differences) / 2)

    asked.clear()
    assert main(["compare", "facts", *facts]) == 0
    assert not asked
    capsys.readouterr()
    assert main(["compare", "facts", *facts, "--claims", "[[memory_plus, dense]]"]) == 2
    assert "claims: 'dense' is not known; did you mean 'dense_mlp'?" in capsys.readouterr().err
