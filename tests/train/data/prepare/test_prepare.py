import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import InputError
from moezoo_models.text import encoding
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
from moezoo_train.data import prepare as module
from moezoo_train.data.encoders import Encoders
from moezoo_train.data.prepare import prepare, split_threshold
from moezoo_train.data.prepared import PreparedData, token_dtype
from moezoo_train.data.train_tokenizer import train_tokenizer

FILES = ["meta.json", "train.bin", "val.bin"]


class Bytes(Tokenizer):
    """A token is a byte."""

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode()

    def save(self, directory):
        raise NotImplementedError

    def fingerprint(self):
        raise NotImplementedError


def encode(tokenizer, texts):
    """Return the ids of each text, as they are prepared."""
    with Encoders(tokenizer, 2) as encoders:
        ((batch, encoded),) = encoders.run([texts], 2)
    assert batch == texts
    return [ids.tolist() for ids in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])]


def split_documents(prepared, name):
    """Return the documents of a split as text."""
    tokenizer = load_tokenizer(prepared.tokenizer_directory)
    tokens = prepared.tokens(name)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(piece[:-1].tolist()) for piece in np.split(tokens, ends + 1)[:-1]]


class TestContent:
    def test_documents_come_back_whole_and_on_one_side(
        self, corpus, tmp_path, small_shards, contents
    ):
        prepared = prepare(str(corpus), tmp_path, vocab_size=300, val_fraction=0.2)
        texts = [file.read_text() for file in sorted(corpus.iterdir())]
        train, val = (split_documents(prepared, name) for name in ("train", "val"))
        assert len(val) == 8
        assert sorted(train + val) == sorted(texts)
        assert train == [text for text in texts if text in set(train)]
        for name, split in (("train", train), ("val", val)):
            size = prepared.split(name)
            assert size.documents == len(split)
            assert size.bytes == sum(len(text.encode()) for text in split)
            assert size.tokens == len(prepared.tokens(name))
        assert prepared.bytes_per_token == prepared.val.bytes / prepared.val.tokens
        assert prepared.vocab_size == load_tokenizer(tmp_path / "tokenizer").vocab_size == 300
        assert prepared.dtype == np.uint16
        assert PreparedData.load(tmp_path) == prepared
        names = {*FILES, *(f"tokenizer/{n}" for n in os.listdir(tmp_path / "tokenizer"))}
        assert set(contents(tmp_path)) == names

    def test_tokens_do_not_depend_on_shards(self, corpus, tmp_path, monkeypatch, contents):
        results = []
        for size in (1, 5_000, 10_000_000):
            monkeypatch.setattr(module, "SHARD_BYTES", size)
            prepare(str(corpus), tmp_path / str(size), vocab_size=300)
            results.append(contents(tmp_path / str(size)))
        assert results[0] == results[1] == results[2]

    def test_long_documents_are_cut_for_encoding_only(
        self, tmp_path, own_tokenizer, monkeypatch, write_corpus
    ):
        monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 100)
        folder = write_corpus(tmp_path / "in", count=5)
        (folder / "one line.txt").write_text("no end " * 500)
        prepared = prepare(str(folder), tmp_path / "out", tokenizer=own_tokenizer)
        found = split_documents(prepared, "train") + split_documents(prepared, "val")
        assert sorted(found) == sorted(file.read_text() for file in folder.iterdir())

    def test_given_tokenizer(self, corpus, tmp_path, own_tokenizer):
        prepared = prepare(str(corpus), tmp_path, vocab_size=7, tokenizer=own_tokenizer)
        assert prepared.vocab_size == 300
        for name in os.listdir(own_tokenizer):
            saved = (prepared.tokenizer_directory / name).read_bytes()
            assert saved == Path(own_tokenizer, name).read_bytes()

    @pytest.mark.parametrize("beside", [None, "config.json", "folder"])
    def test_given_tokenizer_is_loaded_again_unless_its_folder_holds_the_same(
        self, corpus, tmp_path, own_tokenizer, monkeypatch, beside
    ):
        given, loaded = tmp_path / "given", []
        shutil.copytree(own_tokenizer, given)
        if beside == "folder":
            (given / beside).mkdir()
        elif beside is not None:
            (given / beside).write_text("{}")

        def load(place):
            loaded.append(str(place))
            return load_tokenizer(place)

        monkeypatch.setattr(module, "load_tokenizer", load)
        prepare(str(corpus), tmp_path / "out", tokenizer=str(given))
        again = [str(tmp_path / "out/partial/tokenizer")]
        assert loaded == [str(given), *(again if beside else [])]

    def test_beginning_of_text_token(self, tmp_path):
        class Letters(Bytes):
            """Adds nothing by itself, but has tokens for both ends of a document."""

            vocab_size, bos_id, eos_id = 128, 1, 2

        letters = Letters()
        assert encode(letters, ["ab", "c"]) == [[1, 97, 98, 2], [1, 99, 2]]
        letters.bos_id = letters.eos_id
        assert encode(letters, ["ab"]) == [[97, 98, 2]]
        with pytest.raises(InputError, match="token id 195, outside its vocabulary of 128"):
            encode(letters, ["é"])

    def test_tokenizer_that_begins_every_text_with_a_space_gets_whole_documents(self):
        class Prefixing(Bytes):
            vocab_size, bos_id, eos_id = 256, None, 0

            def encode(self, text):
                return list(b" " + text.encode())

            def decode(self, ids):
                return bytes(ids).decode().removeprefix(" ")

        text = "x\n" * encoding.PIECE_CHARACTERS
        (ids,) = encode(Prefixing(), [text])
        assert bytes(ids[:-1]).decode() == " " + text

    def test_token_type(self):
        assert token_dtype(1 << 16) == np.uint16
        assert token_dtype((1 << 16) + 1) == np.uint32

    def test_max_bytes(self, corpus, tmp_path, own_tokenizer):
        prepared = prepare(
            str(corpus), tmp_path, tokenizer=own_tokenizer, max_bytes=20_000, val_fraction=0.1
        )
        total = prepared.train.bytes + prepared.val.bytes
        assert 20_000 <= total < 25_000
        first = [file.read_text() for file in sorted(corpus.iterdir())]
        used = prepared.train.documents + prepared.val.documents
        found = split_documents(prepared, "train") + split_documents(prepared, "val")
        assert sorted(found) == sorted(first[:used])


