"""Every recipe parses with the real command line and builds its model; one documents every key."""

import functools
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml

import moezoo
from moezoo.command.parser import option_names
from moezoo_train.run.cli import run
from moezoo_train.run.demo import RECIPE
from moezoo_train.run.module import LanguageModel

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FINETUNE = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
SPARSE = {method.name: method for method in moezoo.zoo() if method.layer is moezoo.SparseMoE}
REFERENCE = ROOT / "configs" / "reference.yaml"


@functools.cache
def parser() -> jsonargparse.ArgumentParser:
    return jsonargparse.capture_parser(lambda: run(["fit"]))


def parse(*arguments: str) -> jsonargparse.Namespace:
    return parser().parse_args(["fit", *arguments]).fit


def parse_file(path: Path) -> jsonargparse.Namespace:
    return parse("--config", str(path))


def build(options: jsonargparse.Namespace) -> LanguageModel:
    """Build the model without its weights, at the vocabulary of the data."""
    whole = jsonargparse.Namespace(model=options.model.clone())
    single = jsonargparse.ArgumentParser(exit_on_error=False)
    single.add_class_arguments(LanguageModel, "model", skip={"vocab_size"}, instantiate=False)
    arguments = single.instantiate(single.parse_object(whole.as_dict())).model
    with torch.device("meta"):
        return LanguageModel(vocab_size=options.data.vocab_size, **arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_parses_and_builds(path):
    options = parse_file(path)
    module = build(options)
    assert module.model.config.vocab_size == options.data.vocab_size
    assert options.data.sequence_length <= options.model.max_length
    if path != REFERENCE:
        assert options.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_recipe_of_finetuning_parses(path):
    options = parse_file(path)
    assert options.model.initialize_from is not None
    assert options.output == f"runs/{path.stem}"


def test_every_sparse_method_has_a_recipe_of_its_name():
    assert {path.stem for path in CONFIGS} >= set(SPARSE)


@pytest.mark.parametrize("name", SPARSE)
def test_recipe_holds_the_methods_own_settings(name):
    options = parse_file(ROOT / "configs" / f"{name}.yaml")
    rules = [rule for rule in build(options).model.config.ffn if "SparseMoE" in rule["class_path"]]
    assert len(rules) == 1
    with torch.device("meta"):
        expected = SPARSE[name].build(options.model.d_model).config()["init_args"]
    assert {"d_model": options.model.d_model, **rules[0]["init_args"]} == expected
    assert rules[0].get("router_input", "ffn_input") == SPARSE[name].router_input


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.stem not in ("demo", "dense_small", "reference")],
    ids=lambda p: p.stem,
)
def test_recipes_differ_in_the_feed_forward_layer_only(path):
    def rest(file: Path) -> dict[str, Any]:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
        for key in (
            "ffn",
            "router_input",
            "ffn_rules",
            "memory",
            "allow_non_causal",
            "hash_embeddings_from",
            "qk_norm",
            "parallel",
            "attention_experts",
        ):
            options["model"].pop(key, None)
        options.pop("output")
        return options

    assert rest(path) == rest(ROOT / "configs" / "dense.yaml")


def leaves(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return {leaf for key, v in value.items() for leaf in leaves(v, f"{prefix}.{key}".lstrip("."))}


def test_reference_names_every_option_and_no_other():
    written = leaves(yaml.safe_load(REFERENCE.read_text(encoding="utf-8")))
    given = leaves(parser().parse_args(["fit"]).fit.clone(with_meta=False).as_dict())
    given = {key for key in given if key != "config"}
    layer = {f"model.ffn.init_args.{name}" for name in option_names_of_layer()}
    groups = {key for key in layer if any(other.startswith(f"{key}.") for other in layer)}
    expected = {key for key in given if not key.startswith("model.ffn.")} | layer - groups
    assert written == expected | {"model.ffn.class_path"}


def option_names_of_layer() -> set[str]:
    from moezoo.command.messages import option_names as arguments_of

    return set(arguments_of(moezoo.SparseMoE)) - {"d_model"}


def test_reference_comments_every_option():
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    for above, line in itertools.pairwise(lines):
        match = re.match(r"\s*(?:- )?(\w+):", line)
        sections = ("model", "data", "optimizer", "schedule")
        rule = match and match[1] in ("layers", "ffn") and "-" in above + line
        if match and match[1] not in sections and not rule:
            assert above.lstrip().startswith("#"), line


def test_reference_values_are_the_defaults():
    defaults, written = parse(), parse_file(REFERENCE)
    for options in (defaults, written):
        options.pop("config", None)
        options.model.pop("ffn")
        options.model.pop("ffn_rules")
    assert written.as_dict() == defaults.as_dict()
    layer = parse_file(REFERENCE).model.ffn.init_args.as_dict()
    assert layer.pop("capacity") == vars(moezoo.CapacityOptions())
    assert layer.pop("shared_glu") == vars(moezoo.GLUOptions())
    default = moezoo.SparseMoE(8).config()["init_args"]
    assert layer == {**{key: default[key] for key in layer}, "d_expert": None, "d_shared": None}


def test_commands_in_the_pages_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines += re.findall(r"^moezoo fit .*$", text, re.MULTILINE)
    assert lines
    for line in lines:
        assert parse(*shlex.split(line, comments=True)[2:])


def test_every_option_of_the_command_says_what_it_is():
    fit = parser()._subcommands_action.choices["fit"]
    names = set(option_names(fit))
    silent = [a.dest for a in fit._actions if not a.help and set(a.option_strings) & names]
    assert silent == []


def test_the_demo_finds_its_recipe():
    assert RECIPE == ROOT / "configs" / "demo.yaml"
    assert RECIPE.is_file()
