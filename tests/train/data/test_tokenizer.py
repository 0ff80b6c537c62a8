import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moezoo.errors import InputError
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from moezoo_train.data import train_tokenizer as training
from moezoo_train.data.train_tokenizer import EOS_PIECE, sample_chunks, split_text, train_tokenizer

TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\ttab\r\nreturn\r",
    "a\0b\0",
    "é ß 漢字 😀 👩\u200d👩\u200d👧 \U0010ffff",
    "▁ ▁▁x▁",
    "▅ \u2028 \ufeff \x7f\x80",
    "<unk><s></s><|endoftext|><0x41>",
    "def f(x):\n    return [x for _ in range(3)]\n",
]


@pytest.fixture(scope="module")
def documents():
    """A little Python: the modules of the standard library with the shortest names."""
    files = sorted(open_corpus("stdlib").files, key=lambda file: (len(file.name), str(file)))
    return [file.read_text() for file in files[:40]]


@pytest.fixture(scope="module")
def directory(documents, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, directory, vocab_size=600)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer of the kind of GPT-2, Llama 3 and Qwen, which puts a token before every text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 10, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    directory = tmp_path_factory.mktemp("byte-level")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bare(directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    bare = load_tokenizer(folder)
    assert isinstance(bare, SentencePieceTokenizer)
    return bare


class TestTraining:
    @pytest.mark.parametrize("text", TRICKY)
    def test_tricky_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @settings(deadline=None, max_examples=300)
    @given(st.text())
    def test_any_text_comes_back(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids

    def test_vocabulary(self, tokenizer):
        assert tokenizer.vocab_size == 600
        assert tokenizer.bos_id is None
        assert tokenizer.decode([tokenizer.eos_id]) == ""
        pieces = [tokenizer.decode([i]) for i in range(600)]
        assert any("\n" in piece.strip(" ") and len(piece) > 1 for piece in pieces)
        assert any(set(piece) == {" "} and len(piece) >= 4 for piece in pieces)
        assert EOS_PIECE not in pieces

    def test_compresses(self, tokenizer, documents):
        text = documents[0]
        assert len(tokenizer.encode(text)) < 0.6 * len(text)

    def test_batch_is_the_same_as_one_by_one(self, tokenizer, documents):
        texts = [*TRICKY, *documents]
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before

    @pytest.mark.slow
    def test_same_documents_give_the_same_files_in_another_process(
        self, directory, documents, tmp_path
    ):
        (tmp_path / "documents.json").write_text(json.dumps(documents))
        script = (
            "import json, sys; from pathlib import Path\n"
            "from moezoo_train.data.train_tokenizer import train_tokenizer\n"
            "documents = json.loads(Path(sys.argv[1], 'documents.json').read_text())\n"
            "train_tokenizer(documents, Path(sys.argv[1], 'again'), vocab_size=600)\n"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": "17",
        }
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (result.stdout, result.stderr) == ("", "")
        names = sorted(os.listdir(directory))
        assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
        for name in names:
            assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()

    def test_is_quiet(self, documents, tmp_path, capfd):
        train_tokenizer(documents[:20], tmp_path, vocab_size=400)
        assert capfd.readouterr() == ("", "")

    def test_spelling_of_special_pieces_is_not_learned(self, tmp_path):
        text = " ".join(f"{i}<unk><0x41>{EOS_PIECE} ▁▁▅\0" for i in range(200))
        tokenizer = train_tokenizer([text], tmp_path, vocab_size=290)
        for piece in ("<unk>", "<0x41>", EOS_PIECE, "▁", "▅", "\0", text):
            assert tokenizer.decode(tokenizer.encode(piece)) == piece
        assert len(tokenizer.encode(EOS_PIECE)) > 1

    @pytest.mark.parametrize(
        ("text", "vocab_size", "reason"),
        [
            ("too little text", 2048, r"vocab_size: the text yields only \d+ tokens, not 2048"),
            ("".join(map(chr, range(0x4E00, 0x5400))), 400, r"vocab_size: 400 is too small for"),
            ("text", 100, r"vocab_size: 100 is out of range"),
            ("", 2048, r"source: it holds no text"),
        ],
    )
    def test_vocabulary_that_does_not_fit(self, tmp_path, text, vocab_size, reason):
        with pytest.raises(InputError, match=reason) as error:
            train_tokenizer([text], tmp_path / "new", vocab_size)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()


class TestOtherPrograms:
    def test_transformers_gives_the_same_ids(self, directory, tokenizer, documents):
        theirs = AutoTokenizer.from_pretrained(directory)
        assert len(theirs) == tokenizer.vocab_size
        assert theirs.eos_token_id == tokenizer.eos_id
        for text in [*TRICKY, *documents]:
            ids = theirs(text).input_ids
            assert ids == tokenizer.encode(text)
            assert theirs.decode(ids) == text

    def test_sentencepiece_gives_the_same_ids(self, directory, tokenizer, documents):
        processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        pieces = [tokenizer.decode([i]) for i in range(258, 600)]
        chance = random.Random(0)
        nonsense = ["".join(chance.choices(pieces, k=300)) for _ in range(500)]
        runs = ["".join(chance.choices("ab \n_-=", k=300)) for _ in range(500)]
        modules = [
            file.read_bytes().decode().replace("▁", "") for file in open_corpus("stdlib").files[:60]
        ]
        texts = [*nonsense, *runs, *modules, *(text for text in TRICKY if "▁" not in text)]
        assert tokenizer.encode_batch(texts) == processor.encode(texts)

    @settings(deadline=None, max_examples=300)
    @given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
    def test_sentencepiece_gives_the_same_ids_for_any_text(self, bare, tokenizer, text):
        ids = bare.encode(text)
        assert ids == tokenizer.encode(text)
        assert bare.decode(ids) == text

    def test_bare_sentencepiece_model(self, bare, tokenizer, documents, tmp_path):
        assert (bare.vocab_size, bare.bos_id, bare.eos_id) == (600, None, tokenizer.eos_id)
        assert bare.encode_batch(documents) == tokenizer.encode_batch(documents)
        bare.save(tmp_path / "copy")
        copy = load_tokenizer(tmp_path / "copy")
        assert copy.fingerprint() == bare.fingerprint() != tokenizer.fingerprint()


class TestLoading:
    def test_byte_level_tokenizer(self, byte_level, documents):
        tokenizer = load_tokenizer(byte_level)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 290)
        texts = [*TRICKY, "<bos>forged<eos>", *documents]
        for text in texts:
            ids = tokenizer.encode(text)
            assert not {0, 1} & set(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert tokenizer.decode([0, *tokenizer.encode("the fox"), 1]) == "the fox"

    def test_saved_tokenizer_is_equal(self, directory, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "copy")
        tokenizer.save(tmp_path / "copy")
        for name in os.listdir(directory):
            assert (tmp_path / "copy" / name).read_bytes() == (directory / name).read_bytes()
        assert sorted(os.listdir(tmp_path / "copy")) == sorted(os.listdir(directory))
        assert load_tokenizer(tmp_path / "copy").fingerprint() == tokenizer.fingerprint()

    def test_fingerprint_follows_the_definition(self, tokenizer, documents, tmp_path):
        other = train_tokenizer(documents, tmp_path, vocab_size=601)
        assert other.fingerprint() != tokenizer.fingerprint()

    def test_beside_a_model_of_an_unknown_kind(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "never heard of"}))
        assert load_tokenizer(tmp_path).encode("self.x") == tokenizer.encode("self.x")

    def test_slow_tokenizer(self, tokenizer):
        class Letters:
            """The part of a tokenizer written in Python that is used."""

            bos_token_id, eos_token_id = None, 26

            def get_vocab(self):
                return {**{chr(97 + i): i for i in range(26)}, "<eos>": 26}

            def encode(self, text, add_special_tokens, split_special_tokens):
                assert not add_special_tokens
                assert split_special_tokens
                return [ord(letter) - 97 for letter in text]

            def decode(self, ids, **options):
                return "".join(chr(97 + i) for i in ids if i < 26)

        letters = HuggingFaceTokenizer(Letters())
        assert letters.encode_batch(["abc", "z"]) == [[0, 1, 2], [25]]
        assert letters.decode([7, 8, 26]) == "hi"
        assert letters.vocab_size == 27
        assert letters.fingerprint() != tokenizer.fingerprint()

    def test_nothing_there(self, tmp_path):
        for path, reason in (
            (tmp_path / "missing", "is not a directory"),
            (tmp_path, "holds neither tokenizer.json nor tokenizer.model"),
        ):
            with pytest.raises(InputError, match="tokenizer") as error:
                load_tokenizer(path)
            assert reason in str(error.value)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
    def test_truncated_file(self, directory, tmp_path, name):
        data = (directory / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="tokenizer") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)

    def test_no_end_of_text(self, byte_level, tmp_path):
        plain = AutoTokenizer.from_pretrained(byte_level)
        plain.eos_token = None
        plain.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="no end-of-text token"):
            load_tokenizer(tmp_path)

    def test_hub_name(self, tokenizer, monkeypatch):
        asked = []

        def from_pretrained(name, local_files_only, trust_remote_code):
            asked.append((name, local_files_only, trust_remote_code))
            if name == "someone/else":
                raise OSError("not on the Hub\nand more")
            return tokenizer.hf

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        assert load_tokenizer("hf:someone/model").vocab_size == 600
        assert asked == [("someone/model", False, False)]
        with pytest.raises(InputError, match=r"someone/else cannot be loaded: not on the Hub$"):
            load_tokenizer("hf:someone/else")


