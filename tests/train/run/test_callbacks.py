"""Checkpoints are whole, safe and refuse what is not theirs; model/ is what generate reads."""

import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from moezoo import InputError
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.measure.loggers import MetricsCSV, build_loggers, read_metrics
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.run.callbacks import LastCheckpoint, SaveModel, get_random_state, set_random_state
from moezoo_train.run.stopping import StopSignals, raising_interrupts

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


@pytest.fixture
def trained(make_model, make_trainer, random_tokens, tmp_path):
    """Return a checkpoint after three steps, written by the callback."""
    trainer = make_trainer(
        max_steps=3,
        enable_checkpointing=True,
        callbacks=[LastCheckpoint(tmp_path / "checkpoints", 2)],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(make_model(), random_tokens)
    return tmp_path / "checkpoints" / "last.ckpt"


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path, "w") as file:
        file.write("old")

    def interrupted() -> None:
        with atomic_write(path, "w") as file:
            file.write("new")
            file.flush()
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_random_state_round_trips_through_safe_loading(tmp_path):
    torch.save(get_random_state(), tmp_path / "state")
    drawn = (random.random(), np.random.rand(), torch.rand(2))  # noqa: NPY002
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    again = (random.random(), np.random.rand(), torch.rand(2))  # noqa: NPY002
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_checkpoint_loads_without_unpickling_and_describes_itself(trained):
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint["global_step"] == 3  # the final state, beyond the last multiple of 2
    config = checkpoint["moezoo"]["config"]
    assert config["hidden_size"] == 16
    assert config["ffn"][0]["class_path"] == "moezoo.SparseMoE"
    assert config["ffn"][0]["init_args"]["num_experts"] == 4
    assert [p.name for p in trained.parent.iterdir()] == ["last.ckpt"]


def test_interrupted_checkpoint_leaves_the_old_one(trained, monkeypatch):
    before = trained.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, trained)
    assert trained.read_bytes() == before
    assert [p.name for p in trained.parent.iterdir()] == ["last.ckpt"]


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "there is no checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "is damaged or not a checkp"),
        (lambda path: path.write_text("hello"), "is damaged or not a checkpoint"),
        (lambda path: torch.save({"a": 1}, path), "is not a training checkpoint"),
        (lambda path: torch.save({"state_dict": Evil()}, path), "is damaged or not a checkpoint"),
        (
            lambda path: torch.save(
                {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": 1}, path
            ),
            "was not written by moezoo fit",
        ),
    ],
)
def test_bad_checkpoints(
    trained, damage, message, make_model, make_trainer, random_tokens, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    damage(trained)
    trainer = make_trainer(plugins=[AtomicCheckpointIO()])
    with pytest.raises(InputError, match=message) as error:
        trainer.fit(make_model(), random_tokens, ckpt_path=str(trained))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 32}, r"model.d_model is 16 in the checkpoint, but 32 in this run"),
        ({"num_layers": 3}, r"model.num_layers is 2 in the checkpoint, but 3 in this run"),
        ({"optimizer": OptimizerConfig(lr=0.5)}, r"optimizer.lr is 0.01 in .* but 0.5 in this"),
        ({"optimizer": OptimizerConfig(name="muon")}, r"optimizer.name is adamw in .* but muon"),
    ],
)
def test_checkpoint_of_another_run(
    trained, arguments, message, make_model, make_trainer, random_tokens
):
    trainer = make_trainer(plugins=[AtomicCheckpointIO()])
    with pytest.raises(InputError, match=message):
        trainer.fit(make_model(**arguments), random_tokens, ckpt_path=str(trained))


