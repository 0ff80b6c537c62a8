"""``moezoo fit`` from a folder of text to a model that writes."""

import json
import random
import re

import pytest
import torch
import yaml

from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.evaluation.perplexity import evaluate_text
from moezoo_train.checkpoint.export import export
from moezoo_train.finetune.pretrained import remember_length
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.run.cli import run
from moezoo_train.run.demo import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a corpus of small documents, where the runs of this module go."""
    folder = tmp_path_factory.mktemp("fit")
    generator = random.Random(0)
    (folder / "corpus").mkdir()
    for number in range(30):
        lines = [f"def f{n}(x):\n    return x + {generator.randint(0, 9)}\n" for n in range(12)]
        (folder / "corpus" / f"{number}.txt").write_text(f"# {number}\n" + "\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    """Return the YAML file of a run of twenty steps."""
    options = {
        "output": str(folder / "run"),
        "checkpoint_every": 8,
        "sample_prompt": "def ",
        "sample_tokens": 12,
        "model": {
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "max_length": 64,
            "ffn": {"class_path": "moezoo.DenseFFN"},
            "ffn_rules": [
                {
                    "layers": "every 2",
                    "ffn": {"class_path": "moezoo.SparseMoE", "init_args": {"num_experts": 4}},
                }
            ],
            "optimizer": {"name": "muon", "lr": 1e-2},
            "schedule": {"name": "wsd", "warmup_steps": 2},
        },
        "data": {
            "source": str(folder / "corpus"),
            "data_dir": str(folder / "data"),
            "vocab_size": 300,
            "sequence_length": 32,
            "batch_size": 4,
            "val_fraction": 0.1,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 20,
            "log_every_n_steps": 2,
            "val_check_interval": 10,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture(scope="module")
def finished(folder, recipe):
    """Return the directory of the finished run."""
    run(["fit", "--config", str(recipe)])
    return folder / "run"


def test_a_run_leaves_everything(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "loss.png",
        "metrics.csv",
        "model",
        "report.json",
        "sample.txt",
        "tensorboard",
    ]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
    ]
    assert list((finished / "tensorboard").glob("events.*"))


def test_the_length_it_was_trained_on_is_recorded(finished, tmp_path):
    fields = json.loads((finished / "model" / "config.json").read_text())
    assert (fields["trained_length"], fields["max_position_embeddings"]) == (32, 64)
    model, tokenizer = load_checkpoint(finished / "model")
    assert evaluate_text(model, tokenizer, "some words").sequence_length == 32
    export(finished / "checkpoints" / "last.ckpt", tmp_path / "exported")
    assert load_checkpoint(tmp_path / "exported")[0].config.trained_length == 32


def test_a_model_that_was_trained_before_keeps_the_larger_length_or_none(finished):
    model, _ = load_checkpoint(finished / "model")
    for length, fresh, known, kept in (
        (16, False, 32, 32),
        (48, False, 32, 48),
        (48, False, None, None),
        (48, True, None, 48),
    ):
        model.config.trained_length = known
        remember_length(model, length, fresh)
        assert model.config.trained_length == kept


def test_the_model_learned_and_is_saved_as_it_was_validated(finished):
    rows = read_metrics(finished / "metrics.csv")
    losses = [float(row["train/loss"]) for row in rows if "train/loss" in row]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    report = json.loads((finished / "report.json").read_text())
    assert report["steps"] == 20
    assert report["tokens"] == 20 * 4 * 32
    assert [load["layer"] for load in report["expert_load"]] == [1]
    last = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    model, tokenizer = load_checkpoint(finished / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, last["state_dict"][f"model.{name}"]), name
    assert model.config.eos_token_id == tokenizer.eos_id
    sample = (finished / "sample.txt").read_text()
    assert sample.startswith("def ")
    assert len(sample) > len("def ")


def test_the_written_configuration_repeats_the_run(finished, folder):
    again = folder / "again"
    run(["fit", "--config", str(finished / "config.yaml"), f"--output={again}"])
    columns = ("train/loss", "train/grad_norm", "val/loss")
    first, second = (
        [[row.get(name) for name in columns] for row in read_metrics(path / "metrics.csv")]
        for path in (finished, again)
    )
    assert first == second


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluating_gives_the_loss_of_the_run(finished, recipe, command, capsys):
    run([command, "--config", str(recipe)])
    report = json.loads((finished / "report.json").read_text())
    shown = re.search(r"/loss\s+│\s+([\d.]+)", capsys.readouterr().out)
    assert float(shown[1]) == pytest.approx(report["val_loss"], rel=1e-7)


def test_a_run_is_not_overwritten_unasked(finished, recipe):
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    with pytest.raises(InputError, match=r"already holds a run \(.*\); .* --overwrite true"):
        run(["fit", "--config", str(recipe)])
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.d_modl=3"], r"model\.d_modl: .* did you mean 'model\.d_model'"),
        (["--model.d_model=wide"], r"model\.d_model: 'wide' is not a whole number"),
        (["--model.num_heads=3"], r"d_model: 16 is not divisible by num_heads 3"),
        (["--model.optimizer.name=rmsprop"], r"model\.optimizer\.name: .*adamw"),
        (["--data.sequence_length=128"], r"sequence_length: 128 is more than model\.max_length"),
        (["--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no checkpoint nowhere.ckpt"),
        (["--ckpt_path=best"], "ckpt_path: there is no .*best.ckpt"),
        (["--checkpoint_every=0"], "checkpoint_every: 0 is out of range"),
        (["--trainer.precision=7"], "trainer.precision"),
        (["--trainer.accelerator=abacus"], "trainer.accelerator: 'abacus' is not known"),
        (
            ["--trainer.accumulate_grad_batches=3"],
            r"trainer\.val_check_interval: 10 batches is not a multiple of .* 3",
        ),
        (["--data.source=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, recipe, options, message):
    output = folder / "mistake"
    with pytest.raises(InputError, match=message) as error:
        run(["fit", "--config", str(recipe), f"--output={output}", *options])
    assert "\n" not in str(error.value)
    assert not (output / "checkpoints").exists()
    assert not (output / "model").exists()


def test_nan_leaves_the_last_good_checkpoint(folder, recipe, monkeypatch):
    output = folder / "nan"
    options = [f"--output={output}", "--model.optimizer.lr=1e30", "--trainer.gradient_clip_val=0"]
    with pytest.raises(InputError, match="nothing was updated and the last checkpoint stays"):
        run(["fit", "--config", str(recipe), "--checkpoint_every=1", *options])
    saved = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] >= 1
    assert not (output / "model").exists()


def test_fast_dev_run_writes_nothing(folder, recipe):
    output = folder / "quick"
    run(["fit", "--config", str(recipe), f"--output={output}", "--trainer.fast_dev_run=true"])
    assert not (output / "checkpoints").exists()
    assert not (output / "model").exists()


def test_demo(folder, recipe, capsys):
    output = folder / "demo"
    demo(str(folder / "corpus"), str(output), recipe=str(recipe), max_steps=4)
    shown = capsys.readouterr().out
    assert "val bits per byte" in shown
    assert "moezoo generate --checkpoint" in shown
    assert (output / "sample.txt").read_text()


def test_demo_names_a_missing_recipe():
    with pytest.raises(InputError, match=r"recipe: there is no nowhere\.yaml"):
        demo(recipe="nowhere.yaml")
