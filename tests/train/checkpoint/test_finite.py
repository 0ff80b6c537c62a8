"""Nothing that is not finite is written: not to model/, not to a checkpoint, not to an export."""

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moezoo import PEER, InputError
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_train.checkpoint.export import export
from moezoo_train.checkpoint.files import AtomicCheckpointIO, BackgroundCheckpointIO
from moezoo_train.checkpoint.finite import check_checkpoint
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.run.callbacks import BestCheckpoint, LastCheckpoint, SaveModel

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

SMALL_PEER = partial(PEER, num_experts=64, num_heads=2, top_k=4)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Spoil(pl.Callback):
    """Puts a number into the model, or the optimizer, after a step; and keeps what lay there.

    Args:
        folder: of the run.
        step: after which.
        number: not finite.
        what: a part of the name of the tensor.
    """

    def __init__(self, folder: Path, step: int, number: float, what: str) -> None:
        self.folder, self.step, self.number, self.what = folder, step, number, what
        self.before: dict[str, bytes] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step != self.step:
            return
        self.before = content(self.folder)
        named = dict(module.model.state_dict(keep_vars=True))
        (optimizer,) = trainer.optimizers
        for number, state in enumerate(optimizer.state.values()):
            named |= {f"{number}.{name}": value for name, value in state.items()}
        (tensor, *_) = (value for name, value in named.items() if self.what in name)
        tensor.data.view(-1)[-1] = self.number


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("number", "what"),
    [
        (math.nan, "running_mean"),
        (math.inf, "embed_tokens"),
        (-math.inf, "experts.v"),
        (math.nan, "exp_avg_sq"),
    ],
)
def test_a_run_that_is_not_finite_replaces_nothing(
    make_model, make_trainer, random_tokens, tmp_path, background, number, what
):
    """It ends by one line, and what it wrote before stays, to the byte."""
    folder = tmp_path / "run"
    spoil = Spoil(folder, 4, number, what)
    trainer = make_trainer(
        max_steps=6,
        val_check_interval=2,
        enable_checkpointing=True,
        plugins=[BackgroundCheckpointIO() if background else AtomicCheckpointIO()],
        callbacks=[
            spoil,
            SaveModel(folder / "model"),
            BestCheckpoint(folder / "checkpoints"),
            LastCheckpoint(folder / "checkpoints", 2),
        ],
    )
    model = make_model(ffn=SMALL_PEER)
    with pytest.raises(InputError, match=rf"model: after step 4 '.*{what}.*' holds NaN") as error:
        trainer.fit(model, random_tokens)
    assert "\n" not in str(error.value)
    found = content(folder)
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt"} < spoil.before.keys()
    if what == "exp_avg_sq":  # the model itself is sound, and is written
        spoil.before = {n: b for n, b in spoil.before.items() if not n.startswith("model/")}
        found = {n: b for n, b in found.items() if not n.startswith("model/")}
    assert found == spoil.before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(
    make_model, make_trainer, random_tokens, tmp_path, bad
):
    """Not even the first; afterwards the lowest one is, whatever lies between."""
    losses = iter([bad, 3.0, bad, 2.0, bad, 2.5])
    written: list[list[str]] = []

    class Write(SaveModel):
        def _write(self, trainer, pl_module) -> None:
            written.append(["model"])

    class Best(BestCheckpoint):
        def _save_checkpoint(self, trainer, filepath) -> None:
            super()._save_checkpoint(trainer, filepath)
            written.append(["best.ckpt", float(self.best_model_score)])

    model = make_model()
    model._log_evaluation = lambda stage: model.log("val/loss", next(losses))
    trainer = make_trainer(
        max_steps=6,
        val_check_interval=1,
        enable_checkpointing=True,
        callbacks=[Write(tmp_path / "model", "best"), Best(tmp_path)],
    )
    trainer.fit(model, random_tokens)
    assert written == [["model"], ["best.ckpt", 3.0], ["model"], ["best.ckpt", 2.0]]
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 4


