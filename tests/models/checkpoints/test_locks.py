"""One writer at a time, and nothing of a killed one stays."""

import errno
import os
import signal
import threading

import pytest
from filelock import FileLock, Timeout

from moezoo import InputError
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.checkpoints import atomic
from moezoo_models.checkpoints.atomic import (
    is_there,
    publish,
    remove_leftovers,
    replacing_directory,
)
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.checkpoints.export import export
from moezoo_models.checkpoints.locks import writing
from moezoo_models.conversion.writer import workspace

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture
def dense(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path / "dense"
    return save_checkpoint(path, MoezooForCausalLM(MoezooConfig(**sizes)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(target, field="output"):
    """Return the message of a refusal."""
    with pytest.raises(InputError) as error, writing(target, field):
        pass
    return str(error.value)


def test_a_target_that_another_writes_is_refused_in_one_line(tmp_path):
    with FileLock(tmp_path / ".out.lock"):
        said = refused(tmp_path / "out", "target")
    assert said.startswith(f"target: another process is writing {tmp_path / 'out'}; ")
    assert "\n" not in said
    with writing(tmp_path / "out"):
        pass


def test_a_lock_is_taken_again_within_and_leaves_nothing(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with writing(target):
        assert names(target.parent) == [".out.lock"]
        with writing(target):
            pass
        with pytest.raises(Timeout):
            FileLock(target.parent / ".out.lock").acquire(timeout=0)
    assert names(tmp_path) == []


def test_a_folder_in_which_something_was_made_stays(tmp_path):
    target = tmp_path / "a" / "out"
    with writing(target):
        target.mkdir()
    assert names(tmp_path / "a") == ["out"]


def test_symlinks_name_the_same_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with FileLock(tmp_path / ".real.lock"):
        assert "another process is writing" in refused(tmp_path / "link")


def test_a_waiting_process_says_so_and_goes_on(tmp_path, capfd):
    ready, told = os.pipe()
    waits, ends = os.pipe()
    child = os.fork()
    if child == 0:
        with writing(tmp_path / "out"):
            os.write(told, b"1")
            os.read(waits, 1)
        os._exit(0)
    assert os.read(ready, 1) == b"1"
    threading.Timer(0.2, os.write, (ends, b"1")).start()
    with writing(tmp_path / "out", wait=True):
        assert "waiting for another process that writes" in capfd.readouterr().err
    os.waitpid(child, 0)
    for pipe in (ready, told, waits, ends):
        os.close(pipe)


def test_the_lock_lies_within_where_the_folder_around_is_not_writable(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()

    def acquire(self, *args, **kwargs):
        if self.lock_file.endswith(".out.lock"):
            raise PermissionError(errno.EACCES, "Permission denied", self.lock_file)
        return original(self, *args, **kwargs)

    original = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", acquire)
    with writing(tmp_path / "out"):
        assert names(tmp_path / "out") == [".lock"]
    assert names(tmp_path / "out") == []
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: acquire(FileLock(".out.lock")))
    said = refused(tmp_path / "new")
    assert said.startswith(f"output: {tmp_path / 'new'} cannot be written: Permission denied; ")


def test_a_folder_that_a_refused_block_left_empty_goes(tmp_path):
    target = tmp_path / "new" / "out"

    def refuse():
        with writing(target):
            target.mkdir()
            raise InputError("text: too little of it")

    with pytest.raises(InputError):
        refuse()
    assert names(tmp_path) == []
    target.mkdir(parents=True)
    with writing(target):
        assert target.is_dir()
    assert target.is_dir()  # it was there before


def test_without_locks_a_warning_is_all(tmp_path, monkeypatch, capsys):
    def acquire(self, *args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with writing(tmp_path / "out"):
        (tmp_path / "out").touch()
    assert "has no locks; let no other process write" in capsys.readouterr().err


def test_a_lock_ends_with_its_process_though_a_forked_one_lives(tmp_path):
    """The workers of a data loader outlive a run that is killed by seconds."""
    ready, told = os.pipe()
    waits, ends = os.pipe()
    child = os.fork()
    if child == 0:
        with writing(tmp_path / "out"):
            if os.fork() == 0:
                os.write(told, b"1")
                os.close(ends)
                os.read(waits, 1)
                os._exit(0)
            signal.pause()
    os.close(told)
    assert os.read(ready, 1) == b"1"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == [".out.lock"]
    with writing(tmp_path / "out"):
        pass
    assert names(tmp_path) == []
    for pipe in (ready, waits, ends):
        os.close(pipe)


@pytest.mark.parametrize("name", ["out", "o[u]t"])
def test_what_a_killed_writer_left_goes_with_the_next(tmp_path, name):
    (tmp_path / f".{name}.new-0123abcd").mkdir()
    (tmp_path / f".{name}.new-0123abcd" / "weights").touch()
    (tmp_path / f".{name}.new-01.new-0123abcd").mkdir()  # of another target
    with replacing_directory(tmp_path / name) as fresh:
        (fresh / "new").touch()
    assert names(tmp_path) == [f".{name}.new-01.new-0123abcd", name]
    assert names(tmp_path / name) == ["new"]


def test_export_removes_what_a_killed_export_left(dense, tmp_path):
    (tmp_path / ".out.new-0123abcd").mkdir()
    export(dense, tmp_path / "out")
    assert names(tmp_path) == ["dense", "out"]


def test_export_and_conversion_refuse_what_another_writes(dense, tmp_path):
    with FileLock(tmp_path / ".out.lock"):
        with pytest.raises(InputError, match="target: another process is writing"):
            export(dense, tmp_path / "out")
        conversion = workspace(tmp_path / "out", "identity", force=False)
        with pytest.raises(InputError, match="target: another process is writing"):
            conversion.__enter__()
    assert names(tmp_path) == [".out.lock", "dense"]


def test_a_conversion_removes_what_a_killed_export_left(tmp_path):
    (tmp_path / ".out.new-0123abcd").mkdir()
    with workspace(tmp_path / "out", "identity", force=False):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kinds", [("file", "folder"), ("folder", "file"), ("file", "file")])
def test_a_file_and_a_folder_take_each_others_place(tmp_path, monkeypatch, kinds, exchange):
    """As checkpoints do when a run goes on with or without save_distributed_checkpoint."""
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)

    def make(path, kind, content):
        if kind == "folder":
            path.mkdir()
            path = path / "file"
        path.write_text(content)

    make(tmp_path / "target", kinds[0], "old")
    make(tmp_path / "fresh", kinds[1], "new")
    publish(tmp_path / "fresh", tmp_path / "target")
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target").is_dir() == (kinds[1] == "folder")


def test_killed_between_two_renames_the_old_one_comes_back(tmp_path):
    old = tmp_path / ".last.ckpt.old-0123abcd"
    old.write_text("state")
    (tmp_path / ".last.ckpt.new-0123abcd").write_text("incomplete")
    target = tmp_path / "last.ckpt"
    assert is_there(target)
    remove_leftovers(target)
    assert names(tmp_path) == ["last.ckpt"]
    assert target.read_text() == "state"
    assert not is_there(tmp_path / "best.ckpt")


def test_a_full_disk_is_named_after_the_target(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "out"):
        raise full
    assert caught.value.filename == str(tmp_path / "out")
    other = OSError(errno.EIO, os.strerror(errno.EIO))  # of what is read, perhaps
    with pytest.raises(OSError, match="error") as caught, writing(tmp_path / "out"):
        raise other
    assert caught.value.filename is None
