"""Any number of threads gives the same bytes, and whatever happens, none is left."""

import json
import os
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moezoo.errors import InputError
from moezoo_models.text import encoding
from moezoo_models.text.rayon import without_rayon
from moezoo_models.text.tokenizer import HuggingFaceTokenizer, load_tokenizer
from moezoo_train.data import encoders as module
from moezoo_train.data import prepare as preparing
from moezoo_train.data.encoders import Encoders, EncodingError
from moezoo_train.data.prepare import prepare

INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from moezoo.__main__ import main

def interrupt():
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
code = main(sys.argv[2:])
assert [each for each in threading.enumerate() if not each.daemon] == [threading.main_thread()]
sys.exit(code)
"""


def threads_left():
    return [each.name for each in threading.enumerate() if each.name.startswith("encode")]


@pytest.fixture(params=["own", "sentencepiece", "words"])
def directory(request, own_tokenizer, tmp_path):
    """Directories of tokenizers: both kinds of library, with and without an opening token."""
    place = tmp_path / "tokenizer"
    place.mkdir()
    if request.param == "sentencepiece":
        content = (load_tokenizer(own_tokenizer).sentencepiece_model, "tokenizer.model")
        (place / content[1]).write_bytes(content[0])
    elif request.param == "words":
        words(place, unknown="[unk]")
    else:
        return own_tokenizer
    return str(place)


def words(directory, unknown=None):
    """Write a tokenizer that knows ten words; without ``unknown`` it refuses others."""
    known = ["[unk]", "[bos]", "[eos]", "if", "else", "return", "yield", "token", "sum", "gate"]
    backend = Backend(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=unknown or "absent")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[bos]", eos_token="[eos]", unk_token=unknown
    )
    HuggingFaceTokenizer(hf).save(directory)


def plainly(tokenizer, texts):
    """Return what all documents come to, one after the other on this thread."""
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [[*opening, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]


class TestSameBytes:
    @pytest.mark.usefixtures("small_shards")
    @pytest.mark.parametrize("task", [1, 700, 1 << 16])
    def test_of_any_number_of_threads(
        self, corpus, directory, tmp_path, monkeypatch, contents, task
    ):
        monkeypatch.setattr(module, "_TASK_CHARACTERS", task)
        # So that documents are cut, and their pieces fall to different threads.
        monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 600)
        results = []
        for workers in (1, 2, 5):
            output = tmp_path / str(workers)
            prepared = prepare(str(corpus), output, tokenizer=directory, workers=workers)
            results.append(contents(output))
        assert results[0] == results[1] == results[2]
        tokenizer = load_tokenizer(directory)
        monkeypatch.undo()
        files = sorted(corpus.iterdir())
        expected = plainly(tokenizer, [file.read_text() for file in files])
        found = []
        for name in ("train", "val"):
            tokens = prepared.tokens(name)
            ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
            found += [part.tolist() for part in np.split(tokens, ends)[:-1]]
        assert sorted(found) == sorted(expected)
        assert prepared.train.tokens + prepared.val.tokens == sum(map(len, expected))

    def test_a_run_goes_on_with_other_threads(
        self, corpus, own_tokenizer, tmp_path, monkeypatch, contents, small_shards
    ):
        whole = prepare(str(corpus), tmp_path / "whole", tokenizer=own_tokenizer, workers=1)
        write = preparing.Shard.write

        def interrupted(shard, encoded, described):
            if shard._index_file.name == "shard-000002.index":
                raise KeyboardInterrupt
            write(shard, encoded, described)

        with monkeypatch.context() as patch:
            patch.setattr(preparing.Shard, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer, workers=3)
        assert threads_left() == []
        assert (tmp_path / "out/partial/shard-000001.index").is_file()
        prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer, workers=2)
        assert contents(tmp_path / "out") == contents(whole.directory)


class TestThreads:
    def test_two_encode_at_once(self, own_tokenizer):
        """Each waits for the other: one alone would wait for ever."""
        tokenizer = load_tokenizer(own_tokenizer)
        both = threading.Barrier(2, timeout=60)

        def encode_here(texts):
            both.wait()
            return [tokenizer.encode(text) for text in texts]

        tokenizer.encode_here = encode_here
        size = module._TASK_CHARACTERS
        texts = [("if " * size)[:size], ("else " * size)[:size]]
        with Encoders(tokenizer, 2) as encoders:
            ((_, encoded),) = encoders.run([texts], 0)
        tokens = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
        assert [tokenizer.decode(ids.tolist()[:-1]) for ids in tokens] == texts

    def test_first_documents_are_encoded_while_others_are_read(self, own_tokenizer):
        tokenizer = load_tokenizer(own_tokenizer)
        encode_here, encoded = tokenizer.encode_here, threading.Event()

        def encode(texts):
            encoded.set()
            return encode_here(texts)

        def documents():
            yield "if " * module._TASK_CHARACTERS
            assert encoded.wait(60)
            yield "else"

        tokenizer.encode_here = encode
        with Encoders(tokenizer, 2) as encoders:
            ((_, found),) = encoders.run([documents()], 2)
        assert len(found.lengths) == 2

    def test_little_is_read_ahead(self, own_tokenizer):
        read = []

        def batches():
            for number in range(10):
                read.append(number)
                yield [f"token {number}"]

        with Encoders(load_tokenizer(own_tokenizer), 2) as encoders:
            for number, (batch, _) in enumerate(encoders.run(batches(), 3)):
                assert batch == [f"token {number}"]
                assert len(read) <= number + 4
        assert len(read) == 10

    def test_cores_that_may_be_used_are(self, corpus, own_tokenizer, tmp_path, monkeypatch):
        asked = []

        class Watched(Encoders):
            def __init__(self, tokenizer, workers):
                asked.append(workers)
                super().__init__(tokenizer, workers)

        monkeypatch.setattr(preparing, "Encoders", Watched)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 6}, raising=False)
        prepare(str(corpus), tmp_path / "a", tokenizer=own_tokenizer)
        prepare(str(corpus), tmp_path / "b", tokenizer=own_tokenizer, workers=2)
        assert asked == [3, 2]

    def test_one_for_a_tokenizer_written_in_python(self, own_tokenizer):
        slow = load_tokenizer(own_tokenizer)
        slow.threads = False
        assert Encoders(slow, 4)._workers == 1
        assert Encoders(load_tokenizer(own_tokenizer), 4)._workers == 4

    def test_environment_is_as_it_was(self, own_tokenizer, monkeypatch):
        for before in ("true", None):
            if before is None:
                monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
            else:
                monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
            with without_rayon():
                with Encoders(load_tokenizer(own_tokenizer), 2) as encoders:
                    list(encoders.run([["if"] * 50] * 3, 1))
                assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
            assert os.environ.get("TOKENIZERS_PARALLELISM") == before

    @pytest.mark.parametrize("workers", [0, -1, 1025, True, 1.5, "2"])
    def test_number_is_checked_first(self, corpus, own_tokenizer, tmp_path, workers):
        with pytest.raises(InputError, match=r"workers: .*a whole number ≥ 1 and ≤ 1024"):
            prepare(str(corpus), tmp_path / "out", tokenizer=own_tokenizer, workers=workers)
        assert not (tmp_path / "out").exists()


class TestErrors:
    def test_name_the_file(self, tmp_path, contents, small_shards):
        tokenizer, folder = tmp_path / "tokenizer", tmp_path / "texts"
        tokenizer.mkdir()
        words(tokenizer)
        folder.mkdir()
        for number in range(30):
            (folder / f"{number:02d}.txt").write_text("if else " * 200 + "return " * number)
        (folder / "21.txt").write_text("if lambda")
        (folder / "22.txt").write_text("no no no")
        with pytest.raises(InputError) as caught:
            prepare(str(folder), tmp_path / "out", tokenizer=str(tokenizer), workers=3)
        message = str(caught.value)
        assert message.startswith(f"tokenizer: it cannot encode {folder / '21.txt'}: ")
        assert message.endswith("; leave that text out, or give another tokenizer")
        assert "unk" in message.lower()
        assert "\n" not in message
        assert threads_left() == []
        assert contents(tmp_path / "out") == {}

    def test_name_the_row(self, tmp_path, small_shards):
        tokenizer, file = tmp_path / "tokenizer", tmp_path / "rows.jsonl"
        tokenizer.mkdir()
        words(tokenizer)
        rows = [{"text": f"{'gate ' * 300}{'sum ' * (n % 7)}"} for n in range(40)]
        rows[3]["text"] = ""  # left out: it is no document
        rows[33]["text"] = "a word that is not known"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=rf"cannot encode document 33 of {file}: "):
            prepare(str(file), tmp_path / "out", tokenizer=str(tokenizer))

    def test_what_is_no_exception(self, own_tokenizer):
        """As the tokenizers library raises it where it stumbles."""

        class PanicException(BaseException):
            pass

        tokenizer = load_tokenizer(own_tokenizer)
        encode_here = tokenizer.encode_here

        def stumble(texts):
            if "bad" in texts:
                raise PanicException("index out of bounds\nand more")
            return encode_here(texts)

        tokenizer.encode_here = stumble
        with (
            pytest.raises(EncodingError, match="index out of bounds") as caught,
            Encoders(tokenizer, 2) as encoders,
        ):
            list(encoders.run([["if", "else"], ["gate", "bad"]], 2))
        assert (caught.value.document, caught.value.reason) == (3, "index out of bounds")
        assert threads_left() == []

    @pytest.mark.slow
    def test_interrupted_command_ends_at_once(self, server, tmp_path, own_tokenizer):
        rows = (json.dumps({"text": f"token {n} expert router gate\n" * 400}) for n in range(4000))
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        first = tmp_path / "out/partial/shard-000000.index"
        words = ["prepare", "--workers=2", f"--source={tmp_path / 'rows.jsonl'}"]
        words += [f"--output={tmp_path / 'out'}", f"--tokenizer={own_tokenizer}"]
        ended = server.run(first, *words, folder=tmp_path, code=INTERRUPTED, limit=60.0)
        assert ended.code == 130, ended.output
        assert "Traceback" not in ended.output
        assert "goes on behind what is tokenized" in ended.output
        assert not (tmp_path / "out/meta.json").exists()
