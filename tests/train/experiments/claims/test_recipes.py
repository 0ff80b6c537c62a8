"""The recipes of the experiments are parsed by their commands, and refused by none of them."""

from pathlib import Path

import pytest

from moezoo.__main__ import COMMANDS, _load
from moezoo.command.parser import function_parser
from moezoo_train.experiments import carving, hardening
from moezoo_train.experiments.common.options import TextOptions
from moezoo_train.experiments.common.records import Task, run_all
from moezoo_train.experiments.compare.runs import plan
from moezoo_train.experiments.compare.settings import Experiment, parse_methods

ROOT = Path(__file__).parents[4]
RECIPES = sorted((ROOT / "configs" / "experiments" / "claims").glob("*.yaml"))


def options_of(path: Path) -> dict:
    function = _load(COMMANDS[f"compare {path.stem}"].function)
    parser = function_parser(function, path.stem)
    options = parser.instantiate(parser.parse_args(["--config", str(path)]))
    return {name: value for name, value in vars(options).items() if name != "config"}


def test_each_experiment_has_a_recipe():
    experiments = {name for name in COMMANDS if name.startswith("compare ")}
    apart = {"forgetting", "upcycling"}
    assert all(list((ROOT / "configs" / "experiments" / name).glob("*.yaml")) for name in apart)
    assert {f"compare {name}" for name in apart | {p.stem for p in RECIPES}} == experiments


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_accepted(path):
    options = options_of(path)
    assert options["output"] == f"runs/claims/{path.stem}"
    assert len(options["seeds"]) >= 3
    if path.stem == "carving":
        for name, grouping in options["groupings"].items():
            carving._check(name, grouping, options["sizes"], 256)
        assert options["ours"] in options["groupings"]
    elif path.stem == "hardening":
        for name, arguments in options["trees"].items():
            hardening._check(name, arguments, options["model"].d_model, options["depths"])
    else:
        names = ("baseline", "layers", "max_steps", "tolerance", "model", "optimizer", "schedule")
        experiment = Experiment(
            methods=parse_methods(options["methods"]),
            ablation=False,
            seeds=tuple(options["seeds"]),
            precision="32-true",
            text=TextOptions(),
            **{name: options[name] for name in names},
        )
        assert {run.row for run in plan(experiment)} >= {
            row for c in options["claims"] for row in c
        }


def test_runs_are_kept_until_their_inputs_change(tmp_path, capsys):
    from rich.console import Console

    made = []

    def measure(place):
        assert list(place.iterdir()) == []
        (place / "scratch").touch()
        made.append(place.name)
        return {"loss": float(len(made))}

    def run(*inputs):
        tasks = [Task(f"run-{n}", {"input": each}, measure) for n, each in enumerate(inputs)]
        return run_all(tmp_path, tasks, "loss", Console())

    assert run(1, 2) == {"run-0": {"loss": 1.0}, "run-1": {"loss": 2.0}}
    assert run(1, 3) == {"run-0": {"loss": 1.0}, "run-1": {"loss": 3.0}}
    (tmp_path / "run-0" / "result.json").write_text("{")
    assert run(1, 3) == {"run-0": {"loss": 4.0}, "run-1": {"loss": 3.0}}
    assert made == ["run-0", "run-1", "run-1", "run-0"]
    assert "2 runs, 1 of them finished before" in capsys.readouterr().out
