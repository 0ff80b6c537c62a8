"""Long texts are cut for the tokenizer, and it does not show: the ids are the uncut text's."""

import argparse
import inspect
import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moezoo_models.conversion.calibration import _encode as calibrate
from moezoo_models.generate import prompt_ids
from moezoo_models.text import encoding
from moezoo_models.text.encoding import encode_text, encode_texts
from moezoo_models.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from moezoo_train.data.encoders import Encoders
from moezoo_train.data.prepare import prepare
from moezoo_train.data.train_tokenizer import train_tokenizer

SOURCE = inspect.getsource(argparse)[:12_000]


@pytest.fixture(scope="module")
def prefixing():
    """Sentencepiece as it is by default: a space before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level BPE with GPT-2's rule, by which spaces before a word are apart from the last."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SOURCE], trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    return HuggingFaceTokenizer(hf)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Ours, in whose tokens a newline and what follows it may be one."""
    return train_tokenizer([SOURCE], tmp_path_factory.mktemp("own"), 600)


@pytest.fixture(params=["prefixing", "byte_level", "own"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 300)


def test_ids_of_cut_text_are_those_of_the_whole(tokenizer, short_pieces):
    chance = random.Random(0)
    blanks = "".join(
        chance.choice(["word", " word", " ", "\n", "  \n", "\t", "9", ", "]) for _ in range(5000)
    )
    for text in (SOURCE, blanks, "one line of words without an end " * 100, "é\n" * 2000):
        assert encode_text(tokenizer, text) == tokenizer.encode(text)


def test_long_texts_are_cut_where_it_does_not_show(own, byte_level, prefixing, short_pieces):
    """Else their time would grow, and these tests would compare nothing."""
    for tokenizer in (own, byte_level):
        pieces = list(encoding._pieces(tokenizer, SOURCE))
        assert "".join(pieces) == SOURCE
        assert max(map(len, pieces)) <= 300
        assert len(pieces) > 40
    assert not encoding._is_seamless(prefixing)
    assert encoding._is_seamless(own)
    # What has no place where it does not show is cut all the same.
    assert max(map(len, encoding._pieces(byte_level, "x" * 1000))) == 300


def test_newlines_that_are_parted_show(own, byte_level):
    """What the cut has to avoid is there: a cut behind any newline would change the ids."""
    for tokenizer in (own, byte_level):
        halves = [SOURCE[: i + 1] for i, letter in enumerate(SOURCE[:2000]) if letter == "\n"]
        changed = [
            half
            for half in halves
            if tokenizer.encode(half) + tokenizer.encode(SOURCE[len(half) : 2000])
            != tokenizer.encode(SOURCE[:2000])
        ]
        assert changed


def test_everyone_gets_the_same_ids(tokenizer, short_pieces):
    whole = tokenizer.encode(SOURCE)
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert encode_texts(tokenizer, ["a", SOURCE, ""])[1] == whole
    with Encoders(tokenizer, 2) as encoders:
        ((_, prepared),) = encoders.run([[SOURCE]], 0)
    assert prepared.tokens.tolist() == [*opening, *whole, tokenizer.eos_id]
    assert calibrate(tokenizer, [SOURCE], 1)[0] == [*whole, tokenizer.eos_id]
    assert prompt_ids(tokenizer, SOURCE) == [*opening, *whole]


def test_the_harness_gets_them_too(tokenizer, short_pieces):
    pytest.importorskip("lm_eval")
    from moezoo_models.evaluation.harness import HarnessModel

    answering = object.__new__(HarnessModel)
    answering.words = tokenizer
    assert answering.tok_encode(SOURCE, add_special_tokens=False) == tokenizer.encode(SOURCE)


def test_prepare_writes_these_ids(tokenizer, short_pieces, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(SOURCE)
    (folder / "b.jsonl").write_text(json.dumps({"text": "another document"}) + "\n")
    tokenizer.save(tmp_path / "tokenizer")
    prepared = prepare(str(folder), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    again = load_tokenizer(tmp_path / "tokenizer")
    written = max((prepared.tokens(split) for split in ("train", "val")), key=len)
    opening = [] if again.bos_id is None else [again.bos_id]
    assert np.array_equal(written, [*opening, *encode_text(again, SOURCE), again.eos_id])
