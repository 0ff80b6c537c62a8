"""``trainer.precision: auto``: chosen by the device, saved as chosen, and kept on resuming."""

import random

import fsspec
import pytest
import torch
import yaml

from moezoo import InputError, dtype_speed
from moezoo_train.checkpoint_structure import CONFIG_KEY
from moezoo_train.experiments.compare.command import compare
from moezoo_train.plan.setup import precision
from moezoo_train.run.cli import run
from moezoo_train.run.demo import demo
from moezoo_train.run.precision import began_with, precision_here, resolve

CPU = {"accelerator": "cpu", "devices": "auto", "num_nodes": 1, "precision": "auto"}


def set_speeds(monkeypatch, bf16):
    products = {torch.float32: 100.0, torch.bfloat16: bf16, torch.float16: 50.0}
    figures = dtype_speed.Speeds(products)
    monkeypatch.setattr(dtype_speed, "speeds", lambda: figures)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Return a YAML file whose precision is open."""
    folder = tmp_path_factory.mktemp("precision")
    generator = random.Random(0)
    words = " ".join(f"w{generator.randint(0, 99)} = {n}\n" for n in range(2000))
    (folder / "text.txt").write_text(words)
    options = {
        "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "schedule": {"warmup_steps": 1}},
        "data": {
            "source": str(folder / "text.txt"),
            "data_dir": str(folder / "data"),
            "vocab_size": 300,
            "sequence_length": 16,
            "batch_size": 2,
        },
        "trainer": {**CPU, "max_steps": 2, "limit_val_batches": 0},
        "sample_tokens": 0,
        "loggers": "csv",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def fit(recipe, output, *options):
    run(["fit", "--config", str(recipe), "--output", str(output), *options])
    checkpoint = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    config = yaml.safe_load((output / "config.yaml").read_text())
    return checkpoint[CONFIG_KEY]["precision"], config["trainer"]["precision"]


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("trainer")]


@pytest.mark.parametrize(
    ("chosen", "other"), [("32-true", "bf16-mixed"), ("bf16-mixed", "32-true")]
)
def test_a_run_saves_what_it_chose_and_keeps_it(
    chosen, other, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(dtype_speed, "training_precision", lambda _: chosen)
    assert fit(recipe, tmp_path / "run") == (chosen, chosen)
    assert lines(capsys) == [f"trainer.precision: auto is {chosen} here"]
    # The run moves to another machine.
    monkeypatch.setattr(dtype_speed, "training_precision", lambda _: other)
    resumed = ["--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert fit(recipe, tmp_path / "run", *resumed) == (chosen, chosen)
    assert lines(capsys) == [f"trainer.precision: auto is {chosen}, in which the run began"]


def test_older_checkpoints_keep_what_their_configuration_says(recipe, tmp_path, monkeypatch):
    set_speeds(monkeypatch, 200.0)
    fit(recipe, tmp_path / "run", "--trainer.precision", "32")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert began_with(str(path)) == "32-true"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[CONFIG_KEY]["precision"]
    torch.save(checkpoint, path)
    config = tmp_path / "run" / "config.yaml"
    assert began_with(str(path)) == "32-true"
    config.write_text("trainer: {precision: null}")
    assert began_with(str(path)) == "32-true"
    config.write_text("trainer: {precision: bf16}")
    assert began_with(str(path)) == "bf16-mixed"
    for unknown in ("trainer: {precision: auto}", "trainer: 3", ":", ""):
        config.write_text(unknown)
        assert began_with(str(path)) is None
    config.unlink()
    assert began_with(str(path)) is None
    assert resolve(CPU, str(path))[0] == "32-true"


@pytest.mark.parametrize(
    ("chosen", "other"), [("32-true", "bf16-mixed"), ("bf16-mixed", "32-true")]
)
def test_a_remote_checkpoint_keeps_it_too(chosen, other, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dtype_speed, "training_precision", lambda _: chosen)
    fit(recipe, tmp_path / "run")
    bucket = fsspec.filesystem("memory")
    bucket.put(str(tmp_path / "run"), f"/{chosen}", recursive=True)
    monkeypatch.setattr(dtype_speed, "training_precision", lambda _: other)
    remote = f"memory://{chosen}/checkpoints/last.ckpt"
    capsys.readouterr()
    resumed = ["--ckpt_path", remote, "--trainer.max_steps", "3"]
    assert fit(recipe, tmp_path / "elsewhere", *resumed) == (chosen, chosen)
    assert lines(capsys) == [f"trainer.precision: auto is {chosen}, in which the run began"]

    # An older checkpoint does not say it; the configuration beside it does.
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint[CONFIG_KEY]["precision"]
    with bucket.open(f"/{chosen}/checkpoints/last.ckpt", "wb") as file:
        torch.save(checkpoint, file)
    assert began_with(remote) == chosen
    bucket.rm(f"/{chosen}/config.yaml")
    assert began_with(remote) is None


def test_a_remote_checkpoint_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match=r"ckpt_path: there is no checkpoint memory://none/a"):
        resolve(CPU, "memory://none/a.ckpt")


def test_of_a_remote_checkpoint_no_tensor_is_read(monkeypatch):
    bucket = fsspec.filesystem("memory")
    saved = {"state_dict": {"w": torch.zeros(1 << 20)}, CONFIG_KEY: {"precision": "bf16-mixed"}}
    with bucket.open("/large/last.ckpt", "wb") as file:
        torch.save(saved, file)
    read, store = [], type(bucket.store["/large/last.ckpt"])
    for name in ("read", "readinto"):
        monkeypatch.setattr(store, name, _counting(getattr(store, name), read), raising=False)
    assert began_with("memory://large/last.ckpt") == "bf16-mixed"
    assert 0 < sum(read) < 1 << 17


def _counting(method, read):
    def counted(file, *args):
        found = method(file, *args)
        read.append(found if isinstance(found, int) else len(found))
        return found

    return counted


@pytest.mark.parametrize(
    ("given", "bf16", "line"),
    [
        ("bf16-mixed", 25.0, "in bf16-mixed, products take about 4× as long as in 32-true"),
        ("bf16", 12.0, "in bf16-mixed, products take about 8× as long as in 32-true"),
        ("bf16-true", 50.0, "in bf16-true, products take about 2× as long as in 32-true"),
        ("bf16-mixed", 150.0, None),
        ("32-true", 25.0, None),
        (None, 25.0, None),
    ],
)
def test_a_chosen_precision_stays_and_its_cost_is_said(given, bf16, line, monkeypatch):
    set_speeds(monkeypatch, bf16)
    assert resolve({**CPU, "precision": given}, None) == (
        given,
        line and f"trainer.precision: {line} on this CPU",
    )


def test_the_line_is_said_and_the_run_runs(recipe, tmp_path, monkeypatch, capsys):
    set_speeds(monkeypatch, 25.0)
    found = fit(recipe, tmp_path / "run", "--trainer.precision", "bf16-mixed")
    assert found == ("bf16-mixed", "bf16-mixed")
    assert lines(capsys) == [
        "trainer.precision: in bf16-mixed, products take about 4× as long as in 32-true on this CPU"
    ]


def test_cpus_take_fp32_without_measuring(monkeypatch):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: pytest.fail("measured"))
    assert resolve(CPU, None) == ("32-true", "trainer.precision: auto is 32-true here")


def test_gpus_take_bf16_without_measuring(monkeypatch):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    line = "trainer.precision: auto is bf16-mixed here"
    for accelerator in ("auto", "gpu", "cuda"):
        assert resolve({**CPU, "accelerator": accelerator}, None) == ("bf16-mixed", line)
    assert precision_here("auto") == "bf16-mixed"
    assert resolve({**CPU, "accelerator": "auto", "precision": "bf16-mixed"}, None)[1] is None
    assert precision("auto").name == "bf16-mixed"  # `moezoo plan` is of GPUs


@pytest.mark.parametrize("chosen", ["32-true", "bf16-mixed"])
def test_demo_and_comparisons_choose_alike(chosen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dtype_speed, "training_precision", lambda _: chosen)
    assert precision_here("auto") == chosen
    assert precision_here("bf16-true") == "bf16-true"
    ran = []
    monkeypatch.setattr("moezoo_train.run.demo.run", ran.append)
    demo("text.txt", str(tmp_path))
    assert f"--trainer.precision={chosen}" in ran[0]
    assert f", in {chosen} on " in capsys.readouterr().out

    class Planned(Exception):
        pass

    def plan(experiment):
        raise Planned(experiment.precision)

    monkeypatch.setattr("moezoo_train.experiments.compare.command.plan", plan)
    with pytest.raises(Planned, match=chosen):
        compare({"dense": {"method": "dense_mlp"}}, str(tmp_path / "compared"), precision="auto")
