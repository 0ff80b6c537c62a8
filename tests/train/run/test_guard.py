"""Which steps are skipped or end a run: spikes by hand, and in training."""

import copy
import random
import statistics

import lightning.pytorch as pl
import pytest
import torch

from moezoo import InputError
from moezoo_train.run.guard import SpikeRule, StepGuard

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

RULE = SpikeRule(sigmas=3.0, window=8)


class Strategy:
    def reduce_boolean_decision(self, decision, all=True):
        return decision


class Run:
    """As much of a trainer as judging takes."""

    precision = "32-true"
    strategy = Strategy()
    global_step = 0


def values() -> list[tuple[float, float]]:
    """Draw losses and gradient norms, with a leap now and then of one or the other."""
    chance = random.Random(0)
    rows = [[chance.gauss(3.0, 0.1), chance.gauss(1.0, 0.1)] for _ in range(60)]
    for step in (2, 13, 29, 44):
        rows[step][step % 2] *= 5
    return [(loss, norm) for loss, norm in rows]


def judge(guard, rows) -> list[bool]:
    return [guard.allows(Run(), torch.tensor([2 * loss, 0.0]), norm) for loss, norm in rows]


def test_a_spike_is_so_many_standard_deviations_above_the_last_steps():
    rows = [(float(torch.tensor(loss)), norm) for loss, norm in values()]
    expected = []
    for step, now in enumerate(rows):
        before = list(zip(*rows[max(0, step - 8) : step], strict=True))
        expected.append(
            step < 4
            or all(
                value <= statistics.mean(last) + 3.0 * statistics.stdev(last)
                for value, last in zip(now, before, strict=True)
            )
        )
    guard = StepGuard("stop", RULE)
    assert judge(guard, rows) == expected
    assert not any(expected[step] for step in (13, 29, 44))
    assert expected[2]
    assert guard.skipped == expected.count(False) < 10


def test_without_a_rule_every_finite_step_is_taken():
    assert all(judge(StepGuard("stop"), [(1.0, 1.0)] * 9 + [(1e30, 1e30)]))


def test_a_lasting_change_is_accepted():
    rows = values()
    judged = judge(StepGuard("stop", RULE), rows[:30] + [(x + 4.0, norm) for x, norm in rows[30:]])
    assert not judged[30]
    assert all(judged[31:40])


def test_a_state_judges_on_as_if_nothing_had_happened():
    rows = values()
    whole = judge(StepGuard("stop", RULE), rows)
    first, second = StepGuard("stop", RULE), StepGuard("stop", RULE)
    judge(first, rows[:29])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert judge(second, rows[29:]) == whole[29:]
    assert second.skipped == whole.count(False)


def test_numbers_that_are_not_finite_do_not_enter_the_mean():
    guard = StepGuard("skip", RULE)
    rows = values()[:20]
    mixed = [*rows[:9], (float("nan"), 1.0), (1.0, float("inf")), *rows[9:]]
    expected = judge(StepGuard("stop", RULE), rows)
    assert judge(guard, mixed) == [*expected[:9], False, False, *expected[9:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": -1.0}, "spikes.sigmas: -1 is out of range"),
        ({"window": 3}, "spikes.window: 3 is out of range"),
    ],
)
def test_rules_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        SpikeRule(**options)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_spike_leaves_parameters_alone(
    make_model, make_trainer, random_tokens, tmp_path, resumed
):
    """Also where the last steps were those of a run before."""
    states, path = {}, tmp_path / "half.ckpt"

    def train(steps, **options):
        model = make_model(spikes=SpikeRule(sigmas=20.0, window=8))
        forward = model.model.forward

        def leap(*args, **kwargs):
            output = forward(*args, **kwargs)
            if model.training and model.global_step == 7:
                output.loss = output.loss * 1e3
            return output

        model.model.forward = leap
        keep = pl.callbacks.LambdaCallback(
            on_train_batch_end=lambda trainer, *_: states.update(
                {trainer.global_step: [p.detach().clone() for p in model.parameters()]}
            )
        )
        trainer = make_trainer(max_steps=steps, callbacks=[keep])
        trainer.fit(model, random_tokens, **options)
        return model, trainer

    model, trainer = train(6 if resumed else 9)
    if resumed:
        trainer.save_checkpoint(path)
        model, _ = train(9, ckpt_path=path)
    assert model.guard.skipped == 1
    assert all(map(torch.equal, states[7], states[8]))
    assert not all(map(torch.equal, states[8], states[9]))
