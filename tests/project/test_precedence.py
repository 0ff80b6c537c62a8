"""The command line counts over files wherever it stands, and nothing inherits what is not its."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import moezoo
from moezoo.command.parser import function_parser, run_function
from moezoo.command.precedence import ordered
from moezoo.errors import InputError
from moezoo_train import plan
from moezoo_train.plan.command import PlanCLI
from moezoo_train.run.cli import MoezooCLI, run


@dataclass
class Rule:
    layers: str | int
    ffn: Callable[[int], moezoo.FeedForward]


@dataclass
class Model:
    d_model: int = 8
    ffn: Callable[[int], moezoo.FeedForward] = moezoo.DenseFFN
    rules: list[Rule] | None = None


def train(model: Model = Model(), steps: int = 10) -> None:  # noqa: B008
    """Train a toy."""


FILE = """
steps: 20
model:
  d_model: 16
  ffn:
    class_path: moezoo.SparseMoE
    init_args: {num_experts: 4, top_k: 2, activation: relu}
  rules:
  - {layers: all, ffn: {class_path: moezoo.SparseMoE, init_args: {num_experts: 16, top_k: 4}}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "first.yaml"
    path.write_text(FILE)
    return str(path)


def parsed(*arguments: str):
    return function_parser(train, "moezoo train").parse_args(list(arguments))


GIVEN = (
    ["--model.ffn", "moezoo.PEER"],
    ["--model.ffn.num_experts=64"],
    ["--model.d_model", "32"],
)


def test_the_line_counts_in_every_order(file):
    orders = [
        list(itertools.chain(*order))
        for order in itertools.permutations([*GIVEN, ["--config", file]])
    ]
    assert len(orders) == 24
    for words in orders:
        options = parsed(*words)
        assert options.model.ffn.class_path == "moezoo.PEER", words
        assert options.model.ffn.init_args.num_experts == 64, words
        assert (options.model.d_model, options.steps) == (32, 20), words


@pytest.mark.parametrize("command", ["fit", "validate", "test", "plan"])
def test_in_every_command_of_lightning(command, file, tmp_path, monkeypatch):
    def stop(cli):
        raise InputError(str(cli.config[cli.config.subcommand].model.ffn))

    monkeypatch.setattr(MoezooCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(PlanCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(MoezooCLI, "set_ckpt_path", lambda cli: None)
    settings = tmp_path / "run.yaml"
    settings.write_text(FILE.partition("  rules:")[0].replace("steps: 20\n", ""))
    line = ["--model.ffn.num_experts", "64", "--model.ffn", "moezoo.PEER", "--config"]
    with pytest.raises(InputError, match=r"moezoo\.PEER.*num_experts=64.*top_k=16"):
        (plan.run if command == "plan" else run)([command, *line, str(settings)])


@pytest.mark.parametrize("choice", ["--model.ffn=moezoo.PEER", "--model.ffn.class_path=PEER"])
def test_another_class_begins_from_its_own_defaults(choice, file):
    """Its top_k, activation and width were those of the mixture in the file, which it also has."""
    arguments = parsed("--config", file, choice).model.ffn.init_args
    assert arguments == parsed(choice).model.ffn.init_args
    assert (arguments.top_k, arguments.activation, arguments.num_experts) == (16, "gelu", None)


def test_the_same_class_keeps_what_the_file_says(file):
    for same in ("moezoo.SparseMoE", "moezoo.layers.sparse_moe.SparseMoE"):
        arguments = parsed("--model.ffn", same, "--config", file).model.ffn.init_args
        assert (arguments.num_experts, arguments.activation) == (4, "relu")


def test_a_later_file_counts_and_inherits_nothing_from_another_class_or_list(file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(
        "model:\n  ffn: moezoo.SigmaMoE\n  rules:\n"
        "  - {layers: 3, ffn: {class_path: moezoo.SparseMoE, init_args: {num_experts: 2}}}\n"
    )
    options = parsed("--config", file, "--config", str(second))
    assert options.model.ffn == parsed("--model.ffn", "moezoo.SigmaMoE").model.ffn
    assert (options.model.d_model, options.steps) == (16, 20)
    (rule,) = options.model.rules
    assert (rule.layers, rule.ffn.init_args.num_experts, rule.ffn.init_args.top_k) == (3, 2, 2)


def test_a_list_on_the_line_takes_the_place_of_the_files(file):
    rules = "[{layers: 1, ffn: {class_path: moezoo.SparseMoE, init_args: {num_experts: 2}}}]"
    (rule,) = parsed("--config", file, "--model.rules", rules).model.rules
    assert rule.ffn.init_args.top_k == 2


def test_arguments_between_two_classes_are_refused():
    line = ["--model.ffn=moezoo.PEER", "--model.ffn.num_experts=64", "--model.ffn=moezoo.SigmaMoE"]
    with pytest.raises(InputError) as caught:
        run_function(train, "moezoo train", line)
    assert str(caught.value) == (
        "model.ffn: given more than once (moezoo.PEER, moezoo.SigmaMoE), and "
        "--model.ffn.num_experts does not say which of them it is for; give --model.ffn once"
    )
    assert parsed(line[0], line[2]).model.ffn.class_path == "moezoo.SigmaMoE"
    assert parsed(line[0], line[1], line[0]).model.ffn.init_args.num_experts == 64


def test_other_words_keep_their_order():
    words = ["fit", "--a", "1", "--hooks+", "A", "--hooks.x", "1", "--hooks+=B", "--hooks.x=2"]
    assert ordered([*words, "-c", "f", "--config=g"]) == [
        "fit",
        "-c",
        "f",
        "--config=g",
        *words[1:],
    ]
    places = ["source", "target", "--quick=true", "--steps", "-1"]
    assert ordered([*places, "--config", "f"]) == [*places[:2], "--config", "f", *places[2:]]
