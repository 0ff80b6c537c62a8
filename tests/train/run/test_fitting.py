"""``moezoo_train.fit``: the command's runs from Python, which leaves the process as it was."""

import logging
import os
import random
import signal
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import moezoo_train
from moezoo import InputError
from moezoo.__main__ import main
from moezoo.command.settings import load_yaml
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.progress import _places
from moezoo_train.run import fitting
from moezoo_train.run.presets import with_preset

TIMES = ("train/tokens_per_second", "train/mfu")
CONFIG = {
    "loggers": ["csv"],
    "sample_tokens": 0,
    "model": {
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn": {"class_path": "moezoo.SparseMoE", "init_args": {"num_experts": 4}},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 1},
    },
    "data": {
        "source": Path("corpus"),
        "data_dir": Path("data"),
        "vocab_size": 300,
        "sequence_length": 16,
        "batch_size": 2,
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 9,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Go to a folder with a small corpus."""
    generator = random.Random(0)
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "with", "bread", "over")
    (tmp_path / "corpus").mkdir()
    for number in range(30):
        text = " ".join(generator.choice(words) for _ in range(120))
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} {text}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process() -> dict[str, object]:
    """Return what a run might leave behind in a process."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "argv": list(sys.argv),
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "filters": [list(place.filters) for place in _places()],
        "levels": {name: logging.getLogger(name).level for name in ("lightning", "transformers")},
        "signals": {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }


def without_times(path: str) -> list[dict[str, str]]:
    rows = read_metrics(path)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_a_run_from_python_is_the_command_s_and_leaves_the_process_as_it_was(
    folder, monkeypatch, capfd
):
    monkeypatch.setattr(sys, "argv", ["notebook", "--data.batch_size", "7"])
    before = process()
    result = moezoo_train.fit(
        CONFIG,
        output=folder / "python",
        quiet=True,
        trainer={"max_steps": 3},
        **{"model.ffn.num_experts": np.int64(3), "model.ffn.router": {"jitter": 0.25}},
    )
    assert process() == before
    printed = capfd.readouterr()
    assert printed.out == ""
    assert all(line.startswith("prepare: ") for line in printed.err.splitlines())

    text = yaml.safe_load(fitting._settings(CONFIG).partition("=")[2])
    Path("run.yaml").write_text(yaml.safe_dump(text))
    words = ["--output", "command", "--trainer.max_steps", "3", "--model.ffn.num_experts", "3"]
    words += ["--model.ffn.router.jitter", "0.25"]
    assert main(["fit", "--config", "run.yaml", *words]) == 0
    ours, theirs = (without_times(f"{name}/metrics.csv") for name in ("python", "command"))
    assert ours == theirs
    settings = [yaml.safe_load(Path(f"{n}/config.yaml").read_text()) for n in ("python", "command")]
    assert settings[0].pop("output") == str(folder / "python")
    assert settings[1].pop("output") == "command"
    assert settings[0] == settings[1]
    assert settings[0]["data"]["batch_size"] == 2  # and not what the notebook was started with

    assert result.output == folder / "python"
    assert result.model == folder / "python" / "model"
    assert result.last_checkpoint == folder / "python" / "checkpoints" / "last.ckpt"
    assert result.best_checkpoint == folder / "python" / "checkpoints" / "best.ckpt"
    assert result.adapter is result.stopped_by is None
    assert list(result.train_losses) == [1, 2, 3]
    assert list(result.val_losses) == [2, 3]
    assert result.report is not None
    assert result.report.steps == 3
    assert result.report.val_loss == result.val_losses[3]


@pytest.mark.parametrize(
    ("given", "overrides", "line"),
    [
        (
            CONFIG,
            {"trainer.max_step": 3},
            "trainer.max_step: no such option; did you mean 'trainer.",
        ),
        (CONFIG, {"model.ffn.top_k": 9}, "model.ffn.init_args.top_k: 9 is more than num_experts=4"),
        ({"modle": {"d_model": 8}}, {}, "modle"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(given, overrides, line, folder):
    before, there = process(), sorted(folder.rglob("*"))
    with pytest.raises(InputError) as raised:
        moezoo_train.fit(given, **overrides)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
    assert process() == before
    assert sorted(folder.rglob("*")) == there


class Layer:
    """Something that YAML cannot hold."""


@pytest.mark.parametrize(
    ("given", "overrides", "line"),
    [
        (None, {"model.ffn": Layer()}, "model.ffn: a Layer is no value of an option; give what"),
        (None, {"model": {"ffn": Layer()}}, "model.ffn: a Layer is no value of an option; give"),
        ({"data": {"sources": [Layer()]}}, {}, "data.sources[0]: a Layer is no value of an option"),
        ({"model": {"ffn": "swich"}}, {}, "model.ffn: the zoo has no method 'swich'; did you mean"),
        (None, {"model": {"ffn": "swich"}}, "model.ffn: the zoo has no method 'swich'; did you"),
        (None, {"--output": "x"}, "--output: no such option; name one of `moezoo fit --help`"),
        (None, {"help": True}, "help: no such option; name one of `moezoo fit --help`"),
        (None, {"print_config": True}, "print_config: no such option; name one of"),
        (3, {}, "config: a int is no configuration; give a mapping, or the path of a YAML file"),
        ("nowhere.yaml", {}, "config: there is no file 'nowhere.yaml'; name a YAML file that is"),
    ],
)
def test_what_no_command_line_says_is_one_line(given, overrides, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        moezoo_train.fit(given, **overrides)
    assert str(raised.value).startswith(line)


def test_words_are_those_of_the_command_line():
    words = list(
        fitting._words(
            {"model": {"num_layers": 2}, "data": {"source": Path("a b")}},
            {
                "output": Path("runs/x"),
                "recipe": "peer",
                "trainer": {"max_steps": 3, "devices": (0, 1)},
                "model.optimizer.lr": 1e-05,
                "model.num_kv_heads": None,
                "overwrite": True,
                "sample_prompt": "x: {",
                "model.ffn.router": {"score": "sigmoid"},
                "model.d_model": torch.tensor(8),
            },
        )
    )
    assert words == [
        "--config={data: {source: a b}, model: {num_layers: 2}}",
        "--config={trainer: {devices: [0, 1], max_steps: 3}}",
        "--output=runs/x",
        "--recipe=peer",
        "--model.optimizer.lr=1.0e-05",
        "--model.num_kv_heads=null",
        "--overwrite=true",
        "--sample_prompt=x: {",
        "--model.ffn.router={score: sigmoid}",
        "--model.d_model=8",
    ]


@pytest.mark.parametrize(
    "value",
    [
        "null",
        "1e3",
        "-.5",
        "off",
        "",
        "ümlaut: 世界",
        "a\nb",
        "x" * 500,
        [],
        {},
        [None, {"a": "true"}],
        float("inf"),
    ],
)
def test_a_written_value_is_read_as_what_it_was(value):
    text = fitting._written("sample_prompt", {"a": value})
    assert "\n" not in text
    assert load_yaml(text) == {"a": value}


def test_a_preset_in_a_mapping_is_found():
    with pytest.raises(InputError, match=r"^model\.preset: there is no 'Qwen3-4C'; did you mean"):
        with_preset(["fit", "--config={model: {preset: Qwen3-4C}}"])
    (_, preset, _) = with_preset(["fit", "--config={model: {preset: Qwen3-4B}}"])
    assert preset.endswith("Qwen3-4B.yaml")


def ending(monkeypatch, number: signal.Signals | None):
    """End a run by a signal, with nothing computed."""
    ended = types.SimpleNamespace(
        config={"fit": {"output": "run", "trainer": {}}}, report=None, stopped_by=number
    )
    monkeypatch.setattr(fitting, "run_command", lambda words, quiet: ended)


def test_sigterm_goes_on_to_its_handler(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ending(monkeypatch, signal.SIGTERM)
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        assert moezoo_train.fit().stopped_by == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ending(monkeypatch, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped; go on with: moezoo fit … --ckpt_path"):
        moezoo_train.fit()


def test_the_system_s_errors_are_one_line_too_and_bugs_are_none(monkeypatch):
    def fail(words, quiet):
        raise error

    monkeypatch.setattr(fitting, "run_command", fail)
    error = OSError(28, "No space left on device", "runs/x")
    with pytest.raises(InputError, match=r"^runs/x: no space left on device; free space there"):
        moezoo_train.fit()
    error = KeyError("x")
    with pytest.raises(KeyError):
        moezoo_train.fit()


def test_names_are_loaded_when_they_are_asked_for():
    assert set(moezoo_train.__all__) <= set(dir(moezoo_train))
    for name in moezoo_train.__all__:
        assert getattr(moezoo_train, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        moezoo_train.fitt  # noqa: B018
