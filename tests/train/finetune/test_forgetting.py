"""The forgetting experiment: every method teaches from the same model, and runs resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.__main__ import main
from moezoo.command.parser import function_parser
from moezoo.errors import InputError
from moezoo_train.experiments.forgetting import (
    BaseOptions,
    FactOptions,
    Teaching,
    compare_forgetting,
)
from moezoo_train.experiments.forgetting_report import (
    TeachingResult,
    at_level,
    draw,
    forgotten,
    settings,
    verdict,
)
from moezoo_train.experiments.made_up_facts import make_facts, tie_anew
from moezoo_train.finetune.lora import LoRAOptions

pytest.importorskip("peft", reason="needs moezoo[lora]")

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

RECIPE = Path(__file__).parents[3] / "configs" / "experiments" / "forgetting" / "small.yaml"
CONFIG = """
seeds: [1]
max_steps: 2
sequence_length: 16
batch_size: 2
background_batches: 3
model: {d_model: 16, num_layers: 2, num_heads: 2}
base:
  memory: {num_keys: 8, num_heads: 2, top_k: 2, value_pool: shared}
  layers: [0, 1]
  max_steps: 2
  optimizer: {lr: 1.0e-3}
  schedule: {warmup_steps: 0}
text: {vocab_size: 300, val_fraction: 0.2, sequence_length: 32, batch_size: 2}
facts: {old: 4, old_repeats: 1, new: 6, values: 3, taught: [0, 1], asked: [4]}
methods:
  sparse memory: {rows: 5, rates: [1.0], optimizer: {name: sgd}}
  LoRA: {lora: {rank: 2}, rates: [0.01]}
  full: {rates: [0.0]}
