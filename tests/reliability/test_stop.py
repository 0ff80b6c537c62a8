"""Runs that are asked to stop, that lose their numbers, or one of their processes."""

import signal

import pytest
from comparing import callback, read, rows

from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_train.data.prepared import PreparedData
from moezoo_train.data.windows import TrainBatches
from moezoo_train.measure.loggers import read_metrics

pytestmark = pytest.mark.slow


def errors(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("moezoo: error: ")]


def test_sigterm_at_any_time_leaves_a_run_that_goes_on(server, fit, whole, tmp_path):
    """Asked to stop, a run that has begun to train ends with 0; before that, as any program."""
    run, codes = tmp_path / "run", []
    expected, finished = whole
    for part in (0.4, 0.6):
        resume = ["--ckpt_path=last"] if codes else []
        ended = server.run(
            *fit(run),
            *resume,
            folder=tmp_path,
            seconds=part * finished.seconds,
            number=int(signal.SIGTERM),
        )
        assert ended.code in (0, -signal.SIGTERM), ended.output
        codes.append(ended.code)
    ended = server.run(*fit(run), "--ckpt_path=last", folder=tmp_path)
    assert ended.code == 0, ended.output
    assert rows(run) == rows(expected)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stop_loses_no_validation_that_is_due_and_repeats_no_row(
    server, fit, whole, tmp_path, step
):
    """One is due after the third step, not after the second and fourth; so is a row."""
    run = tmp_path / "run"
    ask = callback("Signal", rank=0, step=step, number=int(signal.SIGTERM))
    for arguments in ([*fit(run), ask], [*fit(run), "--ckpt_path=last"]):
        ended = server.run(*arguments, folder=tmp_path)
        assert ended.code == 0, ended.output
        if ask in arguments:
            validated = [
                row["step"] for row in read_metrics(run / "metrics.csv") if "val/loss" in row
            ]
            assert validated == ["3"][: step - 1]
    assert rows(run) == rows(whole[0])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    server, fit, tmp_path, ranks, number, name, code
):
    """The last rank is asked in the middle of its third step; all stop after it."""
    run = tmp_path / "run"
    strategy = {"trainer.devices": ranks, "trainer.strategy": "ddp" if ranks > 1 else "auto"}
    ask = callback("Signal", rank=ranks - 1, step=2, number=int(number))
    ended = server.run_ranks(ranks, *fit(run, **strategy), ask, folder=tmp_path)
    assert [process.code for process in ended] == [code] * ranks, ended
    same = "as before " if ranks > 1 else ""
    command = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    said = f"stopped by {name} after step 3; go on {same}with: moezoo {' '.join(command)}\n"
    assert [process.output.count(said) for process in ended] == [1, 0][:ranks]
    assert read(run)["global_step"] == 3
    load_checkpoint(run / "model")
    ended = server.run_ranks(ranks, *command, "--trainer.callbacks=null", folder=tmp_path)
    assert [process.code for process in ended] == [0] * ranks, ended
    assert read(run)["global_step"] == 9


def test_ctrl_c_before_training_is_one_line(server, fit, tmp_path):
    """So early that nothing is set up: while the data are opened."""
    interrupt = callback("Interrupt", when="setup")
    ended = server.run(*fit(tmp_path / "run"), interrupt, folder=tmp_path)
    assert ended.code == 130, ended.output
    assert errors(ended.output) == [
        "moezoo: error: interrupted before the first checkpoint; the same command begins again"
    ]


def test_ctrl_c_reaches_no_worker(server, fit, tmp_path):
    """A terminal sends it to the workers too, who go on until the step is finished."""
    run = tmp_path / "run"
    options = {"data.num_workers": 1, "trainer.limit_val_batches": 0}
    ask = callback("Interrupt", when="group")
    ended = server.run(*fit(run, **options), ask, folder=tmp_path, group=True)
    assert ended.code == 130, ended.output
    assert "stopped by Ctrl-C after step 3" in ended.output
    assert read(run)["global_step"] == 3


def test_a_rank_that_dies_ends_the_other_with_one_line(server, fit, tmp_path):
    strategy = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    die = callback("Signal", rank=1, step=3, number=int(signal.SIGKILL))
    arguments = [*fit(tmp_path / "run", **strategy), die]
    first, second = server.run_ranks(2, *arguments, folder=tmp_path)
    assert second.code == -signal.SIGKILL
    assert first.code == 2, first.output
    (error,) = errors(first.output)
    assert "trainer: another process of this run has ended or does not answer" in error
    assert read(tmp_path / "run")["global_step"] == 2


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_lost_are_named_or_skipped_and_counted(server, fit, data, tmp_path, value):
    run = tmp_path / "run"
    arguments = [*fit(run), callback("Poison", value=f"'{value}'", steps="[4]")]
    ended = server.run(*arguments, folder=tmp_path)
    assert ended.code == 2, ended.output
    (error,) = errors(ended.output)
    # The first of this step's two batches, each of two windows.
    tokens = PreparedData.load(data).tokens("train")
    starts = TrainBatches(tokens, sequence_length=16, batch_size=2).starts(8).tolist()
    assert error.startswith(
        f"moezoo: error: step 5: loss {value} in batch 9, whose windows begin at tokens "
        f"{starts[0]}, {starts[1]} of {data / 'train.bin'}; nothing was updated"
    )
    assert read(run)["global_step"] == 4
    arguments += ["--ckpt_path=last", "--model.on_nan=skip"]
    ended = server.run(*arguments, folder=tmp_path)
    assert ended.code == 0, ended.output
    counted = [row.get("train/skipped_steps") for row in read_metrics(run / "metrics.csv")]
    assert [count for count in counted if count] == ["0", "1", "1"]
    assert read(run)["global_step"] == 9


@pytest.mark.parametrize("rule", [[], ["--model.spikes.sigmas=30", "--model.spikes.window=6"]])
def test_a_spike_is_survived_by_clipping_or_skipped(server, fit, tmp_path, rule):
    run = tmp_path / "run"
    arguments = [*fit(run), *rule, callback("Poison", value="'1e6'", steps="[6]")]
    ended = server.run(*arguments, "--trainer.gradient_clip_val=1", folder=tmp_path)
    assert ended.code == 0, ended.output
    last = read_metrics(run / "metrics.csv")[-2]
    assert last["train/skipped_steps"] == ("1" if rule else "0")
    assert float(last["train/loss"]) < 10