class TestSplit:
    @given(
        st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=200, unique=True),
        st.floats(0, 0.5),
    )
    def test_takes_a_fraction_and_leaves_some(self, keys, fraction):
        keys = np.array(keys, dtype=np.uint64)
        held_out = int((keys <= split_threshold(keys, fraction)).sum())
        assert held_out == max(1, round(fraction * len(keys)))
        assert held_out < len(keys)

    def test_equal_documents_stay_together(self, tmp_path, own_tokenizer):
        rows = [f"document {i % 10}" for i in range(100)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        prepared = prepare(
            str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=own_tokenizer, val_fraction=0.25
        )
        train, val = (split_documents(prepared, name) for name in ("train", "val"))
        assert len(val) == 30
        assert set(train).isdisjoint(val)

    def test_follows_from_content_and_seed(self, corpus, tmp_path, own_tokenizer):
        def held_out(source, seed, name):
            output = tmp_path / name
            prepared = prepare(
                str(source), output, tokenizer=own_tokenizer, seed=seed, val_fraction=0.2
            )
            return set(split_documents(prepared, "val"))

        renamed = tmp_path / "renamed"
        shutil.copytree(corpus, renamed)
        for file in list(renamed.iterdir()):
            file.rename(file.with_name(f"{999 - int(file.stem)}.txt"))
        one = held_out(corpus, 0, "one")
        assert held_out(renamed, 0, "two") == one
        assert held_out(corpus, 1, "three") != one

    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.25, 0.99])
    def test_of_one_document_the_end_is_held_out(self, fraction, tmp_path, own_tokenizer, capfd):
        text = "".join(f"{n} über 漢字 router\n" for n in range(500))
        (tmp_path / "a.txt").write_text(text)
        prepared = prepare(
            str(tmp_path / "a.txt"),
            tmp_path / "out",
            tokenizer=own_tokenizer,
            val_fraction=fraction,
        )
        (head,), (tail,) = (split_documents(prepared, name) for name in ("train", "val"))
        assert head + tail == text
        assert head.endswith("\n") == (fraction > 0.001)  # else a line is more than twice that
        assert len(tail) == pytest.approx(max(1, fraction * len(text)), abs=25)
        assert (prepared.train.bytes, prepared.val.bytes) == (
            len(head.encode()),
            len(tail.encode()),
        )
        assert (prepared.train.documents, prepared.val.documents) == (1, 1)
        prepared.check_sums()
        size = f"{len(tail.encode()):,} bytes"
        assert f"the end of {tmp_path / 'a.txt'}, {size}" in capfd.readouterr().err

    def test_of_few_large_documents_the_end_of_one_is_held_out(self, tmp_path, own_tokenizer):
        """Whole it would be a third or two of the text, and equal ones have the same end."""
        rows = [f"row {n}\n" * 200 for n in (0, 1, 2, 0, 1, 2)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

        def prepared(fraction):
            output = tmp_path / str(fraction)
            source = str(tmp_path / "a.jsonl")
            return prepare(source, output, tokenizer=own_tokenizer, val_fraction=fraction)

        some = prepared(0.05)
        train, val = (split_documents(some, name) for name in ("train", "val"))
        assert len(train) == 6
        assert val[0] == val[1]
        assert sorted([*train[:4], *(head + val[0] for head in train[4:])]) == sorted(rows)
        assert some.val.bytes == sum(len(each) for each in val)
        assert some.val.bytes / (some.train.bytes + some.val.bytes) == pytest.approx(0.05, abs=0.01)
        assert some.train.tokens == len(some.tokens("train"))
        some.check_sums()
        whole = prepared(0.25)  # a third is not far from that
        assert set(split_documents(whole, "val")) < set(rows)
        assert whole.train.bytes == 2 * whole.val.bytes

    def test_one_of_many_small_documents_stays_whole(self, corpus, tmp_path, own_tokenizer):
        prepared = prepare(str(corpus), tmp_path, tokenizer=own_tokenizer, val_fraction=0.001)
        (document,) = split_documents(prepared, "val")
        assert document in {file.read_text() for file in corpus.iterdir()}

    def test_too_few_documents(self, tmp_path, own_tokenizer, contents, write_corpus):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(InputError, match=r"source: .* two characters of text; .* give more"):
            prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer=own_tokenizer)
        assert contents(tmp_path / "out") == {}
        folder = write_corpus(tmp_path / "in", count=3)
        with pytest.raises(InputError, match=r"val_fraction: 0\.99 of 3 documents"):
            prepare(str(folder), tmp_path / "out", tokenizer=own_tokenizer, val_fraction=0.99)


