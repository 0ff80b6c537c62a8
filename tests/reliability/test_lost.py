"""A run is never lost: what is missing is no leave to overwrite, and one run writes at a time."""

import shutil
from pathlib import Path

import pytest
from comparing import read
from filelock import FileLock

from moezoo.__main__ import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(fit, tmp_path_factory) -> Path:
    """Return the directory of a finished run."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(fit(output)) == 0
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """Return a copy of it, to take something away."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Read all that is in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def remove(run: Path, *names: str) -> None:
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def refused(capsys, folder: Path, *arguments: str) -> str:
    """Return the one line of a refusal, which changes nothing."""
    before = contents(folder)
    assert main(arguments) == 2
    assert contents(folder) == before
    (line,) = [n for n in capsys.readouterr().err.splitlines() if n.startswith("moezoo: error")]
    return line.removeprefix("moezoo: error: ")


LAST = "checkpoints/last.ckpt"
BEST = "checkpoints/best.ckpt"
FURTHER = "model/, report.json"


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ((LAST,), f"{BEST}, {FURTHER}; go on with --ckpt_path best"),
        ((LAST, BEST), f"{FURTHER}; begin another run with --model.initialize_from RUN/model"),
        (("checkpoints",), f"{FURTHER}; begin another run with --model.initialize_from RUN/model"),
        (("checkpoints", "model"), "report.json; give another --output"),
    ],
)
def test_without_last_what_is_there_is_named_and_stays(fit, copied, tmp_path, capsys, gone, said):
    remove(copied, *gone)
    line = refused(capsys, tmp_path, *fit(copied), "--ckpt_path=last")
    said = said.replace("RUN", str(copied))
    assert line == (
        f"ckpt_path: there is no {copied / LAST}, but {copied} holds {said}, "
        "or replace it all with --overwrite true"
    )


def test_another_checkpoint_is_named(fit, copied, tmp_path, capsys):
    remove(copied, LAST, BEST, "model", "report.json")
    (copied / "checkpoints" / "step=500.ckpt").mkdir()  # a checkpoint may be a directory
    line = refused(capsys, tmp_path, *fit(copied), "--ckpt_path=last")
    assert f"give --ckpt_path {copied / 'checkpoints' / 'step=500.ckpt'}" in line


def test_adapters_are_a_run(fit, copied, tmp_path, capsys):
    remove(copied, *(path.name for path in copied.iterdir()))
    (copied / "adapter").mkdir()
    (copied / "adapter" / "adapter_model.safetensors").touch()
    assert "holds adapter/" in refused(capsys, tmp_path, *fit(copied), "--ckpt_path=last")
    assert "holds a run (adapter)" in refused(capsys, tmp_path, *fit(copied))


@pytest.mark.parametrize("name", ["report.json", "config.yaml", "sample.txt"])
def test_a_new_run_replaces_no_file_unasked(fit, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    line = refused(capsys, tmp_path, *fit(tmp_path / "run"))
    assert line.startswith(f"output: {tmp_path / 'run'} already holds a run ({name}); ")


def test_where_nothing_was_learned_a_run_begins_anew_and_says_so(fit, copied, capsys):
    """As after a kill before the first checkpoint; or with a mistyped output."""
    remove(copied, "checkpoints", "model", "report.json")
    (copied / "checkpoints").mkdir()
    assert main([*fit(copied), "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
    said = f"no checkpoint in {copied / 'checkpoints'}: starting at step 0\n"
    assert said in capsys.readouterr().err
    assert (copied / LAST).exists()


def test_asked_to_overwrite_it_begins_anew(fit, copied, capsys):
    remove(copied, LAST)
    options = ["--ckpt_path=last", "--overwrite=true", "--trainer.max_steps=3"]
    assert main([*fit(copied), *options]) == 0
    assert "starting at step 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.num_heads=3"], "d_model: 16 is not divisible"),
        (["--data.source=nowhere.txt", "--data.data_dir=DATA"], "nowhere.txt"),
    ],
)
def test_what_may_be_overwritten_stays_until_another_run_begins(
    fit, copied, tmp_path, capsys, options, said
):
    (copied / "tensorboard").mkdir()
    (copied / "tensorboard" / "events.old").touch()
    options = [option.replace("DATA", str(tmp_path / "data")) for option in options]
    assert said in refused(capsys, tmp_path, *fit(copied), "--overwrite=true", *options)
    assert main([*fit(copied), "--overwrite=true", "--trainer.max_steps=3"]) == 0
    assert not (copied / "tensorboard" / "events.old").exists()
    assert read(copied)["global_step"] == 3


def test_a_checkpoint_that_a_kill_left_under_its_old_name_is_gone_on_with(fit, copied, capsys):
    checkpoints = copied / "checkpoints"
    (checkpoints / "last.ckpt").rename(checkpoints / ".last.ckpt.old-0123abcd")
    assert main([*fit(copied), "--ckpt_path=last"]) == 0
    assert "starting at step 0" not in capsys.readouterr().err
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_names_what_is_there(fit, copied, tmp_path, capsys, command):
    remove(copied, LAST)
    arguments = [command, *(a for a in fit(copied)[1:])]
    line = refused(capsys, tmp_path, *arguments)
    assert line.endswith(f"holds {BEST}, {FURTHER}; give --ckpt_path best")
    assert main([*arguments, "--ckpt_path=best"]) == 0


@pytest.mark.parametrize("options", [[], ["--ckpt_path=last"], ["--overwrite=true"]])
def test_two_runs_with_one_output_are_refused(fit, copied, tmp_path, capsys, options):
    with FileLock(tmp_path / ".run.lock"):
        line = refused(capsys, tmp_path, *fit(copied), *options)
    assert line == (
        f"output: another process is writing {copied}; wait for its end, or name another"
    )


def test_a_run_holds_its_output_and_leaves_no_lock(fit, copied, tmp_path, capsys, monkeypatch):
    """Neither a conversion nor another run comes between."""
    seen = []

    def look(self, trainer, module):
        assert (tmp_path / ".run.lock").exists()
        seen.append(main([*fit(copied), "--overwrite=true"]))

    # In one process a lock may be taken again, so the other's is stood for by forgetting ours.
    from moezoo_models.checkpoints import locks
    from moezoo_train.run.callbacks import RandomState

    monkeypatch.setattr(RandomState, "on_train_start", look)
    monkeypatch.setattr(locks, "_held", type("Nothing", (set,), {"__contains__": lambda *_: 0})())
    assert main([*fit(copied), "--ckpt_path=last", "--trainer.max_steps=10"]) == 0
    assert seen == [2]
    assert f"another process is writing {copied}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
