"""A step that is not taken changes nothing: over the whole zoo, whatever is wrong with it."""

import copy
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

import moezoo
from moezoo import PEER, InputError, SparseMoE
from moezoo.routing import RouterOptions
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.run import guard
from moezoo_train.run.guard import SpikeRule

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`lr_scheduler.step\\(\\)` was called before"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before"),
]

METHODS = [pytest.param(method, id=method.name) for method in moezoo.zoo()]
SMALL_PEER = partial(PEER, num_experts=64, num_heads=2, top_k=4)
BIASED = partial(
    SparseMoE,
    num_experts=4,
    d_expert=8,
    router=RouterOptions(score="sigmoid", selection_bias=True),
)


class Harm(pl.Callback):
    """Does something bad in some micro-batches, and keeps every state between two steps.

    Args:
        harms: by micro-batch, counted from the first of the run, what to do: multiply the hidden
            states, the gradient or the loss by a number.
    """

    def __init__(self, harms: dict[int, tuple[str, float]]) -> None:
        self.harms = harms
        self.states: list[dict] = []
        self.now: tuple[str, float] = ("", 1.0)

    def factor(self, kind: str) -> float:
        return self.now[1] if self.now[0] == kind else 1.0

    def on_fit_start(self, trainer, module) -> None:
        model = module.model
        forward = model.forward

        def harmed(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.loss = output.loss * self.factor("loss")
            if model.training:
                output.loss = output.loss + Harmed.apply(output.loss, self.factor("gradient"))
            return output

        model.forward = harmed
        model.get_input_embeddings().register_forward_hook(
            lambda layer, args, hidden: hidden * self.factor("hidden")
        )

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.now = self.harms.get(batch_idx, ("", 1.0))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.now = ("", 1.0)
        if trainer.global_step == len(self.states):
            return
        (optimizer,) = trainer.optimizers
        self.states.append(
            copy.deepcopy(
                {
                    "model": module.state_dict(),
                    "optimizer": optimizer.state_dict()["state"],
                    "precision": trainer.precision_plugin.state_dict(),
                }
            )
        )

    def changed(self, step: int) -> list[str]:
        """List what a step, counted from zero, changed."""
        before, after = flat(self.states[step - 1]), flat(self.states[step])
        assert before.keys() == after.keys()
        return [name for name, value in after.items() if not torch.equal(value, before[name])]


class Harmed(torch.autograd.Function):
    """Zero, whose gradient is that of the loss times a number less one."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.factor - 1.0), None


def flat(value, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, dict):
        found: dict[str, torch.Tensor] = {}
        for key, inner in value.items():
            found |= flat(inner, f"{name}.{key}")
        return found
    return {name: torch.as_tensor(value)}


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_changes_no_bit(
    make_model, make_trainer, random_tokens, monkeypatch, method
):
    """Of two micro-batches one is bad: its numbers, its gradient alone, or a leap of its loss."""
    harms = {4: ("hidden", math.nan), 7: ("gradient", math.inf), 8: ("loss", 1e4)}
    random_tokens.token_counts = lambda: torch.arange(50)
    monkeypatch.setattr(
        "moezoo_train.run.hash_tables.baseline_embeddings", lambda *_: torch.randn(50, 8)
    )
    model = make_model(
        ffn=method.build,
        num_layers=1,
        on_nan="skip",
        spikes=SpikeRule(sigmas=50.0, window=4),
        allow_non_causal=True,
    )
    harm = Harm(harms)
    trainer = make_trainer(
        max_steps=6, accumulate_grad_batches=2, val_check_interval=12, callbacks=[harm]
    )
    trainer.fit(model, random_tokens)
    assert model.guard.skipped == 3
    assert [harm.changed(step) for step in (2, 3, 4)] == [[], [], []]
    assert harm.changed(1)
    assert harm.changed(5)
    assert all(value.isfinite().all() for value in flat(harm.states[-1]).values())
    assert math.isfinite(float(trainer.callback_metrics["val/loss"]))


@pytest.mark.parametrize("ffn", [SMALL_PEER, BIASED])
def test_a_run_that_stops_stands_where_its_last_step_left_it(
    make_model, make_trainer, random_tokens, ffn
):
    """Its state may still be saved: by Ctrl-C, or by who called the trainer."""
    harm, model = Harm({5: ("gradient", math.inf)}), make_model(ffn=ffn)
    trainer = make_trainer(accumulate_grad_batches=2, callbacks=[harm])
    with pytest.raises(InputError, match="step 3: the gradient norm is"):
        trainer.fit(model, random_tokens)
    before, after = flat(harm.states[-1]["model"]), flat(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_what_is_logged_leaves_skipped_steps_out(make_model, make_trainer, random_tokens):
    """Losses and the experts' load are means over the steps that were taken."""
    seen, rows = [], []

    def keep(trainer, *_) -> None:
        rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    watch = pl.callbacks.LambdaCallback(
        on_train_batch_start=keep,
        on_train_batch_end=lambda trainer, module, outputs, *_: seen.append(
            float(outputs["lm_loss"])
        ),
        on_train_end=keep,
    )
    harms = {2: ("hidden", math.nan), 8: ("loss", math.nan), 10: ("loss", math.nan)}
    model = make_model(ffn=BIASED, on_nan="skip")
    trainer = make_trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        callbacks=[Harm(harms), watch],
    )
    trainer.fit(model, random_tokens)
    assert math.isnan(seen[2])
    first, second, third = rows[4], rows[8], rows[12]
    assert first["train/loss"] == pytest.approx((seen[0] + seen[1]) / 2)
    assert first["experts/router_entropy/layer_00"] > 0.0  # NaN, were the bad batch counted
    assert second["train/loss"] == pytest.approx(sum(seen[4:8]) / 4)
    assert math.isnan(third["train/loss"])
    assert third["tokens"] == 12 * 4 * 12  # they were read
    assert third["train/skipped_steps"] == 3


