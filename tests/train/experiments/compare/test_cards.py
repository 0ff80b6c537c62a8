"""Cards say what was measured, and nothing of methods that were not."""

import json

import pytest

from moezoo import InputError
from moezoo_train.experiments.compare.cards import write_cards


def mean(value, error=None):
    return {"value": value, "error": error, "count": 1}


def row(name, loss, gain=None, causal=True):
    return {
        "name": name,
        "layer": "SparseMoE",
        "layers": [0, 1],
        "causal": causal,
        "loss": loss and mean(loss, 0.01),
        "bits_per_byte": mean(2.0),
        "random_loss": None if gain is None else mean(loss + gain),
        "gain": None if gain is None else mean(gain),
        "total_parameters": 2_500_000,
        "active_parameters": 919_000,
        "flops_ratio": 0.9876,
    }


def run(name, usage=None):
    return {
        "run": f"{name}-3",
        "train_loss": 3.5,
        "evenness": 0.91,
        "busiest": None,
        "usage": usage,
        "unevenness": None,
        "identity": {"ffn": {"init_args": {"num_experts": 8}}},
    }


@pytest.fixture
def comparison(tmp_path):
    rows = [
        row("mixtral", 3.75, 0.2),
        row("expert_choice", 3.5, -0.1, causal=False),
        row("dense_mlp", 4.0),
        row("hash", None),
        row("not_of_the_zoo", 3.0),
    ]
    whole = {
        "rows": rows,
        "runs": [run(each["name"], usage=0.5) for each in rows],
        "notes": ["2 blocks.", "abacus.", "Failed: hash"],
        "experiment": {"baseline": "dense_mlp", "seeds": [3], "model": {"num_layers": 2}},
    }
    (tmp_path / "results.json").write_text(json.dumps(whole))
    return tmp_path


def test_a_card_holds_the_figures_of_its_row(comparison, tmp_path):
    written = write_cards(comparison, tmp_path / "cards")
    assert {path.name for path in written} == {"mixtral.md", "expert_choice.md", "dense_mlp.md"}
    text = (tmp_path / "cards" / "mixtral.md").read_text()
    assert "arXiv:2401.04088" in text
    for line in (
        "| validation loss | 3.750 ± 0.010 nats per token |",
        "| the same with random routing | 3.950 |",
        "| dense_mlp, same tokens | 4.000 ± 0.010 |",
        "| slots used in a batch | 0.500 |",
        '  "num_experts": 8',
    ):
        assert line in text.splitlines()
    assert "busiest" not in text
    assert "Failed" not in text


def test_a_card_says_what_speaks_against_its_method(comparison, tmp_path):
    write_cards(comparison, tmp_path / "cards")
    text = (tmp_path / "cards" / "expert_choice.md").read_text()
    assert "Not causal" in text
    assert "not better than its own random routing" in text


def test_without_a_comparison_there_are_no_cards(tmp_path):
    with pytest.raises(InputError, match="holds no results"):
        write_cards(tmp_path / "nowhere", tmp_path / "cards")
    assert not (tmp_path / "cards").exists()