@pytest.mark.parametrize("validated", [True, False])
def test_where_no_loss_was_finite_there_is_no_best_model(
    make_model, make_trainer, random_tokens, tmp_path, validated
):
    model = make_model()
    model._log_evaluation = lambda stage: model.log("val/loss", math.nan)
    callbacks = [SaveModel(tmp_path / "model", "best"), BestCheckpoint(tmp_path)]
    batches = {} if validated else {"limit_val_batches": 0}
    trainer = make_trainer(enable_checkpointing=True, callbacks=callbacks, **batches)
    if validated:
        with pytest.warns(UserWarning, match="no validation loss was finite"):
            trainer.fit(model, random_tokens)
    else:
        trainer.fit(model, random_tokens)
    assert (tmp_path / "model").exists() != validated
    assert not (tmp_path / "best.ckpt").exists()


def test_the_best_so_far_is_found_in_checkpoints_of_earlier_versions(tmp_path):
    options = {"filename": "best", "monitor": "val/loss", "save_on_train_epoch_end": False}
    earlier = ModelCheckpoint(dirpath=tmp_path, enable_version_counter=False, **options)
    assert BestCheckpoint(tmp_path).state_key == earlier.state_key


def test_adapters_and_the_merged_model_are_written_both_or_not_at_all(make_model, tmp_path):
    """The sum may overflow where its terms are finite."""
    save_checkpoint(tmp_path / "base", make_model().model)
    model = make_model(initialize_from=str(tmp_path / "base"), lora=LoRAOptions(rank=2))
    model.save(tmp_path / "run" / "model", None)
    before = content(tmp_path / "run")
    assert "adapter/adapter_model.safetensors" in before
    named = dict(model.model.named_parameters())
    (first, *_) = (p for name, p in named.items() if "lora_B" in name)
    for number, message in ((3e38, "q_proj.weight' holds NaN"), (math.nan, "lora_B.* holds NaN")):
        first.data.fill_(number)
        with pytest.raises(InputError, match=message):
            model.save(tmp_path / "run" / "model", None)
        assert content(tmp_path / "run") == before


def test_a_directory_is_not_written_by_tensors_that_are_not_finite(make_model, tmp_path):
    model = make_model().model
    save_checkpoint(tmp_path / "model", model)
    before = content(tmp_path / "model")
    weight = model.lm_head.weight.data
    weight[3, 4] = math.inf
    with pytest.raises(InputError, match=r"checkpoint: tensor '.*' holds NaN or an infinity"):
        save_checkpoint(tmp_path / "model", model)
    assert content(tmp_path / "model") == before
    weight[3, 4] = 3e38  # finite, but not in fp16
    with pytest.raises(InputError, match="holds NaN or an infinity"):
        save_checkpoint(tmp_path / "half", model.half())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_checkpoint_that_is_not_finite_is_not_exported(
    make_model, make_trainer, random_tokens, tmp_path, monkeypatch
):
    """As earlier versions may have left one."""
    module = make_model(ffn=SMALL_PEER)
    trainer = make_trainer(max_steps=1, plugins=[AtomicCheckpointIO()])
    trainer.fit(module, random_tokens)
    module.model.model.layers[0].mlp.query.running_var[3] = math.nan
    with pytest.raises(InputError, match=r"after step 1 '.*running_var' holds NaN"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr("moezoo_train.checkpoint.finite.check_checkpoint", lambda _: None)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"tensor '.*running_var' holds NaN"):
        export(tmp_path / "last.ckpt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_tensors_of_every_kind_are_looked_at():
    nothing = {"empty": torch.empty(0), "counts": torch.ones(2, dtype=torch.int64), "word": "x"}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for bad in (math.nan, math.inf, -math.inf):
            tensor = torch.ones(3, 5).to(dtype)
            sound = {"state_dict": {**nothing, "w": tensor}, "global_step": 7}
            check_checkpoint(sound)
            tensor[1, 2] = bad
            with pytest.raises(InputError, match=r"after step 7 'model.w' holds NaN"):
                check_checkpoint(sound)
