"""However a preparation ends, the next one ends in the same bytes."""

import os
import signal

import pytest

from moezoo.errors import InputError
from moezoo_train.data import prepare as module
from moezoo_train.data.prepare import prepare


class Crash(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def crash_behind_the_shards(source, output, monkeypatch, **options):
    def crash(*args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(module._Preparation, "_assemble", crash)
        with pytest.raises(Crash):
            prepare(source, output, **options)


class TestInterruption:
    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, corpus, tmp_path_factory, contents):
        output = tmp_path_factory.mktemp("whole")
        prepare(str(corpus), output, vocab_size=300)
        return contents(output)

    @pytest.mark.usefixtures("small_shards")
    def test_interrupted_anywhere_it_ends_in_the_same_bytes(
        self, corpus, tmp_path, whole, monkeypatch, contents
    ):
        replace, calls = os.replace, 0

        def crash_later(source, target):
            nonlocal calls
            if calls == at:
                raise Crash
            calls += 1
            replace(source, target)

        at, crashes = 0, 0
        while True:
            output = tmp_path / str(at)
            calls = 0
            monkeypatch.setattr(os, "replace", crash_later)
            try:
                prepare(str(corpus), output, vocab_size=300)
            except Crash:
                crashes += 1
            else:
                break
            monkeypatch.setattr(os, "replace", replace)
            assert not (output / "meta.json").exists()
            prepare(str(corpus), output, vocab_size=300)
            assert contents(output) == whole
            at += 1
        assert crashes >= 10

    @pytest.mark.usefixtures("small_shards")
    def test_finished_shards_are_kept(self, corpus, tmp_path, whole, monkeypatch, capfd, contents):
        written = []
        write = module.Shard.write

        def crash_at_third(shard, encoded, described):
            if len(written) == 2:
                raise Crash
            written.append(described)
            write(shard, encoded, described)

        with monkeypatch.context() as patch:
            patch.setattr(module.Shard, "write", crash_at_third)
            with pytest.raises(Crash):
                prepare(str(corpus), tmp_path, vocab_size=300)
        rest = []
        monkeypatch.setattr(
            module.Shard,
            "write",
            lambda shard, encoded, described: (
                rest.append(described) or write(shard, encoded, described)
            ),
        )
        monkeypatch.setattr(module, "train_tokenizer", None)
        prepare(str(corpus), tmp_path, vocab_size=300)
        assert contents(tmp_path) == whole
        kept = sum(map(len, written))
        assert f"going on behind document {kept}" in capfd.readouterr().err
        assert kept + sum(map(len, rest)) == 40

    @pytest.mark.usefixtures("small_shards")
    def test_unfinished_work_of_other_inputs_is_dropped(
        self, corpus, tmp_path, whole, monkeypatch, contents
    ):
        crash_behind_the_shards(str(corpus), tmp_path, monkeypatch, vocab_size=301)
        assert (tmp_path / "partial").exists()
        prepare(str(corpus), tmp_path, vocab_size=300)
        assert contents(tmp_path) == whole

    @pytest.mark.usefixtures("small_shards")
    def test_truncated_shard_is_made_again(self, corpus, tmp_path, whole, monkeypatch, contents):
        crash_behind_the_shards(str(corpus), tmp_path, monkeypatch, vocab_size=300)
        os.truncate(tmp_path / "partial/shard-000001.bin", 100)
        prepare(str(corpus), tmp_path, vocab_size=300)
        assert contents(tmp_path) == whole

    @pytest.mark.slow
    def test_kill_9(self, server, corpus, tmp_path, whole, contents):
        script = (
            "import os, signal, sys\n"
            "from moezoo_train.data import prepare as module\n"
            "module.SHARD_BYTES = 10_000\n"
            "write = module.Shard.write\n"
            "def dying_write(self, encoded, described):\n"
            "    if self._token_file.name == 'shard-000002.bin':\n"
            "        self._token_file.write_bytes(b'half a sh')\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    write(self, encoded, described)\n"
            "module.Shard.write = dying_write\n"
            "module.prepare(sys.argv[1], sys.argv[2], vocab_size=300)\n"
        )
        ended = server.run(corpus, tmp_path, folder=tmp_path, code=script)
        assert ended.code == -signal.SIGKILL, ended.output
        assert (tmp_path / "partial/shard-000001.index").exists()
        prepare(str(corpus), tmp_path, vocab_size=300)
        assert contents(tmp_path) == whole

    def test_source_that_changes_meanwhile(
        self, tmp_path, own_tokenizer, monkeypatch, contents, write_corpus
    ):
        folder = write_corpus(tmp_path / "in", count=5)
        write = module.Shard.write

        def edit_and_write(shard, encoded, described):
            (folder / "000.txt").write_text("changed")
            write(shard, encoded, described)

        monkeypatch.setattr(module.Shard, "write", edit_and_write)
        with pytest.raises(InputError, match="changed while it was being read"):
            prepare(str(folder), tmp_path / "out", tokenizer=own_tokenizer)
        assert contents(tmp_path / "out") == {}
