"""Preparing text against one thread of it, and against encoders alone."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.bench.case import Case, Package, Peer, Setting, Target
from moezoo.bench.end_to_end import Job, Task, timed

_LONGEST = 60_000  # characters; longer documents are cut by us, and take others ever longer
_TRAINED_ON = 400_000  # bytes


@dataclass(frozen=True)
class Text:
    """Documents, also as a file, the directory of a tokenizer, and the id that ends a document."""

    documents: Sequence[str]
    source: Path
    tokenizer: Path
    end: int

    def job(self, encode: Callable[[], Iterable[Sequence[int]]]) -> Job:
        """Return an encoder's job."""
        return Job(timed(encode), lambda: {"the tokens": in_order(encode())})

    def preparing(self, workers: int | None) -> Job:
        """Return the job of all of ``moezoo prepare``, with as many threads."""
        from moezoo_train.data.prepare import prepare

        output = self.source.with_name(f"prepared-{workers}")

        def whole() -> Any:
            shutil.rmtree(output, ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):
                words = str(self.tokenizer)
                return prepare(str(self.source), output, tokenizer=words, workers=workers)

        def answer() -> dict[str, Tensor]:
            found = whole()
            ids = [token for name in ("train", "val") for token in found.tokens(name).tolist()]
            return {"the tokens": in_order(_split(ids, self.end))}

        return Job(timed(whole), answer)


def in_order(documents: Iterable[Sequence[int]]) -> Tensor:
    """Return all ids, documents sorted: what is held out stands in another file."""
    ids = itertools.chain.from_iterable([*each, -1] for each in sorted(map(list, documents)))
    return torch.tensor(list(ids))


def _build(setting: Setting, folder: Path) -> Task:
    from moezoo_train.data.train_tokenizer import train_tokenizer

    documents = _documents(1000 * setting["kB"])
    size = sum(len(text.encode()) for text in documents)
    words = train_tokenizer(documents, folder / "tokenizer", setting["V"], _TRAINED_ON)
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    parts = Text(documents, source, folder / "tokenizer", words.eos_id)
    return Task(parts.preparing(None), parts, amount=size / 1e6)


def _documents(size: int) -> list[str]:
    """Return different documents of the standard library's source, up to a number of bytes."""
    from moezoo_models.text.corpus import open_corpus

    found: dict[str, None] = {}
    for text in open_corpus("stdlib", "text").documents():
        if len(text) <= _LONGEST:
            found[text] = None
            size -= len(text.encode())
        if size <= 0:
            break
    return list(found)


def _split(ids: Sequence[int], end: int) -> list[list[int]]:
    """Part documents, each of which ends with ``end``."""
    found: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    return found[:-1]


def _tokenizers(parts: Text) -> Job:
    """Its batch encoder, on all cores."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(parts.tokenizer / "tokenizer.json"))
    words.encode_special_tokens = True
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return parts.job(
        lambda: [
            encoding.ids
            for encoding in words.encode_batch_fast(list(parts.documents), add_special_tokens=False)
        ]
    )


def _sentencepiece(parts: Text) -> Job:
    """Its encoder, on all cores."""
    from sentencepiece import SentencePieceProcessor

    words = SentencePieceProcessor(model_file=str(parts.tokenizer / "tokenizer.model"))
    threads = os.cpu_count() or 1
    return parts.job(lambda: words.encode(list(parts.documents), num_threads=threads))


def _case(name: str, size: int) -> Case:
    return Case(
        name,
        "end-to-end",
        "prepare",
        {"kB": size, "V": 2048},
        {"kB": 40, "V": 400},
        _build,
        {
            "one thread": Peer(lambda parts: parts.preparing(1), target=Target(forward=1.8)),
            "tokenizers, encoding alone": Peer(
                _tokenizers, Package("tokenizers", "pip install 'moezoo[train]'")
            ),
            "sentencepiece, encoding alone": Peer(
                _sentencepiece, Package("sentencepiece", "pip install 'moezoo[train]'")
            ),
        },
        unit="MB/s",
    )


CASES = [_case("prepare", 2000), _case("prepare-8mb", 8000)]
