"""Every mistake on the command line or in YAML becomes one line that names the key and the fix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest

import moezoo
from moezoo.command.messages import one_line, render, suggest
from moezoo.command.parser import function_parser, run_function
from moezoo.errors import InputError


@dataclass
class Schedule:
    name: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 10


@dataclass
class Rule:
    layers: str | list[int]
    ffn: Callable[[int], moezoo.FeedForward]


@dataclass
class Model:
    d_model: int = 8
    ffn: Callable[[int], moezoo.FeedForward] = moezoo.DenseFFN
    rules: list[Rule] | None = None
    schedule: Schedule | None = None


@dataclass
class Data:
    batch_size: int = 4
    shuffle: bool = True


def train(
    output: str,
    model: Model = Model(),  # noqa: B008
    data: Data = Data(),  # noqa: B008
    rate: float = 1.0,
    precision: Literal[32, "bf16-mixed"] | None = None,
    quick: bool = False,
) -> None:
    """Train a toy.

    Args:
        output: Where to write.
    """
    raise InputError(f"reached: {output} {model.d_model} {quick}")


def mistake(*arguments: str, config: str | None = None, tmp_path=None) -> str:
    given = ["--output", "here", *arguments]
    if config is not None:
        path = tmp_path / "config.yaml"
        path.write_text(config)
        given += ["--config", str(path)]
    with pytest.raises(InputError) as caught:
        run_function(train, "moezoo train", given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MOE = "--model.ffn=moezoo.SparseMoE"
ON_THE_LINE = [
    (["--model.d_modl=4"], "model.d_modl: no such option; did you mean 'model.d_model'?"),
    (["--model.d_mode=4"], "model.d_mode: no such option; did you mean 'model.d_model'?"),
    (["--batch_sise", "4"], "batch_sise: no such option; did you mean 'data.batch_size'?"),
    (["--zzz", "4"], "zzz: no such option"),
    (["--model.d_model=x"], "model.d_model: 'x' is not a whole number"),
    (["--model.d_model"], "model.d_model: a value is missing; write --model.d_model VALUE"),
    (["--rate=hot"], "rate: 'hot' is not a number"),
    (["--data.shuffle=maybe"], "data.shuffle: 'maybe' is not true or false"),
    (
        ["--precision=bf16"],
        "precision: 'bf16' is not one of 32, bf16-mixed; did you mean 'bf16-mixed'?",
    ),
    (["stray"], "unexpected argument 'stray'; options are written --name value"),
    (
        [MOE, "--model.ffn.num_expert=3"],
        "model.ffn.init_args.num_expert: SparseMoE has no option 'num_expert'; "
        "did you mean 'num_experts'?",
    ),
    (
        [MOE, "--model.ffn.router.scor=sigmoid"],
        "model.ffn.init_args.router.scor: SparseMoE has no option 'router.scor'; "
        "did you mean 'router.score'?",
    ),
    (
        [MOE, "--model.ffn.router.score=softmaxx"],
        "model.ffn.init_args.router.score: 'softmaxx' is not one of softmax, sigmoid, "
        "sqrt_softplus, sparse_mixer, relu; did you mean 'softmax'?",
    ),
    (
        [MOE, "--model.ffn.num_experts=many"],
        "model.ffn.init_args.num_experts: 'many' is not a whole number",
    ),
    (
        ["--model.ffn=moezoo.SparseMoe"],
        "model.ffn: there is no 'moezoo.SparseMoe'; did you mean 'moezoo.SparseMoE'?",
    ),
    (
        [MOE, "--model.ffn.d_model=3"],
        "model.ffn.init_args.d_model: cannot be given here; it follows from the model",
    ),
    (["--model.ffn=nowhere.Layer"], "model.ffn: there is no module 'nowhere'"),
    (["--model.ffn=moezoo.zoo"], "model.ffn: Expected 'moezoo.zoo' to be a function that returns"),
    (["--model.rules=[{layers: all}]"], "model.rules.ffn: is required; add it"),
    (
        ["--model.rules=[{layers: 2.5, ffn: moezoo.DenseFFN}]"],
        "model.rules.layers: '2.5' is not text or a list",
    ),
    (
        [MOE, "--model.ffn.router=3"],
        "model.ffn.init_args.router: '3' is neither options nor a YAML file",
    ),
    (
        [MOE, "--model.ffn.capacity=3"],
        "model.ffn.init_args.capacity: '3' is not a group of options or null",
    ),
    (
        ["--model.ffn=SparsMoE"],
        "model.ffn: 'SparsMoE' is not a known class; did you mean 'SparseMoE'?",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), ON_THE_LINE, ids=lambda value: str(value)[:40])
def test_mistakes_on_the_line(arguments, expected):
    assert mistake(*arguments).startswith(expected)


IN_YAML = [
    ("model: {d_modl: 3}", "model.d_modl: no such option; did you mean 'model.d_model'?"),
    ("modle: {d_model: 3}", "modle.d_model: no such option; did you mean 'model.d_model'?"),
    ("model: {d_model: [3]}", "model.d_model: '[3]' is not a whole number"),
    ("data: 3", "data: 3 is not a group of options; give e.g. data.batch_size"),
    ("data: null", "data: null is not a group of options; give e.g. data.batch_size"),
    ("rate: null", "rate: null is not a value of it; leave it out for its default"),
    ("data: {shuffle: null}", "data.shuffle: null is not a value of it; leave it out for its"),
    ("data: many", "data: 'many' is neither options nor a YAML file of them"),
    (
        "model: {schedule: {warmupp: 3}}",
        "model.schedule.warmupp: Schedule has no option 'warmupp'; did you mean 'warmup'?",
    ),
    (
        "model: {schedule: {name: cosin}}",
        "model.schedule.name: 'cosin' is not one of cosine, wsd; did you mean 'cosine'?",
    ),
    (
        "model: {ffn: {class_path: moezoo.SparseMoE, init_args: {num_expert: 3}}}",
        "model.ffn.init_args.num_expert: SparseMoE has no option 'num_expert'; "
        "did you mean 'num_experts'?",
    ),
    (
        "model: {ffn: {class_path: moezoo.SparseMoE, init_arg: {num_experts: 3}}}",
        "model.ffn.init_arg: no such key; did you mean 'init_args'?",
    ),
    (
        "model: {ffn: {class_path: moezoo.SparseMoe}}",
        "model.ffn: there is no 'moezoo.SparseMoe'; did you mean 'moezoo.SparseMoE'?",
    ),
    (
        "model: {ffn: {class_path: moezoo.SparseMoE, init_args: {capacity: {facto: 2}}}}",
        "model.ffn.init_args.capacity.facto: CapacityOptions has no option 'facto'; "
        "did you mean 'factor'?",
    ),
    (
        "model: {rules: [{layer: all, ffn: moezoo.DenseFFN}]}",
        "model.rules.layer: Rule has no option 'layer'; did you mean 'layers'?",
    ),
    (
        "model: {rules: [{layers: all, ffn: {class_path: moezoo.DenseFFN, init_args: {dff: 3}}}]}",
        "model.rules.ffn.init_args.dff: DenseFFN has no option 'dff'; did you mean 'd_ff'?",
    ),
]


@pytest.mark.parametrize(("config", "expected"), IN_YAML, ids=lambda value: str(value)[:60])
def test_mistakes_in_yaml(config, expected, tmp_path):
    assert mistake(config=config, tmp_path=tmp_path).startswith(expected)


def test_null_where_it_may_be(tmp_path):
    config = "{model: {schedule: null, rules: null}, precision: null}"
    assert mistake(config=config, tmp_path=tmp_path) == "reached: here 8 False"


def test_a_list_of_classes_names_the_misspelt_one():
    message = """Parser key "hooks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[Any], <class 'moezoo.feed_forward.FeedForward'>, <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: DenseFN
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [{'class_path': 'DenseFN'}]"""
    assert render(message) == "hooks: 'DenseFN' is not a known class; did you mean 'DenseFFN'?"


def test_a_linked_option_names_its_source():
    message = 'Linked "model.vocab_size" must be given via "data.vocab_size".'
    assert render(message) == "model.vocab_size: follows from data.vocab_size; set that instead"


def test_a_required_option_is_asked_for():
    with pytest.raises(InputError, match=r"^output: is required; give --output$"):
        run_function(train, "moezoo train", [])


def test_right_options_reach_the_function():
    with pytest.raises(InputError, match="reached: here 12 True"):
        run_function(train, "x", ["--quick", "--output", "here", "--model.d_model=12"])


def test_a_bare_flag_may_stand_last_or_have_a_value():
    for arguments, quick in (
        (["--quick"], True),
        (["--quick=false"], False),
        ([], False),
        (["--quick", "--no-quick"], False),
        (["--quick", "--no_quick"], False),
    ):
        with pytest.raises(InputError, match=f"reached: here 8 {quick}"):
            run_function(train, "x", ["--output", "here", *arguments])


def test_help_shows_docstrings():
    text = function_parser(train, "moezoo train").format_help()
    assert "Train a toy." in text
    assert "Where to write." in text
    assert "print_config" not in text


def test_unknown_messages_come_back_on_one_line():
    assert render("something\n  else went\n  wrong") == "something else went wrong"
    assert one_line(" a\n b ") == "a b"


def test_suggestions_are_nearest_then_short_lists_then_help():
    assert suggest("trainer.max_step", ["trainer.max_steps", "x"]) == (
        "; did you mean 'trainer.max_steps'?"
    )
    assert suggest("zzz", ["b", "a"]) == "; choose from: a, b"
    assert suggest("zzz", [str(n) for n in range(100, 120)]) == "; --help lists the options"
