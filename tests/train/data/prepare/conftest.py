"""A small corpus, and what its preparation leaves behind."""

import random

import pytest

from moezoo_train.data import prepare as module
from moezoo_train.data.train_tokenizer import train_tokenizer

WORDS = [
    *("if", "else", "return", "yield", "lambda", "token", "expert", "router", "gate", "weight"),
    *("sum", "softmax", "über", "漢字"),
]


@pytest.fixture(scope="session")
def write_corpus():
    """Return a function that fills a folder with text files."""

    def write(folder, count=40):
        chance = random.Random(0)
        folder.mkdir(exist_ok=True)
        for i in range(count):
            lines = [" ".join(chance.choices(WORDS, k=8)) for _ in range(chance.randint(5, 60))]
            (folder / f"{i:03d}.txt").write_text("\n".join(lines) + f"\n{i}\n")
        return folder

    return write


@pytest.fixture(scope="session")
def corpus(write_corpus, tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def own_tokenizer(corpus, tmp_path_factory):
    """Return the directory of a tokenizer trained on the corpus."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([file.read_text() for file in sorted(corpus.iterdir())], directory, 300)
    return str(directory)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)


@pytest.fixture(scope="session")
def contents():
    """Return a function that reads every file of a finished preparation."""

    def read(output):
        files = [path for path in sorted(output.rglob("*")) if path.is_file()]
        visible = [file for file in files if file.name[0] != "."]
        return {str(file.relative_to(output)): file.read_bytes() for file in visible}

    return read