class Overflow(MixedPrecision):
    """fp16's gradient scaling, on a CPU in fp32: what is wrong is what the test makes wrong."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=2))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("ffn", [SMALL_PEER, BIASED])
def test_a_step_that_the_gradient_scaler_skips_changes_the_scale_alone(
    make_model, make_trainer, random_tokens, ffn
):
    harm = Harm({2: ("gradient", math.inf), 6: ("loss", math.nan)})
    model = make_model(ffn=ffn, on_nan="skip")
    trainer = make_trainer(
        max_steps=5, accumulate_grad_batches=2, callbacks=[harm], plugins=[Overflow()]
    )
    trainer.fit(model, random_tokens)
    assert harm.changed(1) == [".precision.scale", ".precision._growth_tracker"]
    scale = harm.states[1]["precision"]["scale"]
    assert scale == harm.states[0]["precision"]["scale"] / 2
    assert ".model.model.lm_head.weight" in harm.changed(2)
    assert harm.changed(3) == []  # a bad loss says nothing about the scale
    assert ".precision.scale" in harm.changed(4)  # two good steps
    assert model.guard.skipped == 1


def test_gradients_that_overflow_at_every_scale_stop(
    make_model, make_trainer, random_tokens, monkeypatch
):
    monkeypatch.setattr(guard, "MAX_OVERFLOWS_IN_A_ROW", 3)
    harm = Harm(dict.fromkeys((0, 2, 3, 5, 6, 7), ("gradient", math.inf)))
    trainer = make_trainer(max_steps=20, callbacks=[harm], plugins=[Overflow()])
    with pytest.raises(InputError, match=r"step 8: the gradient overflows fp16, the 3th time"):
        trainer.fit(make_model(), random_tokens)


def test_an_aborted_step_leaves_nothing_to_the_next_run(make_model, make_trainer, random_tokens):
    """Its first micro-batch was bad, and the second never came."""

    class Abort(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if batch_idx == 1:
                raise KeyboardInterrupt

    models = [make_model(ffn=BIASED), make_model(ffn=BIASED)]
    trainer = make_trainer(accumulate_grad_batches=2, callbacks=[Abort()])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(models[1], random_tokens)
    assert len(models[1]._losses) == 1
    models[1].zero_grad()
    for model in models:
        make_trainer(accumulate_grad_batches=2).fit(model, random_tokens)
    for one, other in zip(*(ffn_layers(model.model) for model in models), strict=True):
        assert torch.equal(one.gate.selection_bias, other.gate.selection_bias)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
