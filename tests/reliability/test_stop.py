"""Runs that are asked to stop, that lose their numbers, or one of their processes."""

import signal

import pytest

from moezoo_train.checkpointing import AtomicCheckpointIO
from moezoo_train.loggers import read_metrics

pytestmark = pytest.mark.slow
COLUMNS = ("step", "train/loss", "train/grad_norm", "val/loss")


def rows(run) -> list[list[str | None]]:
    return [[row.get(name) for name in COLUMNS] for row in read_metrics(run / "metrics.csv")]


def step_of(run) -> int:
    checkpoint = AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
    return int(checkpoint["global_step"])


def callback(name: str, **arguments) -> str:
    given = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"--trainer.callbacks=[{{class_path: callbacks.{name}, init_args: {{{given}}}}}]"


def errors(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("moezoo: error: ")]


def test_sigterm_at_any_time_leaves_a_run_that_goes_on(server, fit, tmp_path):
    """Asked to stop, a run that has begun to train ends with 0; before that, as any program."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = server.run(*fit(whole), folder=tmp_path)
    assert expected.code == 0, expected.output
    codes = []
    for part in (0.4, 0.6):
        resume = ["--ckpt_path=last"] if codes else []
        ended = server.run(
            *fit(run),
            *resume,
            folder=tmp_path,
            seconds=part * expected.seconds,
            number=int(signal.SIGTERM),
        )
        assert ended.code in (0, -signal.SIGTERM), ended.output
        codes.append(ended.code)
    ended = server.run(*fit(run), "--ckpt_path=last", folder=tmp_path)
    assert ended.code == 0, ended.output
    assert rows(run) == rows(whole)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stop_loses_no_validation_that_is_due_and_repeats_no_row(server, fit, tmp_path, step):
    """One is due after the third step, not after the second and fourth; so is a row."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    ask = callback("Signal", rank=0, step=step, number=int(signal.SIGTERM))
    for arguments in (fit(whole), [*fit(run), ask], [*fit(run), "--ckpt_path=last"]):
        ended = server.run(*arguments, folder=tmp_path)
        assert ended.code == 0, ended.output
        if ask in arguments:
            assert [row[0] for row in rows(run) if row[3]] == ["3"][: step - 1]
    assert rows(run) == rows(whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_writes_a_checkpoint_and_ends_with_0(server, fit, tmp_path, ranks):
    """The last rank is asked in the middle of its third step; all stop after it."""
    run = tmp_path / "run"
    strategy = {"trainer.devices": ranks, "trainer.strategy": "ddp" if ranks > 1 else "auto"}
    ask = callback("Signal", rank=ranks - 1, step=2, number=int(signal.SIGTERM))
    ended = server.run_ranks(ranks, *fit(run, **strategy), ask, folder=tmp_path)
    assert [process.code for process in ended] == [0] * ranks, ended
    said = "stopped by SIGTERM after step 3; go on with --ckpt_path last\n"
    assert [process.output.count(said) for process in ended] == [1, 0][:ranks]
    assert step_of(run) == 3
    ended = server.run_ranks(ranks, *fit(run, **strategy), "--ckpt_path=last", folder=tmp_path)
    assert [process.code for process in ended] == [0] * ranks, ended
    assert step_of(run) == 9


def test_a_rank_that_dies_ends_the_other_with_one_line(server, fit, tmp_path):
    strategy = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    die = callback("Signal", rank=1, step=3, number=int(signal.SIGKILL))
    arguments = [*fit(tmp_path / "run", **strategy), die]
    first, second = server.run_ranks(2, *arguments, folder=tmp_path)
    assert second.code == -signal.SIGKILL
    assert first.code == 2, first.output
    (error,) = errors(first.output)
    assert "trainer: another process of this run has ended or does not answer" in error
    assert step_of(tmp_path / "run") == 2


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_lost_are_named_or_skipped_and_counted(server, fit, tmp_path, value):
    run = tmp_path / "run"
    arguments = [*fit(run), callback("Poison", value=f"'{value}'", steps="[4]")]
    ended = server.run(*arguments, folder=tmp_path)
    assert ended.code == 2, ended.output
    (error,) = errors(ended.output)
    assert error.startswith(f"moezoo: error: step 5: loss {value}; nothing was updated")
    assert step_of(run) == 4
    arguments += ["--ckpt_path=last", "--model.on_nan=skip"]
    ended = server.run(*arguments, folder=tmp_path)
    assert ended.code == 0, ended.output
    counted = [row.get("train/skipped_steps") for row in read_metrics(run / "metrics.csv")]
    assert [count for count in counted if count] == ["0", "1", "1"]
    assert step_of(run) == 9
