"""A run that was interrupted ends as the run that was not, bit for bit."""

import random
import shutil
import signal
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from moezoo import Engram, SparseMoE
from moezoo.routing import RouterOptions
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.callbacks import LastCheckpoint
from moezoo_train.run.cli import run

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Return a folder of small documents of words in random order."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "with", "bread", "over")
    generator = random.Random(0)
    for number in range(30):
        text = " ".join(generator.choice(words) for _ in range(120))
        (folder / f"{number}.txt").write_text(f"{number} {text}\n")
    return folder


@pytest.fixture
def make_data(corpus, tmp_path):
    return lambda: TokenDataModule(
        source=str(corpus),
        data_dir=str(tmp_path / "data"),
        vocab_size=300,
        sequence_length=16,
        batch_size=2,
        val_fraction=0.1,
    )


class Losses(pl.Callback):
    """Keeps every micro-batch's loss, and a copy of the checkpoint of one step."""

    def __init__(self, keep: Path | None = None, step: int = 0) -> None:
        self.losses: list[float] = []
        self.keep, self.step = keep, step

    def on_train_batch_start(self, trainer, *_) -> None:
        if self.keep and trainer.global_step == self.step + 1 and not self.keep.exists():
            shutil.copy(trainer.checkpoint_callback.last_model_path, self.keep)

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.losses.append(float(outputs["loss"]))
        # What a sampling or logging callback might do: training must not notice.
        torch.rand(3), random.random()


def assert_equal(left, right, path="") -> None:
    """Compare nested states exactly."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{path}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def mixture(**router):
    return partial(SparseMoE, num_experts=4, d_expert=8, router=RouterOptions(**router))


@pytest.mark.parametrize(
    ("accumulate", "optimizer", "ffn", "epochs", "read"),
    [
        (1, "adamw", mixture(jitter=0.1), False, "pre_attention"),
        (3, "muon", mixture(noise=True), False, "ffn_input"),
        (
            2,
            "adamw",
            mixture(score="sigmoid", selection_bias=True, jitter=0.2),
            True,
            "post_attention",
        ),
        (2, "muon", partial(Engram, num_heads=2, num_rows=50, sparse=True), False, "ffn_input"),
    ],
    ids=["jitter", "accumulated-noise-muon", "bias-over-epochs", "sparse-rows"],
)
def test_resumed_run_equals_uninterrupted_run(
    accumulate, optimizer, ffn, epochs, read, make_model, make_trainer, make_data, tmp_path
):
    steps, saved_at = 8, 3
    copy = tmp_path / "step3.ckpt"

    def fit(watch: Losses, resume: Path | None = None):
        model = make_model(
            vocab_size=300,
            ffn=ffn,
            router_input=read,
            optimizer=OptimizerConfig(name=optimizer, lr=1e-2),
            schedule=ScheduleConfig(warmup_steps=2),
        )
        trainer = make_trainer(
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            val_check_interval=2 * accumulate,
            limit_val_batches=2,
            # Four optimizer steps an epoch: the run crosses into the second and third.
            limit_train_batches=3 * accumulate if epochs else 1.0,
            enable_checkpointing=True,
            callbacks=[watch, LastCheckpoint(tmp_path / "checkpoints", saved_at)],
            plugins=[AtomicCheckpointIO()],
        )
        if resume is not None:
            torch.rand(5), random.random()  # another state than at the first start
        trainer.fit(model, make_data(), ckpt_path=resume)
        return trainer, model

    whole = Losses(copy, saved_at)
    trainer, model = fit(whole)
    rest = Losses()
    resumed_trainer, resumed = fit(rest, copy)
    assert len(whole.losses) == steps * accumulate
    assert rest.losses == whole.losses[saved_at * accumulate :]
    assert_equal(resumed.state_dict(), model.state_dict())
    assert_equal(resumed_trainer.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert_equal(resumed_trainer.callback_metrics["val/loss"], trainer.callback_metrics["val/loss"])


def arguments(corpus: Path, tmp_path: Path, name: str) -> list[str]:
    options = {
        "output": tmp_path / name,
        "checkpoint_every": 2,
        "loggers": "[csv]",
        "sample_tokens": 0,
        "trainer.max_steps": 9,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 6,
        "trainer.limit_val_batches": 2,
        "trainer.log_every_n_steps": 3,
        "trainer.enable_progress_bar": "false",
        "data.source": corpus,
        "data.data_dir": tmp_path / "data",
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "model.d_model": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.ffn": "moezoo.SparseMoE",
        "model.ffn.num_experts": 4,
        "model.ffn.router.jitter": 0.1,
        "model.optimizer.name": "muon",
        "model.schedule.warmup_steps": 2,
    }
    return ["fit", *(f"--{name}={value}" for name, value in options.items())]


KILLED = """
import os, signal, sys
import lightning.pytorch as pl
from moezoo_models.checkpoints import atomic
from moezoo_train.run import cli

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(pl.Callback):
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 5:
            die()

own = cli.MoezooCLI._callbacks
moment, *argv = sys.argv[1:]
if moment == "between":
    cli.MoezooCLI._callbacks = lambda self, output: [Killer(), *own(self, output)]
else:
    replace, written = os.replace, []
    def dying(source, target):
        written.append(target)
        if [str(t).endswith("last.ckpt") for t in written].count(True) == 3:
            die()
        replace(source, target)
    atomic.os.replace = dying
sys.argv = sys.argv[:1]
cli.run(argv)
"""


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """Return the directory of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(arguments(corpus, folder, "run"))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "last_step"), [("between", 4), ("writing", 4)])
def test_killed_run_resumes_exactly(server, moment, last_step, corpus, uninterrupted, tmp_path):
    """Kill -9 within a step, or with a checkpoint written but not yet renamed."""
    killed = arguments(corpus, tmp_path, "killed")
    ended = server.run(moment, *killed, folder=tmp_path, code=KILLED)
    assert ended.code == -signal.SIGKILL, ended.output
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == last_step

    run([*killed, "--ckpt_path=last"])
    runs = (tmp_path / "killed", uninterrupted)
    resumed, whole = (read_metrics(each / "metrics.csv") for each in runs)
    exact = ("step", "tokens", "train/loss", "train/grad_norm", "train/lr", "val/loss")
    exact += ("train/aux/load_balancing", "experts/entropy/layer_00", "experts/entropy/layer_01")
    assert [[row.get(k) for k in exact] for row in resumed] == [
        [row.get(k) for k in exact] for row in whole
    ]
    assert [row["step"] for row in whole if "train/loss" in row] == ["3", "6", "9"]
    states = [torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in runs]
    assert_equal(states[0]["state_dict"], states[1]["state_dict"])
    assert_equal(states[0]["optimizer_states"], states[1]["optimizer_states"])
    leftovers = [p.name for p in checkpoint.parent.iterdir() if p.name.startswith(".")]
    assert leftovers == []