class TestSample:
    def test_is_spread_over_the_corpus(self):
        stream = [f"{i:05d} " * 300 for i in range(1000)]
        sample = sample_chunks(stream, 180_000)
        assert sample == sample_chunks(stream, 180_000)
        assert 180_000 <= sum(map(len, sample)) < 182_000
        places = [int(chunk[:5]) for chunk in sample]
        assert places == sorted(places)
        assert (
            min(sum(start <= p < start + 250 for p in places) for start in (0, 250, 500, 750)) > 10
        )

    def test_is_everything_if_there_is_little(self):
        stream = ["one\n" * 1500, "two", "x" * 5000]
        assert "".join(sample_chunks(stream, 1_000_000)) == "".join(stream)

    def test_scan_is_bounded(self, monkeypatch):
        monkeypatch.setattr(training, "SCAN_BYTES", 10_000)

        def endless():
            while True:
                yield "some words " * 100

        assert 0 < len(sample_chunks(endless(), 5_000)) < 20

    @given(st.text(st.sampled_from("ab\n")), st.integers(1, 9))
    def test_split_text(self, text, characters):
        pieces = list(split_text(text, characters))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= characters for piece in pieces)
        for piece in pieces[:-1]:
            assert piece.endswith("\n") or (len(piece) == characters and "\n" not in piece)