class TestReuse:
    def test_unchanged_data_are_used_again(self, corpus, tmp_path, capfd, monkeypatch, contents):
        first = prepare(str(corpus), tmp_path, vocab_size=300)
        before = contents(tmp_path)
        assert "nothing has changed" not in capfd.readouterr().err

        def never(*args, **options):
            raise AssertionError("tokenized again")

        monkeypatch.setattr(module, "Encoders", never)
        monkeypatch.setattr(module, "train_tokenizer", never)
        assert prepare(str(corpus), tmp_path, vocab_size=300) == first
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("prepare: nothing has changed; using")
        assert err.count("\n") == 1
        assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        ("changed", "options"),
        [
            ("vocab_size", {"vocab_size": 301}),
            ("seed", {"seed": 1}),
            ("val_fraction", {"val_fraction": 0.3}),
            ("max_bytes", {"max_bytes": 30_000}),
            ("text_field", {"text_field": "body"}),
        ],
    )
    def test_changed_setting(self, corpus, tmp_path, capfd, changed, options, contents):
        prepare(str(corpus), tmp_path / "a", vocab_size=300)
        capfd.readouterr()
        settings = {"vocab_size": 300, **options}
        again = prepare(str(corpus), tmp_path / "a", **settings)
        assert f"again, as this changed: {changed}\n" in capfd.readouterr().err
        prepare(str(corpus), tmp_path / "b", **settings)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        assert again.inputs[changed] == options[changed]

    def test_changed_source_even_with_size_and_time_kept(
        self, tmp_path, own_tokenizer, capfd, write_corpus
    ):
        folder = write_corpus(tmp_path / "in", count=5)
        file = folder / "003.txt"
        prepare(str(folder), tmp_path / "out", tokenizer=own_tokenizer)
        before = file.stat()
        file.write_text(file.read_text().replace("expert", "EXPERT"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
        prepared = prepare(str(folder), tmp_path / "out", tokenizer=own_tokenizer)
        assert "again, as this changed: source\n" in capfd.readouterr().err
        found = split_documents(prepared, "train") + split_documents(prepared, "val")
        assert file.read_text() in found

    def test_changed_tokenizer(self, corpus, tmp_path, own_tokenizer, capfd, contents):
        prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer)
        other = tmp_path / "other"
        train_tokenizer([file.read_text() for file in corpus.glob("00*")], other, 300)
        prepared = prepare(str(corpus), tmp_path / "out", tokenizer=str(other))
        assert "again, as this changed: tokenizer\n" in capfd.readouterr().err
        assert contents(prepared.tokenizer_directory) == contents(other)

    @pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "tokenizer"])
    def test_damaged_data_are_made_again(
        self, corpus, tmp_path, own_tokenizer, damage, capfd, contents
    ):
        prepared = prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)
        whole = contents(tmp_path)
        if damage == "truncate":
            os.truncate(prepared.file("train"), 100)
        elif damage == "remove":
            prepared.file("val").unlink()
        elif damage == "meta":
            (tmp_path / "meta.json").write_text("{")
        else:
            (prepared.tokenizer_directory / "tokenizer.json").write_text("{}")
        with pytest.raises(InputError, match="data_dir"):
            PreparedData.load(tmp_path)
        prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)
        assert "preparing again, as data_dir" in capfd.readouterr().err
        assert contents(tmp_path) == whole

    @pytest.mark.parametrize(
        ("place", "value", "reason"),
        [
            (("vocab_size",), 299, "its checksum is wrong"),
            (("train", "bytes"), 1, "its checksum is wrong"),
            (("vocab_size",), "300", "'300' is of the wrong kind"),
            (("train", "documents"), None, "None is of the wrong kind"),
            (("val", "tokens"), -1, "-1 is no count"),
            (("val", "crc32"), True, "True is no count"),
            (("inputs",), [], r"\[\] is of the wrong kind"),
        ],
    )
    def test_a_changed_description_is_refused(
        self, corpus, tmp_path, own_tokenizer, place, value, reason
    ):
        prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)
        meta = json.loads((tmp_path / "meta.json").read_text())
        owner = meta if len(place) == 1 else meta[place[0]]
        owner[place[-1]] = value
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(InputError, match=rf"meta\.json is broken \(.*{reason}.*\); run"):
            PreparedData.load(tmp_path)

    def test_a_description_without_a_checksum_is_of_an_earlier_version(
        self, corpus, tmp_path, own_tokenizer
    ):
        """Its vocabulary stands in two places, which have to agree."""
        prepared = prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)
        meta = json.loads((tmp_path / "meta.json").read_text())
        del meta["crc32"]
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        assert PreparedData.load(tmp_path) == prepared
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "vocab_size": 299}))
        with pytest.raises(InputError, match="its vocabulary is not that of its inputs"):
            PreparedData.load(tmp_path)

    @pytest.mark.parametrize("name", ["meta.json", "train.bin"])
    def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(
        self, corpus, tmp_path, own_tokenizer, name
    ):
        (tmp_path / "out" / name).mkdir(parents=True)
        with pytest.raises(InputError, match=rf"output: .*{name} is a folder; remove it"):
            prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]

    def test_nothing_prepared(self, tmp_path):
        with pytest.raises(InputError, match="holds no prepared tokens; run `moezoo prepare"):
            PreparedData.load(tmp_path)

    def test_moved_corpus_is_the_same(self, corpus, tmp_path, own_tokenizer, capfd):
        prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer)
        shutil.copytree(corpus, tmp_path / "elsewhere")
        prepare(str(tmp_path / "elsewhere"), tmp_path / "out", tokenizer=own_tokenizer)
        assert "nothing has changed" in capfd.readouterr().err


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [
            {"val_fraction": 1.0},
            {"val_fraction": -0.1},
            {"seed": -1},
            {"max_bytes": 0},
            {"vocab_size": 0},
            {"tokenizer": "missing"},
            {"source": "missing.txt"},
        ],
    )
    def test_leaves_nothing(self, corpus, tmp_path, options):
        with pytest.raises(InputError, match=next(iter(options))) as error:
            prepare(**{"source": str(corpus), "output": tmp_path / "out", **options})
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", ["", "a\0b"])
    def test_empty_or_binary_file(self, tmp_path, text, own_tokenizer, contents):
        (tmp_path / "a.txt").write_text(text)
        for options in ({"tokenizer": own_tokenizer}, {"vocab_size": 300}):
            with pytest.raises(InputError, match="source") as error:
                prepare(str(tmp_path / "a.txt"), tmp_path / "out", **options)
            assert "\n" not in str(error.value)
        assert contents(tmp_path / "out") == {}

    def test_old_data_stay_until_new_ones_are_complete(
        self, corpus, tmp_path, own_tokenizer, contents
    ):
        prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer)
        before = contents(tmp_path / "out")
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(InputError, match="holds no text"):
            prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer=own_tokenizer)
        assert contents(tmp_path / "out") == before

    def test_output_that_cannot_be_made(self, corpus, tmp_path, own_tokenizer):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(InputError, match=r"output: .*file.* cannot be written") as error:
            prepare(str(corpus), tmp_path / "file/out", tokenizer=own_tokenizer)
        assert "\n" not in str(error.value)

    @pytest.mark.usefixtures("small_shards")
    def test_full_disk(self, corpus, tmp_path, own_tokenizer, monkeypatch):
        flush = os.fsync

        def full(descriptor):  # where a disk that allocates late says so
            if "shard-000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(InputError, match=r"output: .*No space left on device") as error:
                prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)
        assert "\n" not in str(error.value)
        assert (tmp_path / "partial/shard-000001.index").exists()
        prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)
        assert not (tmp_path / "partial").exists()

    def test_finished_data_can_be_read_only(self, corpus, tmp_path, own_tokenizer, monkeypatch):
        first = prepare(str(corpus), tmp_path, tokenizer=own_tokenizer)

        def read_only(*args, **options):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("moezoo_models.checkpoints.locks.FileLock", read_only)
        monkeypatch.setattr(Path, "mkdir", read_only)
        assert prepare(str(corpus), tmp_path, tokenizer=own_tokenizer) == first
        with pytest.raises(InputError, match="Read-only file system"):
            prepare(str(corpus), tmp_path, tokenizer=own_tokenizer, seed=1)


def test_standard_library(tmp_path):
    """All of it is found; of the first megabyte the default tokenizer is trained."""
    documents = list(open_corpus("stdlib").documents())
    assert len(documents) > 400
    assert sum(map(len, documents)) > 8_000_000
    prepared = prepare(output=tmp_path, max_bytes=1_000_000)
    assert prepared.train.documents > 20
    assert 1_000_000 <= prepared.train.bytes + prepared.val.bytes < 1_300_000
    assert prepared.val.documents == max(
        1, round(0.02 * (prepared.train.documents + prepared.val.documents))
    )
    assert prepared.bytes_per_token > 2.5
    assert max(int(prepared.tokens(name).max()) for name in ("train", "val")) < 2048
