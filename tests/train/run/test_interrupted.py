"""An interrupted run tells, keeps and saves what the uninterrupted one does."""

import json
import random
import shutil
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moezoo_train.measure.loggers import build_loggers, read_metrics
from moezoo_train.run.cli import MoezooCLI, run

TIMES = ("train/tokens_per_second", "train/mfu")
REPORTED_TIMES = ("tokens_per_second", "train_seconds", "mfu", "peak_flops")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a small corpus, where the runs of this module go."""
    folder = tmp_path_factory.mktemp("interrupted")
    generator = random.Random(0)
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "with", "bread", "over")
    (folder / "corpus").mkdir()
    for number in range(30):
        text = " ".join(generator.choice(words) for _ in range(120))
        (folder / "corpus" / f"{number}.txt").write_text(f"{number} {text}\n")
    return folder


def fit(folder: Path, output: Path, *resume: str, **options: object) -> None:
    """Run the command."""
    defaults = {
        "output": output,
        "checkpoint_every": 3,
        "loggers": "[csv]",
        "sample_tokens": 0,
        "trainer.max_steps": 10,
        "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 6,
        "trainer.limit_val_batches": 2,
        "trainer.log_every_n_steps": 4,
        "trainer.enable_progress_bar": "false",
        "data.source": folder / "corpus",
        "data.data_dir": folder / "data",
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "model.d_model": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.ffn": "moezoo.SparseMoE",
        "model.ffn.num_experts": 4,
        "model.ffn.router.jitter": 0.1,
        "model.schedule.warmup_steps": 2,
    }
    given = {key.replace("__", "."): value for key, value in options.items()}
    run(["fit", *(f"--{name}={value}" for name, value in (defaults | given).items()), *resume])


class Copies(pl.Callback):
    """Keeps the directory of a run as it was after each write of a checkpoint."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.kept: dict[str, Path] = {}
        self._seen: dict[str, int] = {}

    def on_train_batch_start(self, trainer, *_) -> None:
        for name in ("last", "best"):
            path = self.output / "checkpoints" / f"{name}.ckpt"
            if path.exists() and self._seen.get(name) != path.stat().st_mtime_ns:
                self._seen[name] = path.stat().st_mtime_ns
                target = self.output.with_name(f"{self.output.name}-{name}-{trainer.global_step}")
                shutil.copytree(self.output, target)
                self.kept[f"{name} {trainer.global_step}"] = target


def without_times(value):
    """Leave out of a checkpoint what differs between any two runs: times and folders."""
    if isinstance(value, dict):
        left_out = ("seconds", "last", "dirpath", "best_k_models")
        kept = {k: without_times(v) for k, v in value.items() if k not in left_out}
        return {k: v for k, v in kept.items() if not str(k).endswith("_path")}
    return [without_times(v) for v in value] if isinstance(value, list | tuple) else value


