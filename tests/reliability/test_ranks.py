"""Several processes that write parts of one checkpoint: killed, lost, stuck, and damaged."""

import os
import random
import shutil
import signal

import pytest
from comparing import STATES, assert_equal, callback, moment, names, read, rows

pytestmark = pytest.mark.slow
KILLS = max(1, int(os.environ.get("MOEZOO_KILLS", "1")) // 5)
FSDP2 = "moezoo_train.parallel.fsdp2.FSDP2Strategy"
PARTS = {
    "trainer.devices": 2,
    "trainer.strategy": FSDP2,
    "trainer.strategy.save_distributed_checkpoint": "true",
    "trainer.strategy.timeout_minutes": 1,
}
LOST = "moezoo: error: trainer: another process of this run has ended or does not answer"


def assert_one_line(ended, beginning) -> None:
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    (error,) = [line for line in ended.output.splitlines() if "moezoo: error: " in line]
    assert error.startswith(beginning)


@pytest.fixture(scope="module")
def parts(server, fit, tmp_path_factory):
    """Return the folder of an uninterrupted run, and how its first process ended."""
    folder = tmp_path_factory.mktemp("parts")
    ended = server.run_ranks(2, *fit(folder / "run", **PARTS), folder=folder)
    assert [process.code for process in ended] == [0, 0], ended
    assert len(list((folder / "run/checkpoints/last.ckpt").glob("*.safetensors"))) == 2
    return folder / "run", ended[0]


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_rank(seed, server, fit, parts, tmp_path, record_property):
    """The other one ends as well, and says why; the resumed run equals the uninterrupted one."""
    chance = random.Random(seed)
    expected, finished = parts
    run, rank = tmp_path / "run", chance.randrange(2)
    fate = {"seconds": chance.uniform(0.2, 0.8) * finished.seconds}
    if rank == 0 and chance.random() < 0.5:
        fate = {"operation": chance.randint(1, finished.operations)}
    ended = server.run_ranks(2, *fit(run, **PARTS), folder=tmp_path, rank=rank, **fate)
    while not ended[rank].code:  # it was faster than the chosen moment
        shutil.rmtree(run)
        fate = {"seconds": ended[rank].seconds / 2}
        ended = server.run_ranks(2, *fit(run, **PARTS), folder=tmp_path, rank=rank, **fate)
    assert ended[rank].code == -signal.SIGKILL, ended
    record_property("killed", moment(run))
    # The other had finished, or says what happened.
    if ended[1 - rank].code:
        assert_one_line(ended[1 - rank], LOST)
    if (run / "checkpoints" / "last.ckpt").exists():
        assert read(run)["global_step"] <= 9
    arguments = [*fit(run, **PARTS), "--ckpt_path=last"]
    ended = server.run_ranks(2, *arguments, folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    assert rows(run) == rows(expected)
    left, right = read(run), read(expected)
    for key in STATES:
        assert_equal(left[key], right[key], key)
    assert names(run) == names(expected)


@pytest.mark.parametrize("damage", ["flipped part", "truncated part", "flipped rest"])
def test_a_damaged_part_is_named_by_every_process(server, fit, parts, tmp_path, damage):
    run = shutil.copytree(parts[0], tmp_path / "run")
    directory = run / "checkpoints" / "last.ckpt"
    file = directory / "rest.ckpt" if "rest" in damage else max(directory.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if "flipped" in damage:
        content[len(content) // 2] ^= 1
    else:
        del content[-100:]
    file.write_bytes(content)
    ended = server.run_ranks(2, *fit(run, **PARTS), "--ckpt_path=last", folder=tmp_path)
    for process in ended:
        assert_one_line(process, f"moezoo: error: ckpt_path: {directory} is damaged")
        assert file.name in process.output


LAYOUTS = {
    "ddp": (2, {"strategy": "DDPStrategy", "strategy.timeout": "0:00:05"}),
    "fsdp2": (
        4,
        {
            "strategy": FSDP2,
            "strategy.expert_parallel": 2,
            "strategy.replicas": 2,
            "strategy.timeout_minutes": 0.1,
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS if KILLS > 1 else ["fsdp2"])
def test_a_rank_that_hangs_ends_the_others_after_the_timeout(server, fit, tmp_path, layout):
    """It stops after three steps. In groups of some ranks, too, the others wait no longer."""
    ranks, options = LAYOUTS[layout]
    options = {f"trainer.{name}": value for name, value in options.items()}
    stop = callback("Signal", rank=ranks - 1, step=3, number=int(signal.SIGSTOP))
    arguments = [*fit(tmp_path / "run", **options, **{"trainer.devices": ranks}), stop]
    *others, stuck = server.run_ranks(ranks, *arguments, folder=tmp_path)
    assert stuck.code == -signal.SIGKILL
    for process in others:
        assert_one_line(process, LOST)
    assert read(tmp_path / "run")["global_step"] == 2


def test_a_rank_that_never_comes_is_missed_after_the_timeout(server, fit, tmp_path):
    strategy = PARTS | {"trainer.strategy.timeout_minutes": 0.05}
    arguments = fit(tmp_path / "run", **strategy)
    (ended,) = server.run_ranks(2, *arguments, folder=tmp_path, absent=1)
    assert_one_line(ended, LOST)
    assert not (tmp_path / "run" / "checkpoints").exists()