"""


def test_methods_are_taught_and_asked_and_runs_are_not_repeated(corpus, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    places = {"output": tmp_path / "out", "text.source": corpus, "text.data_dir": tmp_path / "data"}
    command = ["compare", "forgetting", f"--config={tmp_path / 'config.yaml'}"]
    command += [f"--{name}={value}" for name, value in places.items()]
    assert main(command) == 0

    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())["results"]
    tried = [(row["method"], row["rate"]) for row in results]
    methods = [("sparse memory", 1.0), ("LoRA", 0.01), ("full", 0.0)]
    assert tried == [("before", 0.0), *methods]
    # With a learning rate of zero nothing is learned and nothing forgotten.
    assert without_name(results[3]) == without_name(results[0])
    assert len({row["text_loss"] for row in results}) == 3
    assert all(0 <= row["new_facts"] <= 1 for row in results)
    assert (out / "forgetting.png").stat().st_size > 10_000
    assert "Where each recalls" in (out / "table.md").read_text()
    # The first four facts are in the text before, the others are taught with values of the seed.
    facts = make_facts(10, values=3)
    told = (out / "facts" / "1" / "facts.jsonl").read_text()
    assert all((fact.subject in told) == (number >= 4) for number, fact in enumerate(facts))
    assert facts[5].question(1) in told
    assert facts[5].question(2) not in told
    assert all(fact.sentence(0) in told for fact in tie_anew(facts[4:], 1))
    text = (out / "text.jsonl").read_text()
    assert all((fact.subject in text) == (number < 4) for number, fact in enumerate(facts))
    rows = [json.loads(line)["text"] for line in text.splitlines()]
    documents = [path.read_text() for path in sorted(corpus.iterdir())]
    held_out = [number for number, document in enumerate(documents) if document not in rows]
    assert held_out == [0, 5, 10, 15, 20, 25]

    runs = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(runs) == 4
    gone = out / "runs" / "sparse_memory-1-1" / "result.json"
    gone.unlink()
    more = (
        "{sparse memory: {rows: 5, rates: [1.0, 2.0], optimizer: {name: sgd}}, full: {rates: [0]}}"
    )
    assert main([*command, f"--methods={more}"]) == 0
    again = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert {path for path in runs if runs[path] != again[path]} == {gone}
    repeated = json.loads((out / "results.json").read_text())["results"]
    assert [row["rate"] for row in repeated] == [0.0, 1.0, 2.0, 0.0]
    assert without_time(repeated[1]) == without_time(results[1])


def test_the_recipe_parses():
    parser = function_parser(compare_forgetting, "moezoo compare forgetting")
    options = parser.instantiate(parser.parse_args([f"--config={RECIPE}"]))

    teaching = options["methods"]["sparse memory"]
    assert isinstance(teaching, Teaching)
    assert teaching.optimizer.name == "sgd"
    assert isinstance(options["methods"]["LoRA"].lora, LoRAOptions)
    assert isinstance(options["base"], BaseOptions)


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "seconds"}


def without_name(row: dict) -> dict:
    return {name: value for name, value in without_time(row).items() if name != "method"}


def made(
    method: str, rate: float, seed: int, new: float, old: float, loss: float
) -> TeachingResult:
    return TeachingResult(method, rate, seed, loss, old, new, new)


OUTCOMES = [
    *(made("before", 0.0, seed, 0.0, 0.8, 2.0) for seed in (0, 1)),
    *(made("a", 1.0, seed, 0.5, 0.8, 2.0) for seed in (0, 1)),
    *(made("a", 2.0, seed, 0.9, 0.4 + 0.2 * seed, 2.1) for seed in (0, 1)),
    *(made("b", 0.1, seed, 0.7, 0.2, 2.5 + seed) for seed in (0, 1)),
]


def test_settings_average_over_seeds():
    found = settings(OUTCOMES)

    assert [(each.method, each.rate) for each in found] == [
        ("before", 0.0),
        ("a", 1.0),
        ("a", 2.0),
        ("b", 0.1),
    ]
    assert found[2].old_facts.value == pytest.approx(0.5)
    assert found[2].old_facts.error == pytest.approx(0.1)
    assert forgotten(found[3], found[0]) == pytest.approx(0.75)


def test_the_verdict_compares_at_equal_learning():
    found = settings(OUTCOMES)
    best, equal = verdict(found).split("\n\n")

    assert "- a (2): 90% of the new facts, 38% of the old ones forgotten, text loss +0.100" in best
    assert "- b (0.1): 70% of the new facts, 75% of the old ones forgotten, text loss +1.0" in best
    assert equal.startswith("Where each recalls 70% of the new facts")
    # Half-way between a's rates: 0.8 and 0.5 of the old facts, losses 2.0 and 2.1.
    assert "- a: 19% of the old ones forgotten, text loss +0.050" in equal
    assert "- b: 75% of the old ones forgotten, text loss +1.000" in equal
    assert at_level([found[0], found[1]], 0.1) == pytest.approx((0.8, 2.0))


def test_a_method_that_learns_little_does_not_lower_the_level_of_the_others():
    little = [made("c", rate, seed, 0.2, 0.8, 2.0) for rate in (1.0, 2.0) for seed in (0, 1)]
    some = [made("c", 1.0, seed, 0.4, 0.8, 2.0) for seed in (0, 1)]
    equal = verdict(settings([*OUTCOMES, *little])).split("\n\n")[1]
    assert equal.startswith("Where each recalls 70% of the new facts")
    assert equal.endswith("- c: no more than 20% at any rate")
    equal = verdict(settings([*OUTCOMES, *some])).split("\n\n")[1]
    assert equal.startswith("Where each recalls 40% of the new facts")


def test_the_picture_has_a_line_per_method_in_both_panels():
    figure = draw(settings(OUTCOMES))

    for axes in figure.axes:
        lines = {box.get_label(): box.lines[0].get_xydata() for box in axes.containers}
        assert set(lines) == {"a", "b"}
        assert lines["a"][:, 0] == pytest.approx([0, 50, 90])


@pytest.mark.parametrize("wrong", [{"old": 0}, {"taught": ()}, {"asked": (6,)}])
def test_facts_that_cannot_be_told_are_refused(wrong):
    with pytest.raises(InputError, match=f"facts.{next(iter(wrong))}"):
        FactOptions(**wrong)
