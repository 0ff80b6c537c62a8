"""Kill -9 at random moments: nothing half written is taken for whole, and nothing is lost.

A moment is a time, a change of the file system, or a little after one, while a file is written.
``make torture`` kills each command fifty times.
"""

import json
import os
import random
import shutil
import signal

import pytest
import yaml
from comparing import assert_same_run, moment

from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.data.prepared import PreparedData

KILLS = int(os.environ.get("MOEZOO_KILLS", "1"))


def draw(chance: random.Random, seconds: float, operations: int) -> dict[str, float]:
    """Choose when to die, in a run that would take so long and change so many files."""
    kind = chance.choice(["time", "operation", "after operation"])
    if kind == "time":
        return {"seconds": chance.uniform(0.0, 0.8 * seconds)}
    operation = chance.randint(1, operations)
    return {
        "operation": operation,
        "delay": 0.0 if kind == "operation" else chance.uniform(1e-4, 1e-2),
    }


def kill(server, chance, whole, arguments, folder):
    """Kill a command, which might be faster than the chosen moment: then choose an earlier one."""
    seconds = whole.seconds
    while True:
        ended = server.run(*arguments, folder=folder, **draw(chance, seconds, whole.operations))
        if ended.code == -signal.SIGKILL:
            return
        assert ended.code == 0, ended.output
        for path in list(folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        seconds /= 2


def assert_nothing_is_half(run) -> None:
    """Read everything that a killed run shows."""
    for checkpoint in run.glob("checkpoints/*.ckpt"):
        AtomicCheckpointIO().load_checkpoint(checkpoint)
    if (run / "model").exists():
        load_checkpoint(run / "model")
    if (run / "config.yaml").exists():
        assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 9
    if (run / "report.json").exists():
        assert json.loads((run / "report.json").read_text())["steps"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_fit(seed, server, fit, whole, tmp_path, record_property):
    """Kill the run, kill the resumed one too if the moment comes, and let the next one finish."""
    chance = random.Random(seed)
    expected, finished = whole
    assert finished.operations > 20
    run = tmp_path / "run"
    arguments = fit(run, checkpoint_async=chance.choice(["true", "false"]))
    kill(server, chance, finished, arguments, tmp_path)
    record_property("killed", moment(run))
    assert_nothing_is_half(run)
    resume = [*arguments, "--ckpt_path=last"]
    again = draw(chance, finished.seconds, finished.operations)
    ended = server.run(*resume, folder=tmp_path, **again)
    assert ended.code in (0, -signal.SIGKILL), ended.output
    assert_nothing_is_half(run)
    if ended.code:
        record_property("killed", moment(run))
        ended = server.run(*resume, folder=tmp_path)
        assert ended.code == 0, ended.output
    assert_same_run(run, expected)


@pytest.fixture(scope="module")
def whole_data(server, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    ended = server.run(*prepare(corpus, folder), folder=folder, shard_bytes=4000)
    assert ended.code == 0, ended.output
    assert ended.operations > 20
    return folder, ended


def prepare(corpus, folder) -> list[str]:
    return ["prepare", f"--source={corpus}", f"--output={folder / 'out'}", "--vocab_size=300"]


def contents(folder) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_prepare(seed, server, corpus, whole_data, tmp_path, record_property):
    chance = random.Random(seed)
    expected, whole = whole_data
    arguments = prepare(corpus, tmp_path)

    def run(**order):
        return server.run(*arguments, folder=tmp_path, shard_bytes=4000, **order)

    for _ in range(2):
        ended = run(**draw(chance, whole.seconds, whole.operations))
        assert ended.code in (0, -signal.SIGKILL), ended.output
        if ended.code:
            record_property("killed", moment(tmp_path / "out"))
        try:
            PreparedData.load(tmp_path / "out").check_sums()
        except InputError:
            assert ended.code, ended.output
        else:
            shown = {n: c for n, c in contents(tmp_path / "out").items() if "partial" not in n}
            assert shown == contents(expected / "out")
    ended = run()
    assert ended.code == 0, ended.output
    assert contents(tmp_path / "out") == contents(expected / "out")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_saving(seed, server, tmp_path, record_property):
    """What is there after the kill loads, and is one of the last two."""
    chance = random.Random(seed)
    ended = server.run("save", folder=tmp_path, **draw(chance, 1.0, 200))
    assert ended.code == -signal.SIGKILL, ended.output
    record_property("killed", moment(tmp_path))
    saved = [int(line) for line in ended.output.split()]
    states = []
    if (tmp_path / "model").exists():
        states.append(load_checkpoint(tmp_path / "model")[0].state_dict())
    if (tmp_path / "last.ckpt").exists():
        states.append(AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["state_dict"])
    if saved:
        assert len(states) == 2
    last = max(saved, default=-1)
    for state in states:
        values = {value for tensor in state.values() for value in tensor.unique().tolist()}
        assert len(values) == 1, "a mixture of two checkpoints"
        assert values <= {last, last + 1}