def assert_same(left, right, path="") -> None:
    """Compare nested states exactly."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right or (left != left and right != right), f"{path}: {left}, {right}"


def table(output: Path) -> list[dict[str, str]]:
    """Read the rows of a run, without times."""
    rows = read_metrics(output / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same_runs(
    resumed: Path, whole: Path, best: bool = True, left_out: str | None = None
) -> None:
    """Compare everything that two runs left, but for the rows of a step."""
    assert [row for row in table(resumed) if row["step"] != left_out] == table(whole)
    reports = [json.loads((path / "report.json").read_text()) for path in (resumed, whole)]
    first, second = ({k: r[k] for k in r if k not in REPORTED_TIMES} for r in reports)
    assert first == second
    names = ["last.ckpt", "best.ckpt"] if best else ["last.ckpt"]
    for name in names:
        states = [
            without_times(torch.load(path / "checkpoints" / name, weights_only=True))
            for path in (resumed, whole)
        ]
        assert_same(*states, path=name)
    tensors = [load_file(path / "model" / "model.safetensors") for path in (resumed, whole)]
    assert_same(*tensors, path="model")


SETTINGS = {
    # 7 batches an epoch: steps of 3, 3 and 1, and validations that fall into the middle of a step.
    "three batches a step, over epochs": {
        "trainer.accumulate_grad_batches": 3,
        "trainer.limit_train_batches": 7,
        "trainer.val_check_interval": 12,
        "checkpoint_every": 4,
        "keep": "best",
    },
    "a part of an epoch": {
        "trainer.accumulate_grad_batches": 2,
        "trainer.limit_train_batches": 7,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.val_check_interval": 0.5,
        "checkpoint_every": 4,
    },
    "epochs, two batches a step": {
        "trainer.max_steps": -1,
        "trainer.max_epochs": 2,
        "trainer.limit_train_batches": 9,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 10,
        "checkpoint_every": 5,
    },
    "workers": {
        "trainer.max_epochs": 3,
        "trainer.limit_train_batches": 4,
        "data.num_workers": 1,
        "trainer.val_check_interval": 4,
        "checkpoint_every": 6,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_on_from_every_checkpoint(name, folder, monkeypatch):
    whole, options = folder / name.replace(" ", "-").replace(",", ""), SETTINGS[name]
    copies = Copies(whole)
    own = MoezooCLI._callbacks
    monkeypatch.setattr(MoezooCLI, "_callbacks", lambda cli, out: [copies, *own(cli, out)])
    fit(folder, whole, **options)
    monkeypatch.setattr(MoezooCLI, "_callbacks", own)
    assert len(copies.kept) >= 2
    for kept, output in copies.kept.items():
        fit(folder, output, f"--ckpt_path={kept.split()[0]}", **options)
        assert_same_runs(output, whole)


@pytest.fixture(scope="module")
def long_run(folder) -> Path:
    """Return a run in which logging and validation fall on steps 4 and 8."""
    fit(folder, folder / "long", **LONG)
    return folder / "long"


LONG = {
    "trainer.max_steps": 8,
    "trainer.log_every_n_steps": 2,
    "trainer.val_check_interval": 4,
    "trainer.limit_train_batches": 3,
    "model.schedule.name": "constant",
    "checkpoint_every": 100,
}


@pytest.mark.parametrize("first", [4, 5])
def test_a_run_that_is_made_longer_is_the_longer_run(first, folder, long_run):
    output = folder / f"from {first}"
    fit(folder, output, **LONG | {"trainer.max_steps": first})
    fit(folder, output, "--ckpt_path=last", **LONG)
    assert_same_runs(output, long_run, left_out="5")
    rows = read_metrics(output / "metrics.csv")
    steps = [(row["step"], "train/loss" in row) for row in rows]
    assert [step for step in steps if step[0] == "5"] == [("5", True), ("5", False)] * (first == 5)
    steps = [step for step in steps if step[0] != "5"]
    assert steps == [(n, t) for n in "2468" for t in (True, False) if t or n in "48"]
    report = json.loads((output / "report.json").read_text())
    assert report["train_loss"] == pytest.approx(float(rows[-2]["train/loss"]))


def test_a_run_with_nothing_left_to_do_reports_the_same(folder, long_run):
    output = folder / "again"
    shutil.copytree(long_run, output)
    fit(folder, output, "--ckpt_path=last", **LONG)
    assert (output / "report.json").read_text() == (long_run / "report.json").read_text()
    assert (output / "metrics.csv").read_text() == (long_run / "metrics.csv").read_text()


def test_a_run_killed_before_its_model_was_written_writes_it_when_resumed(folder, long_run):
    """Nothing is left to train, so that no callback is called for the end of training."""
    output = folder / "killed"
    shutil.copytree(long_run, output)
    weights = output / "model" / "model.safetensors"
    last = weights.read_bytes()
    shutil.rmtree(output / "model")
    fit(folder, output, "--ckpt_path=last", **LONG)
    assert weights.read_bytes() == last


def test_the_best_model_stays_where_a_run_is_moved_and_is_made_where_it_is_not(folder, long_run):
    """A lower loss than any to come, in the directory that has its model, and in a fresh one."""
    options = LONG | {"keep": "best", "trainer.max_steps": 12}
    best = "checkpoints/best.ckpt"
    moved, fresh = folder / "moved", folder / "fresh"
    shutil.copytree(long_run, moved)
    path = moved / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    lowest = {"best_model_score": torch.tensor(0.5), "current_score": torch.tensor(0.5)}
    for key, callback in state["callbacks"].items():
        if key.startswith("ModelCheckpoint"):
            callback |= lowest
        elif key == "SaveModel":
            callback["best"] = 0.5
    torch.save(state, path)
    before = [(moved / name).read_bytes() for name in (best, "model/model.safetensors")]
    fit(folder, fresh, f"--ckpt_path={path}", **options)
    fit(folder, moved, "--ckpt_path=last", **options)
    assert [(moved / n).read_bytes() for n in (best, "model/model.safetensors")] == before
    assert torch.load(fresh / best, weights_only=True)["global_step"] == 12
    assert (fresh / "model" / "model.safetensors").exists()


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    (first,) = build_loggers(["tensorboard"], tmp_path)[1:]
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()
    time.sleep(
        1.1
    )  # event files are read by name: by the second, then by a number that is no order
    (second,) = build_loggers(["tensorboard"], tmp_path)[1:]
    second.start(1)
    second.log_metrics({"loss": 7.0}, step=2)
    second.save()
    second.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 7.0)]
