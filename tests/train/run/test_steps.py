"""A run is a sequence of whole optimizer steps, each the mean of its micro-batches."""

import copy

import lightning.pytorch as pl
import pytest
import torch

from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.optim.optimizer import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

SGD = OptimizerConfig("sgd", lr=0.5, weight_decay=0.0)


class Begins(pl.Callback):
    """Keeps a copy of the model as it is before each optimizer step, and gradient norms."""

    def __init__(self) -> None:
        self.models = {}
        self.norms = {}

    def on_train_batch_start(self, trainer, module, *_) -> None:
        self.models.setdefault(trainer.global_step, copy.deepcopy(module.model))

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.norms[trainer.global_step] = module.grad_norm


@pytest.mark.parametrize(("accumulate", "batches"), [(2, 3), (3, 5), (4, 2)])
def test_the_last_step_of_an_epoch_is_the_mean_of_what_it_has(
    accumulate, batches, make_model, make_trainer, random_tokens
):
    """Of the losses that balance experts as well as of the loss of the language model."""
    begins, steps = Begins(), -(-batches // accumulate)
    model = make_model(optimizer=SGD)
    make_trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        limit_train_batches=batches,
        callbacks=[begins],
    ).fit(model, random_tokens)
    plain = begins.models[steps - 1]
    rest = list(random_tokens.train_dataloader())[:batches][(steps - 1) * accumulate :]
    assert 0 < len(rest) < accumulate
    plain.zero_grad()
    for batch in rest:
        output = plain(batch["input_ids"], shift_labels=batch["labels"])
        assert output.aux_losses["load_balancing"] > 0
        (output.loss / len(rest)).backward()
        for layer, stats in zip(ffn_layers(plain), output.ffn_stats, strict=True):
            layer.observe(stats)  # experts are balanced over the step so far
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    assert begins.norms[steps] == pytest.approx(float(norm), rel=1e-5)
    last_rate = 0.5 * min(1.0, steps / 2)
    for name, parameter in plain.named_parameters():
        expected = parameter - last_rate * parameter.grad
        torch.testing.assert_close(model.model.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


def test_a_validation_waits_for_the_step_to_end(make_model, make_trainer, random_tokens):
    validated = []

    class Watch(pl.Callback):
        def on_validation_start(self, trainer, module) -> None:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            validated.append((progress.total.ready, trainer.global_step))

    # Steps of 3, 3 and 1 batches in each epoch of 7.
    make_trainer(
        max_steps=9,
        accumulate_grad_batches=3,
        limit_train_batches=7,
        val_check_interval=6,
        limit_val_batches=1,
        callbacks=[Watch()],
    ).fit(make_model(), random_tokens)
    assert validated == [(6, 2), (13, 5), (20, 8), (21, 9)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 3}, [3]),
        ({"max_steps": 3, "val_check_interval": 3}, [3]),
        ({"max_steps": 3, "val_check_interval": 2}, [2, 3]),
        ({"max_steps": -1, "max_epochs": 2}, [6]),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2}, [4]),
        (
            {
                "max_steps": -1,
                "max_epochs": 3,
                "check_val_every_n_epoch": 2,
                "val_check_interval": 1.0,
            },
            [6, 9],
        ),
        ({"max_steps": 3, "limit_val_batches": 0}, []),
        ({"max_steps": 9, "asked": 2}, [2]),
    ],
    ids=str,
)
def test_a_run_ends_with_a_validation(options, expected, make_model, make_trainer, random_tokens):
    validated, asked = [], options.pop("asked", None)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = trainer.global_step == asked

        def on_validation_start(self, trainer, module) -> None:
            validated.append(trainer.global_step)

    arguments = {"limit_train_batches": 3, "limit_val_batches": 1, "callbacks": [Watch()]}
    make_trainer(**arguments | options).fit(make_model(), random_tokens)
    assert validated == expected


def test_a_run_that_is_asked_to_stop_finishes_the_step(
    make_model, make_trainer, random_tokens, tmp_path
):
    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.should_stop or batch_idx == 3

    trainer = make_trainer(accumulate_grad_batches=3, callbacks=[Ask()])
    trainer.fit(make_model(), random_tokens)
    assert trainer.global_step == 2
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert set(progress["total"].values()) == {6}
    assert saved["epoch"] == 0


@pytest.mark.parametrize("first", [2, 3, 4])
def test_epochs_count_once(first, make_model, make_trainer, random_tokens, tmp_path):
    """Stopped by max_steps within the first epoch of three steps, at its end, and behind it."""
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 5}
    trainer = make_trainer(max_steps=first, **options)
    trainer.fit(make_model(), random_tokens)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert saved["epoch"] == first // 3
    epochs: list[int] = []
    begun = pl.callbacks.LambdaCallback(
        on_train_epoch_start=lambda trainer, _: epochs.append(trainer.current_epoch)
    )
    resumed = make_trainer(
        max_steps=-1,
        max_epochs=3,
        callbacks=[begun],
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    resumed.fit(make_model(), random_tokens, ckpt_path=tmp_path / "first.ckpt")
    assert resumed.global_step == 3 * 3
    assert resumed.current_epoch == 3
    assert epochs == {2: [1, 2], 3: [1, 2], 4: [2]}[first]
