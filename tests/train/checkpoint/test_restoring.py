"""Training checkpoints whose fields are of a wrong kind: one line, and nothing is taken over."""

import copy

import pytest
import torch

from moezoo.errors import InputError
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.checkpoint.restoring import CheckKinds, restoring_errors
from moezoo_train.checkpoint_structure import check_structure

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture
def build(make_model, make_trainer, random_tokens, tmp_path):
    """Return a function that trains up to a number of steps, from a state if one is given."""

    def run(steps, state=None):
        path = None
        if state is not None:
            torch.save(state, path := tmp_path / "a.ckpt")
        trainer = make_trainer(
            max_steps=steps, callbacks=[CheckKinds()], plugins=[AtomicCheckpointIO()]
        )
        with restoring_errors():
            trainer.fit(make_model(), random_tokens, ckpt_path=path)
        return trainer

    return run


@pytest.fixture
def trained(build, tmp_path):
    """Return the trainer of a finished run, and its checkpoint."""
    trainer = build(2)
    trainer.save_checkpoint(tmp_path / "sound.ckpt")
    return trainer, torch.load(tmp_path / "sound.ckpt", weights_only=True)


def changed(state, place, value):
    """Return a copy with another value in one place."""
    copied = copy.deepcopy(state)
    owner = copied
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    return copied


GROUP = ("optimizer_states", 0, "param_groups", 0)
LAYOUT = [
    (("callbacks",), 3, "callbacks is not a mapping"),
    (("callbacks", "RandomState"), [], "callbacks.RandomState is not a mapping"),
    (("loops", "fit_loop"), None, "loops.fit_loop is missing"),
    (("lr_schedulers",), {}, "lr_schedulers is not a list"),
    (("lr_schedulers", 0), 0.5, r"lr_schedulers\[0\] is not a mapping"),
    (("optimizer_states", 0), "no", r"optimizer_states\[0\] is not a mapping"),
    (("optimizer_states", 0, "state", 1), -1, r"optimizer_states\[0\].state.1 is not a mapping"),
    (GROUP, True, r"param_groups is not a list of mappings"),
    (("state_dict", "model.lm_head.weight"), 0, "model.lm_head.weight is not a tensor"),
    (("pytorch-lightning_version",), "no", "pytorch-lightning_version is 'no', not a version"),
    (("global_step",), -1, "global_step is not a whole number"),
    (("epoch",), True, "epoch is not a whole number"),
    (("moezoo", "config"), [], "moezoo.config is not a mapping"),
    (("moezoo", "guard", "recent"), [1], "moezoo.guard.recent has 1 members, not 2"),
]


def test_the_layout_is_checked_when_it_is_read(trained, tmp_path):
    state = trained[1]
    check_structure(state)
    for place, value, reason in LAYOUT:
        wrong = changed(state, place, value)
        with pytest.raises(ValueError, match=reason):
            check_structure(wrong)
    torch.save(wrong, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=rf"a\.ckpt is damaged or not a checkpoint \(.*{reason}"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


LOOP = ("loops", "fit_loop", "epoch_loop.batch_progress")
RANK = ("callbacks", "RandomState", "ranks")
KINDS = [
    (RANK, 3, "callbacks.RandomState.ranks is not a list"),
    ((*RANK, 0, "torch"), torch.zeros(3), r"ranks\[0\].torch is not a tensor"),
    (("callbacks", "TrainingMetrics", "tokens"), float("nan"), "tokens is not a whole number"),
    ((*LOOP, "total"), 0, "batch_progress.total is not a mapping"),
    ((*LOOP, "total"), {}, "batch_progress.total.ready is missing"),
    ((*LOOP, "current", "ready"), "no", "current.ready is not a whole number"),
    ((*LOOP, "is_last_batch"), 0, "is_last_batch is not true or false"),
]


def test_callbacks_and_loops_are_of_the_kinds_of_the_run(trained):
    trainer, state = trained
    checks, model = CheckKinds(), trainer.lightning_module
    checks.on_load_checkpoint(trainer, model, state)
    for place, value, reason in KINDS:
        with pytest.raises(InputError, match=reason) as error:
            checks.on_load_checkpoint(trainer, model, changed(state, place, value))
        message = str(error.value)
        assert message.startswith("ckpt_path: the checkpoint is damaged or not of this run (")
        assert "\n" not in message


def test_optimizers_and_schedules_are_too(build, trained):
    """What torch itself stumbles over is one line as well."""
    state = trained[1]
    assert build(3, state).global_step == 3
    first = ("optimizer_states", 0, "state", 0)
    for place, value, reason in [
        ((*GROUP, "lr"), [], "param_groups.lr is not a number"),
        ((*first, "exp_avg"), torch.zeros(1), "state.exp_avg is not a tensor"),
        (first, {"step": torch.tensor(4.0)}, "state lacks exp_avg, exp_avg_sq"),
        ((*first, "step"), "no", "(could not convert|not a number of steps)"),
    ]:
        with pytest.raises(InputError, match=rf"^ckpt_path: the checkpoint .*{reason}"):
            build(3, changed(state, place, value))


def test_other_errors_pass():
    with pytest.raises(TypeError), restoring_errors():
        raise TypeError("of the training itself")
