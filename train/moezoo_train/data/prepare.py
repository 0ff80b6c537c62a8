"""Turn text into a tokenizer and memory-mapped tokens (``moezoo prepare``).

The work is done in ``OUTPUT/partial`` and moved into place when it is complete:

1. train the tokenizer, or load the one that is given;
2. tokenize the documents on all cores, and write them in order, in shards of about 4 MB of text;
3. choose the validation documents and copy the shards together.

A run that was killed goes on behind its last finished shard, and ends in the same bytes as one that
was not. Everything depends only on the content of the source, the settings and the tokenizer; their
hashes are kept beside the tokens, which are used again only while all of them are the same. The
number of threads changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moezoo.errors import InputError, check_int, check_number, going_on
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.locks import writing
from moezoo_models.cores import available_cores
from moezoo_models.text.chat import ChatTemplate
from moezoo_models.text.corpus import Corpus, open_corpus
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
from moezoo_train.data.assemble import assemble
from moezoo_train.data.assemble import split_threshold as split_threshold
from moezoo_train.data.chat_encoders import ChatEncoders
from moezoo_train.data.cutting import cut_document, document_to_cut
from moezoo_train.data.encoders import Encoders, EncodingError
from moezoo_train.data.prepared import (
    FORMAT,
    META_FILE,
    TOKENIZER_FOLDER,
    PreparedData,
    SplitName,
    check_place,
    hash_folder,
    token_dtype,
)
from moezoo_train.data.shards import Shard, batches
from moezoo_train.data.train_tokenizer import train_tokenizer

SHARD_BYTES = 4_000_000
"""Text per shard."""
_AHEAD = 2
"""Shards that are encoded while another is written: what a killed run loses."""
_PARTIAL = "partial"


def prepare(
    source: str = "stdlib",
    output: str | Path = "runs/data",
    vocab_size: int = 2048,
    tokenizer: str | None = None,
    val_fraction: float = 0.02,
    text_field: str = "text",
    seed: int = 0,
    max_bytes: int | None = None,
    workers: int | None = None,
    messages_field: str | None = None,
) -> PreparedData:
    """Tokenize a corpus for training; do nothing if that has been done already.

    Args:
        source: "stdlib" (the Python standard library's own source code), a .txt, .jsonl or
            .parquet file, a folder or glob of those, or "hf:NAME[:CONFIG]" for a Hugging Face
            dataset.
        output: directory that the tokenizer and the tokens are written to.
        vocab_size: number of tokens of the byte-pair-encoding tokenizer that is trained.
        tokenizer: directory of a tokenizer to use instead, or "hf:NAME"; vocab_size then has no
            effect.
        val_fraction: share of the documents that is held out for validation, at least one; of a
            single one, or of few large ones, the end of one, as this share of the text.
        text_field: field of a .jsonl row, or column of a .parquet file, that holds the text.
        seed: chooses the documents held out.
        max_bytes: stop behind the document with which the text reaches this many bytes.
        workers: threads that encode; default: the cores that this process may use. The tokens are
            the same with any number. A tokenizer written in Python encodes on one.
        messages_field: field of a row that holds a conversation, a list of messages with role and
            content. It is read instead of text, written by the chat template of the tokenizer,
            and only what the assistant says is learned.

    Raises:
        InputError: the source, a setting or the tokenizer is invalid, or the output cannot be
            written.
    """
    _check_settings(vocab_size, val_fraction, seed, max_bytes)
    threads = available_cores() if workers is None else check_int("workers", workers, maximum=1024)
    corpus = open_corpus(source, text_field, messages_field)
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    inputs = {
        "format": FORMAT,
        "source": corpus.manifest(),
        "text_field": text_field,
        "vocab_size": vocab_size if given is None else given.vocab_size,
        "tokenizer": None if given is None else given.fingerprint(),
        "val_fraction": val_fraction,
        "seed": seed,
        "max_bytes": max_bytes,
    }
    if messages_field is not None:
        if given is None:
            raise InputError(
                "messages_field: conversations need a chat template; give the tokenizer of an "
                "instruct model (--tokenizer)"
            )
        inputs |= {"messages_field": messages_field, "chat_template": ChatTemplate(given).source}
    output = Path(output)
    check_place(output)
    if (ready := _reusable(output, inputs)) is not None:
        _remove_finished_work(output, inputs)
        _say(f"nothing has changed; using {ready}")
        return ready
    kept = "the same command goes on behind what is tokenized"
    with _writing(output), writing(output, wait=True), going_on(kept):
        # Another process may have made them while this one waited.
        if (ready := _reusable(output, inputs)) is not None:
            return ready
        output.mkdir(exist_ok=True)
        _explain_renewal(output, inputs)
        place = None if tokenizer is None else Path(tokenizer)
        return _Preparation(corpus, output, inputs, given, place, threads).run()


class _Preparation:
    """One run of ``prepare`` that has something to do."""

    def __init__(
        self,
        corpus: Corpus,
        output: Path,
        inputs: dict[str, Any],
        tokenizer: Tokenizer | None,
        place: Path | None,
        workers: int,
    ) -> None:
        self.corpus = corpus
        self.output = output
        self.inputs = inputs
        self.given = tokenizer
        self.place = place
        self.workers = workers
        self.work = output / _PARTIAL
        self.chat = "messages_field" in inputs

    def run(self) -> PreparedData:
        self._open_work()
        try:
            tokenizer = self._tokenizer()
            shards = self._tokenize(tokenizer)
            if self.corpus.manifest() != self.inputs["source"]:
                raise InputError(
                    f"source: {self.corpus.source} changed while it was being read; run this again"
                )
            prepared = self._assemble(tokenizer, shards)
        except InputError:  # with these inputs it will never be finished
            shutil.rmtree(self.work)
            raise
        self._publish(prepared)
        _say(str(prepared))
        return prepared

    def _open_work(self) -> None:
        """Keep the unfinished work of an earlier run if it had the same inputs."""
        record = self.work / "inputs.json"
        wanted = json.dumps(self.inputs, sort_keys=True)
        if record.is_file() and record.read_bytes() == wanted.encode():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        with atomic_write(record) as file:
            file.write(wanted.encode())

    def _tokenizer(self) -> Tokenizer:
        """Make ``partial/tokenizer`` and load it: what encodes is what will be saved.

        A tokenizer whose own folder holds the same, and nothing else, was loaded from it already.
        """
        folder = self.work / TOKENIZER_FOLDER
        if not folder.is_dir():
            unfinished = self.work / "tokenizer.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            if self.given is not None:
                self.given.save(unfinished)
            else:
                _say(f"training a tokenizer of {self.inputs['vocab_size']:,} tokens")
                train_tokenizer(self._documents(), unfinished, self.inputs["vocab_size"])
            unfinished.rename(folder)
        if self.given is not None and self.place is not None and _same_files(self.place, folder):
            return self.given
        return load_tokenizer(folder)

    def _documents(self) -> Iterator[str]:
        """Yield the corpus up to ``max_bytes``."""
        left = self.inputs["max_bytes"]
        for document in self.corpus.documents():
            yield document
            if left is not None:
                left -= len(document.encode())
                if left <= 0:
                    return

    def _tokenize(self, tokenizer: Tokenizer) -> list[Shard]:
        """Write the shards that are still missing; return all of them."""
        dtype = token_dtype(tokenizer.vocab_size)
        shards: list[Shard] = []
        while (shard := Shard(self.work, len(shards), dtype, self.chat)).complete():
            shards.append(shard)
        done = [shard.documents() for shard in shards]
        skip = sum(len(documents) for documents in done)
        if skip:
            _say(f"going on behind document {skip:,}")
        total = self.inputs["max_bytes"] or self.corpus.total_bytes
        kind: type[Encoders] | type[ChatEncoders] = ChatEncoders if self.chat else Encoders
        texts = batches(islice(self._documents(), skip, None), SHARD_BYTES, self.inputs["seed"])
        with (
            _progress_bar() as bar,
            self._naming(skip),
            kind(tokenizer, self.workers) as encoders,
        ):
            task = bar.add_task("tokenizing", total=total)
            bar.advance(task, float(sum(documents["bytes"].sum() for documents in done)))
            for batch, encoded in encoders.run(texts, _AHEAD):
                shard = Shard(self.work, len(shards), dtype, self.chat)
                described = batch.described
                if encoded.bytes is not None:
                    keys = (key for _, key in described)
                    described = list(zip(encoded.bytes, keys, strict=True))
                shard.write(encoded, described)
                shards.append(shard)
                bar.advance(task, sum(size for size, _ in described))
        if not shards:
            raise InputError(f"source: {self.corpus.source} holds no text; name another")
        return shards

    @contextmanager
    def _naming(self, skipped: int) -> Iterator[None]:
        """Turn an error about a document into a line that names its file."""
        try:
            yield
        except EncodingError as error:
            place = self.corpus.place(skipped + error.document)
            raise InputError(
                f"tokenizer: it cannot encode {place}: {error.reason}; leave that text out, or "
                "give another tokenizer"
            ) from error

    def _assemble(self, tokenizer: Tokenizer, shards: Sequence[Shard]) -> PreparedData:
        """Copy the shards into one file per split."""
        documents = np.concatenate([shard.documents() for shard in shards])
        share, cut = self.inputs["val_fraction"], None
        if not self.chat and (number := document_to_cut(documents, share)) is not None:
            text = next(islice(self._documents(), number, None))
            cut = cut_document(text, documents, number, share, tokenizer)
            size = cut.parts["val"].bytes
            _say(f"holding out the end of {self.corpus.place(number)}, {size:,} bytes")
        train, val = assemble(self.work, shards, share, cut)
        return PreparedData(
            directory=self.output,
            vocab_size=tokenizer.vocab_size,
            train=train,
            val=val,
            inputs=self.inputs,
            tokenizer_hash=hash_folder(self.work / TOKENIZER_FOLDER),
        )

    def _publish(self, prepared: PreparedData) -> None:
        """Move everything into place; a directory without ``meta.json`` counts as empty."""
        (self.output / META_FILE).unlink(missing_ok=True)
        shutil.rmtree(prepared.tokenizer_directory, ignore_errors=True)
        # Copied, not moved: killed from here on, the next run still finds it beside the shards.
        shutil.copytree(self.work / TOKENIZER_FOLDER, prepared.tokenizer_directory)
        names: tuple[SplitName, ...] = ("train", "val")
        for name in names:
            os.replace(self.work / f"{name}.bin", prepared.file(name))
            prepared.marks_file(name).unlink(missing_ok=True)
            if prepared.chat:
                os.replace(self.work / f"{name}.marks", prepared.marks_file(name))
        prepared.write_meta(self.work / META_FILE)
        os.replace(self.work / META_FILE, self.output / META_FILE)
        shutil.rmtree(self.work)


def _check_settings(vocab_size: int, val_fraction: float, seed: int, max_bytes: int | None) -> None:
    check_int("vocab_size", vocab_size)
    check_int("seed", seed, minimum=0, maximum=(1 << 63) - 1)
    check_number("val_fraction", val_fraction, maximum=0.99)
    if max_bytes is not None:
        check_int("max_bytes", max_bytes)


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files, and nothing else."""
    if not one.is_dir() or sorted(os.listdir(one)) != sorted(os.listdir(other)):
        return False
    return all(
        file.is_file() and file.read_bytes() == (other / file.name).read_bytes()
        for file in one.iterdir()
    )


def _reusable(output: Path, inputs: dict[str, Any]) -> PreparedData | None:
    """Return the prepared data if they are whole and made from the same inputs."""
    try:
        prepared = PreparedData.load(output)
        if prepared.inputs != inputs:
            return None
        prepared.check_sums()
    except InputError:
        return None
    return prepared


def _remove_finished_work(output: Path, inputs: dict[str, Any]) -> None:
    """Remove what a process left that was killed between publishing and removing it."""
    work = output / _PARTIAL
    # Finished data may be read-only, and another process may be at work.
    with suppress(OSError, InputError):
        if work.is_dir() and _started_with(work) in (None, inputs):
            with writing(output):
                shutil.rmtree(work)


def _started_with(work: Path) -> Any:
    """Return the inputs of unfinished work; None if it was being removed."""
    record = work / "inputs.json"
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text())
    except ValueError:  # damaged, so that nobody can go on with it
        return None


def _explain_renewal(output: Path, inputs: dict[str, Any]) -> None:
    if not (output / META_FILE).exists():
        return
    try:
        prepared = PreparedData.load(output)
        before = prepared.inputs
        if before == inputs:
            prepared.check_sums()
    except InputError as error:
        _say(f"preparing again, as {error}")
        return
    changed = [name for name in inputs if before.get(name) != inputs[name]]
    _say(f"preparing {output} again, as this changed: {', '.join(changed)}")


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn a full disk or a folder without permission into one line."""
    try:
        yield
    except OSError as error:
        place = error.filename or output
        raise InputError(
            f"output: {place} cannot be written: {error.strerror}; free space or give another "
            "directory, then run this again"
        ) from error


def _progress_bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _say(line: str) -> None:
    print(f"prepare: {line}", file=sys.stderr, flush=True)
