"""A full disk and a folder that is not ours to write: one line, and the last good state stays."""

import ctypes
import os
import shutil

import pytest

from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_train.checkpoint.files import AtomicCheckpointIO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def half(server, fit, tmp_path_factory):
    """Return the folder of a run that stopped after three of nine steps."""
    folder = tmp_path_factory.mktemp("half")
    steps = {"trainer.max_steps": 3, "model.schedule.total_steps": 9}
    ended = server.run(*fit(folder / "run", **steps), folder=folder)
    assert ended.code == 0, ended.output
    return folder / "run"


def go_on(fit, run) -> list[str]:
    return [*fit(run, **{"model.schedule.total_steps": 9}), "--ckpt_path=last"]


def assert_one_line(ended, *parts) -> None:
    assert ended.code == 2, ended.output
    error = ended.output.splitlines()[-1]
    assert error.startswith("moezoo: error: ")
    assert "Traceback" not in ended.output
    for part in parts:
        assert part in error


def assert_intact(run, step) -> None:
    checkpoint = AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == step
    load_checkpoint(run / "model")
    hidden = [path.name for path in run.rglob(".*")]
    assert hidden == []


def test_a_file_that_may_not_grow(server, fit, half, tmp_path):
    """What writes hears of a limit as of a full disk, from the same call."""
    run = shutil.copytree(half, tmp_path / "run")
    size = (run / "checkpoints" / "last.ckpt").stat().st_size
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    ended = server.run(*go_on(fit, run), folder=tmp_path, file_limit=size // 2)
    assert_one_line(ended, "last.ckpt: file too large")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert_intact(run, 3)
    ended = server.run(*go_on(fit, run), folder=tmp_path)
    assert ended.code == 0, ended.output
    assert_intact(run, 9)


def test_weights_that_may_not_grow(server, fit, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    size = (run / "model" / "model.safetensors").stat().st_size
    before = (run / "model" / "model.safetensors").read_bytes()
    ended = server.run(*go_on(fit, run), folder=tmp_path, file_limit=size - 1)
    assert_one_line(ended)
    assert (run / "model" / "model.safetensors").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk in memory; not everybody may."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=1500k") != 0:
        pytest.skip("only root can mount a small disk")
    yield disk
    libc.umount2(os.fsencode(disk), 2)


def test_a_full_disk(server, fit, half, small_disk):
    """Fill the disk more and more, so that it ends at another file each time."""
    run = shutil.copytree(half, small_disk / "run")
    ballast = small_disk / "ballast"
    codes = []
    free = shutil.disk_usage(small_disk).free
    for left in (0, 10_000, 60_000, 120_000, 200_000, 300_000):
        ballast.write_bytes(bytes(max(0, free - left)))
        ended = server.run(*go_on(fit, run), folder=small_disk)
        codes.append(ended.code)
        if ended.code:
            assert_one_line(ended, "no space left on device")
        ballast.unlink()
        AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
        load_checkpoint(run / "model")
    assert codes[0] == 2
    ended = server.run(*go_on(fit, run), folder=small_disk)
    assert ended.code == 0, ended.output
    assert_intact(run, 9)


def test_a_folder_that_is_read_only(server, fit, half, data, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    for folder in (run, run / "checkpoints"):
        folder.chmod(0o555)
        ended = server.run(*go_on(fit, run), folder=tmp_path, unprivileged=True)
        folder.chmod(0o755)
        assert_one_line(ended, str(run), "permission denied")
        assert_intact(run, 3)
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    ended = server.run(*fit(closed / "run"), folder=tmp_path, unprivileged=True)
    assert_one_line(ended, f"output: {closed / 'run'} cannot be written: Permission denied")
    arguments = ["prepare", "--source=stdlib", f"--output={closed / 'data'}"]
    ended = server.run(*arguments, folder=tmp_path, unprivileged=True)
    assert_one_line(ended, "output: ", "cannot be written: Permission denied")
    assert list(closed.iterdir()) == []
