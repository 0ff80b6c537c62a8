"""What the learning rate does where a run is made longer."""

import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from moezoo import InputError
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import RunSchedule, ScheduleConfig, lr_factor

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

COSINE = ScheduleConfig(warmup_steps=2, min_lr_ratio=0.1)


class Rates(pl.Callback):
    """Keeps the rate of every step, and stops after one of them."""

    def __init__(self, stop: int | None) -> None:
        self.rates: dict[int, float] = {}
        self.stop = stop

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates[trainer.global_step + 1] = optimizer.param_groups[-1]["lr"]

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step == self.stop


@pytest.fixture
def train(make_model, make_trainer, random_tokens, tmp_path):
    """Return a function that trains and gives the rates, from a checkpoint and to one."""

    def run(
        steps: int, schedule: ScheduleConfig, resume: int | None = None, stop: int | None = None
    ) -> dict[int, float]:
        rates = Rates(stop)
        trainer = make_trainer(max_steps=steps, callbacks=[rates], plugins=[AtomicCheckpointIO()])
        path = None if resume is None else tmp_path / f"{resume}.ckpt"
        model = make_model(optimizer=OptimizerConfig(lr=1e-3), schedule=schedule)
        trainer.fit(model, random_tokens, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
        return rates.rates

    return run


def test_every_step_of_a_longer_run_has_the_rate_of_the_longer_schedule(train):
    train(7, COSINE)
    with pytest.warns(UserWarning, match=r"rises from 18\.6% to 66\.6% .* at step 8, .*hold"):
        resumed = train(14, COSINE, resume=7)
    assert list(resumed) == list(range(8, 15))
    assert resumed[8] == pytest.approx(6.66e-4, rel=1e-3)
    whole = train(14, COSINE)
    assert resumed == {step: whole[step] for step in resumed}


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_of_the_same_length_says_nothing(name, stop, train):
    schedule = ScheduleConfig(name, warmup_steps=4, decay_fraction=0.5)
    whole = train(8, schedule)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="schedule")
        train(8, schedule, stop=stop)
        resumed = train(8, schedule, resume=stop)
    assert resumed == {step: whole[step] for step in range(stop + 1, 9)}


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_hold_keeps_the_last_rate_and_is_kept_by_resuming(name, train):
    schedule = replace(COSINE, name=name)
    first = train(7, schedule)
    end = lr_factor(schedule, 7, 7) * 1e-3
    hold = replace(schedule, continuation="hold")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="schedule")
        resumed = train(12, hold, resume=7, stop=9) | train(12, hold, resume=9)
    assert first[7] >= end
    assert resumed == dict.fromkeys(range(8, 13), end)


def test_rewarming_begins_where_the_rate_was_and_is_kept_by_resuming(train):
    first = train(7, COSINE)
    again = replace(COSINE, continuation="rewarm")
    whole = train(14, again, resume=7)
    assert train(14, again, resume=7, stop=8) | train(14, again, resume=8) == whole
    assert whole[8] == pytest.approx((first[7] + 1e-3) / 2)
    assert whole[9] == whole[10] == 1e-3
    falling = list(whole.values())[2:]
    assert falling == sorted(falling, reverse=True)
    assert whole[14] == first[7]


def test_a_warm_up_that_does_not_fit_is_a_tenth_of_the_rest(train):
    train(7, COSINE)
    again = replace(COSINE, continuation="rewarm")
    with pytest.warns(UserWarning, match=r"warmup_steps: 2 do not fit into 2 steps; .* takes 0"):
        resumed = train(9, again, resume=7)
    assert list(resumed) == [8, 9]
    assert resumed[8] == pytest.approx(1e-3)  # at once at the peak, and down from there


@pytest.mark.parametrize(
    ("asked", "steps", "taken"), [(100, 1000, 100), (100, 101, 100), (100, 100, 10), (8, 5, 0)]
)
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_warm_up_scales_with_a_short_run(asked, steps, taken, name):
    schedule = ScheduleConfig(name, warmup_steps=asked)
    rates = [lr_factor(schedule, step, steps) for step in range(steps)]
    assert rates[:taken] == pytest.approx([(n + 1) / taken for n in range(taken)])
    assert max(rates) == 1.0
    assert rates[taken:] == sorted(rates[taken:], reverse=True)


def test_a_shortened_warm_up_is_said_and_is_that_of_a_resumed_run(train):
    schedule = replace(COSINE, warmup_steps=20)
    with pytest.warns(UserWarning, match=r"warmup_steps: 20 do not fit into 20 steps; .* takes 2"):
        whole = train(20, schedule)
    with pytest.warns(UserWarning, match="takes 2"):
        train(20, schedule, stop=1)
    with pytest.warns(UserWarning, match="takes 2"):
        assert train(20, schedule, resume=1) == {n: whole[n] for n in range(2, 21)}
    assert [whole[n] for n in (1, 2, 3)] == pytest.approx([0.5e-3, 1e-3, 1e-3])


def test_groups_that_keep_their_rate_are_left_alone():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [p], "schedule": bool(n)} for n, p in enumerate(parameters)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = RunSchedule(COSINE)
    on = schedule.put_on(optimizer, 7)
    state = on.state_dict()
    state["last_epoch"] = 6
    on.load_state_dict(state)
    schedule.set_rates()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, lr_factor(COSINE, 6, 7)]
    assert on.get_last_lr() == [1.0, lr_factor(COSINE, 6, 7)]


@pytest.mark.parametrize("saved", [{}, {"end": "x", "start": 0, "floor": 0, "factor": 1}, [1]])
def test_damage_is_one_line(saved):
    with pytest.raises(InputError, match="ckpt_path: the schedule in the checkpoint"):
        RunSchedule(COSINE).load_state_dict(saved, 7)


def test_an_unknown_continuation_is_named():
    with pytest.raises(InputError, match=r"schedule\.continuation: .* did you mean 'hold'"):
        ScheduleConfig(continuation="hol")
