"""Names in the place of layers and files: methods of the zoo, and recipes."""

import functools
import json

import jsonargparse
import pytest
import torch

import moezoo
from moezoo.__main__ import main
from moezoo.command import recipes
from moezoo.command.names import layer_of, with_method_words, with_methods
from moezoo.command.parser import check_config_files
from moezoo.errors import InputError
from moezoo_train.run.cli import run

METHODS = {method.name: method for method in moezoo.zoo()}


@functools.cache
def parser() -> jsonargparse.ArgumentParser:
    return jsonargparse.capture_parser(lambda: run(["fit"]))


def parse(*words: str) -> jsonargparse.Namespace:
    return parser().parse_args(["fit", *words]).fit.model


def layer(options: jsonargparse.Namespace) -> dict:
    return options.ffn.as_dict()


@pytest.mark.parametrize("name", METHODS)
def test_a_name_stands_for_the_method_with_its_defaults(name):
    written = json.loads(json.dumps(layer_of(name)))
    with torch.device("meta"):
        named = moezoo.FeedForward.from_config(written, d_model=64)
        expected = METHODS[name].build(64)
    assert named.config() == expected.config()


def test_the_option_and_yaml_mean_the_same(tmp_path):
    path = tmp_path / "named.yaml"
    path.write_text(
        "model:\n  ffn: smallthinker\n  ffn_rules:\n    - {layers: [1], ffn: switch}\n"
        "    - layers: [2]\n      router_input: ffn_input\n"
        "      ffn: {class_path: smallthinker, init_args: {router: {scale: 2.0}}}\n"
    )
    read, given = parse("--config", str(path)), parse("--model.ffn", "smallthinker")
    assert layer(read) == layer(given)
    assert read.router_input == given.router_input == "pre_attention"
    switch, changed = read.ffn_rules
    assert layer(switch) == layer(parse("--model.ffn=switch"))
    assert (switch.router_input, changed.router_input) == ("ffn_input", "ffn_input")
    expected = layer(given)
    expected["init_args"]["router"]["scale"] = 2.0
    assert layer(changed) == expected


def test_a_name_leaves_nothing_of_what_it_replaces(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "model:\n  router_input: pre_attention\n  ffn:\n    class_path: moezoo.SparseMoE\n"
        "    init_args: {num_experts: 64, top_k: 4, router: {scale: 3.0}}\n"
    )
    options = parse("--model.ffn", "switch", "--config", str(path))
    assert layer(options) == layer(parse("--model.ffn", "switch"))
    assert options.router_input == "ffn_input"


def test_options_of_a_named_layer_are_set_beside_it():
    options = parse(
        "--model.ffn.router.jitter", "0", "--model.ffn", "switch", "--model.router_input=ffn_input"
    )
    expected = layer(parse("--model.ffn", "switch"))
    expected["init_args"]["router"]["jitter"] = 0
    assert layer(options) == expected
    inline = "--model.ffn={class_path: switch, init_args: {router: {jitter: 0}}}"
    assert layer(parse(inline)) == expected
    own = ["--model.ffn", "smallthinker", "--model.router_input", "post_attention"]
    assert parse(*own).router_input == "post_attention"


@pytest.mark.parametrize("value", ["moezoo.PEER", "[1]", "{class_path: moezoo.PEER}", "{"])
def test_what_is_no_name_stays(value):
    words = ["fit", f"--model.ffn={value}", "--model.ffn_rules", "3", "--model.ffn"]
    assert with_method_words(words, "model.ffn") == words
    settings = {"ffn": value, "prompt": "switch", "list": [{"class_path": "moezoo.PEER"}]}
    assert with_methods(settings) == settings


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("model: {ffn: swich}", "model.ffn: the zoo has no method 'swich'; did you mean 'switch'?"),
        (
            "model: {ffn_rules: [{layers: 1, ffn: {class_path: per}}]}",
            "model.ffn_rules[0].ffn: the zoo has no method 'per'; did you mean 'peer'?",
        ),
        (
            "model: {ffn: SparsMoE}",
            "model.ffn: 'SparsMoE' is not a known class; did you mean 'SparseMoE'?",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, yaml, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml)
    with pytest.raises(InputError) as caught:
        check_config_files(["--config", str(path)])
    assert str(caught.value) == message
    if "rules" not in yaml:
        value = yaml.removeprefix("model: {ffn: ").removesuffix("}")
        with pytest.raises(InputError) as caught:
            parse("--model.ffn", value)
        assert str(caught.value) == message


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    expected = parse("--config", str(recipes.folder() / "peer.yaml"))
    monkeypatch.chdir(tmp_path)
    assert parse("--recipe", "peer").as_dict() == expected.as_dict()


def test_a_recipe_gives_way_to_files_and_options(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("model: {num_layers: 3, d_model: 64}\n")
    words = ["--model.d_model=32", "--config", str(path), "--recipe=mixtral"]
    options = parse(*words, "--model.ffn.num_experts", "4")
    assert (options.num_layers, options.d_model, options.num_heads) == (3, 32, 8)
    arguments = layer(options)["init_args"]
    assert (arguments["num_experts"], arguments["balance"]["load_balancing"]) == (4, 0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "per"], "recipe: there is no 'per'; did you mean 'peer'?"),
        (["--recipe", "../peer"], "recipe: there is no '../peer'; did you mean 'peer'?"),
        (["--recipe", "--output=x"], "recipe: a value is missing; write --recipe NAME"),
    ],
)
def test_a_recipe_that_there_is_not_is_one_line(words, message, capsys):
    assert main(["fit", *words]) == 2
    assert capsys.readouterr().err == f"moezoo: error: {message}\n"


def test_a_file_cannot_name_a_recipe(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("recipe: peer\n")
    assert main(["fit", "--config", str(path)]) == 2
    assert "write --recipe NAME there" in capsys.readouterr().err


def test_the_zoo_names_the_recipes(capsys):
    assert main(["zoo", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["recipe"] for entry in entries if entry["recipe"]} <= set(recipes.names())
    found = {entry["name"] for entry in entries if entry["recipe"] == entry["name"]}
    assert found == METHODS.keys() & set(recipes.names())
    assert {"switch", "peer", "smallthinker"} <= found