@pytest.mark.parametrize("began", ["bfloat16", "float32"])
def test_a_resumed_run_keeps_the_arithmetic_it_began_with(
    began, make_model, make_trainer, random_tokens, tmp_path
):
    """Runs of before there was a choice began in bf16, and their checkpoints say so."""
    chosen = OptimizerConfig("muon", lr=1e-2, muon_dtype=began)

    def fit(optimizer, steps, resume=None):
        model = make_model(optimizer=optimizer)
        trainer = make_trainer(max_steps=steps, plugins=[AtomicCheckpointIO()])
        trainer.fit(model, random_tokens, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return torch.load(tmp_path / f"{steps}.ckpt", weights_only=True)

    other = {"bfloat16": "float32", "float32": "bfloat16"}[began]
    half = fit(chosen, 2)
    same = fit(chosen, 4, tmp_path / "2.ckpt")
    resumed = fit(replace(chosen, muon_dtype="auto"), 4, tmp_path / "2.ckpt")
    for checkpoint in (half, same, resumed):
        assert checkpoint["moezoo"]["optimizer"]["muon_dtype"] == began
    for name, tensor in same["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name
    message = f"optimizer.muon_dtype is {began} in the checkpoint, but {other} in this run"
    with pytest.raises(InputError, match=message):
        fit(replace(chosen, muon_dtype=other), 4, tmp_path / "2.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_evaluation_takes_a_checkpoint_whatever_the_optimizer(
    trained, make_model, make_trainer, random_tokens
):
    model = make_model(optimizer=OptimizerConfig(name="muon"))
    trainer = make_trainer(plugins=[AtomicCheckpointIO()])
    trainer.validate(model, random_tokens, ckpt_path=str(trained), verbose=False)
    saved = torch.load(trained, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


class Terminate(LastCheckpoint):
    """Sends this process SIGTERM in the first half of the second accumulated step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_the_step_saves_and_stops(
    make_model, make_trainer, random_tokens, tmp_path
):
    callback = Terminate(tmp_path / "checkpoints", 100)
    trainer = make_trainer(
        max_steps=6, accumulate_grad_batches=2, enable_checkpointing=True, callbacks=[callback]
    )
    model = make_model()
    trainer.fit(model, random_tokens)
    assert callback.stopped_by == signal.SIGTERM
    assert trainer.global_step == 2
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["processed"] == 4
    assert all(torch.equal(saved["state_dict"][n], t) for n, t in model.state_dict().items())


class Interrupt(LastCheckpoint):
    """Sends this process SIGINT in some places: ``("train", batch)`` or ``("val", batch)``."""

    def __init__(self, *args, places) -> None:
        super().__init__(*args)
        self.places = list(places)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._reach("train", batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_) -> None:
        self._reach("val", batch_idx)

    def _reach(self, *place) -> None:
        if place in self.places:
            self.places.remove(place)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """Handle SIGINT as Python does; a shell has it ignored in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Validations(Callback):
    """Counts those that ended."""

    finished = 0

    def on_validation_end(self, trainer, pl_module) -> None:
        self.finished += 1


def interrupted(make_model, make_trainer, random_tokens, folder, places, watch=None):
    """Train six steps of two batches, validating after each second, with Ctrl-C in some places."""
    callback = Interrupt(folder / "checkpoints", 1, places=places)
    trainer = make_trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        val_check_interval=4,
        enable_checkpointing=True,
        callbacks=[SaveModel(folder / "model"), callback, *([watch] if watch else [])],
        plugins=[AtomicCheckpointIO()],
    )
    with raising_interrupts():
        trainer.fit(make_model(), random_tokens)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == trainer.global_step
    assert load_checkpoint(folder / "model")
    return callback, trainer


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("place", "step", "validations"),
    [(("train", 0), 1, 0), (("train", 3), 2, 1), (("val", 0), 2, 1), (("train", 11), 6, 3)],
    ids=["first step", "before a validation", "in a validation", "last step"],
)
def test_ctrl_c_finishes_the_step_saves_and_stops(
    make_model, make_trainer, random_tokens, tmp_path, place, step, validations, capfd
):
    count = Validations()
    callback, trainer = interrupted(
        make_model, make_trainer, random_tokens, tmp_path, [place], watch=count
    )
    assert callback.stopped_by == signal.SIGINT
    assert trainer.global_step == step
    assert count.finished == validations
    assert "stopping when this step is finished and saved" in capfd.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(
    make_model, make_trainer, random_tokens, tmp_path
):
    places = [("train", 4), ("train", 5)]
    with pytest.raises(KeyboardInterrupt):
        interrupted(make_model, make_trainer, random_tokens, tmp_path, places)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.usefixtures("ctrl_c")
def test_the_same_ctrl_c_passed_on_by_a_launcher_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("moezoo_train.run.stopping.time.monotonic", lambda: now[0])
    signals = StopSignals()
    signals.install(launched=True, first=False)
    for now[0] in (0.0, 0.5):
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.asked == signal.SIGINT
    now[0] = 1.5
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signals.restore()


def test_an_ignored_sigint_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals = StopSignals()
    signals.install(launched=False, first=False)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signals.restore()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("keep", "expected"), [("last", 3), ("best", 1)])
def test_model_directory(make_model, make_trainer, random_tokens, tmp_path, keep, expected):
    model = make_model()
    # Not the losses of this run, which rounding decides, but some that are best in the middle.
    losses, states = iter([3.0, 1.0, 2.0, 1.5]), []
    model._log_evaluation = lambda stage: model.log("val/loss", next(losses))

    class Watch(SaveModel):
        def on_validation_end(self, trainer, pl_module) -> None:
            super().on_validation_end(trainer, pl_module)
            states.append({k: v.clone() for k, v in model.model.state_dict().items()})

    callback = Watch(tmp_path / "model", keep)
    make_trainer(max_steps=8, val_check_interval=2, callbacks=[callback]).fit(model, random_tokens)
    assert len(states) == 4
    saved, _ = load_checkpoint(tmp_path / "model")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, states[expected][name]), name


def test_metrics_table_grows_and_goes_on_from_a_step(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    logger.start(0)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    logger.log_metrics({"a": 2.0, "b": 0.1}, step=2)
    logger.save()
    logger.log_metrics({"b": 3.0}, step=3)
    logger.save()
    assert path.read_text() == "step,a,b\n1,1,\n2,2,0.1\n3,,3\n"
    with open(path, "a") as file:
        file.write("4,5")  # killed while writing
    resumed = MetricsCSV(path)
    resumed.start(2)
    resumed.log_metrics({"a": 7.0, "c": 8.0}, step=3)
    resumed.save()
    assert path.read_text() == "step,a,b,c\n1,1,,\n2,2,0.1,\n3,7,,8\n"
    assert read_metrics(path)[1] == {"step": "2", "a": "2", "b": "0.1"}


def test_loggers_by_name(tmp_path):
    csv, tensorboard = build_loggers(["tensorboard", "csv"], tmp_path)
    assert isinstance(csv, MetricsCSV)
    assert tensorboard.log_dir == str(tmp_path / "tensorboard")
    with pytest.raises(InputError, match="loggers: 'mlflow' is not known"):
        build_loggers(["mlflow"], tmp_path)


def test_missing_logger_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"loggers: wandb is not installed; run: pip install 'moezoo\[wandb\]'"
    ):
        build_loggers(["wandb"], tmp_path)
