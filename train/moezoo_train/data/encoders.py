"""Documents to token ids on several threads, while others are read and written.

Both libraries encode without Python's lock, so that threads use all cores. Processes would each
have to import torch first, which takes as long as encoding 20 MB of text.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_models.text.encoding import pieces_of
from moezoo_models.text.rayon import without_rayon
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.data.prepared import token_dtype

_TASK_CHARACTERS = 1 << 15
"""Text that a thread encodes at once, or a little more: about 7 ms of work."""

Documents = TypeVar("Documents", bound=Iterable[str])
"""A batch of documents, of any kind."""


class EncodingError(Exception):
    """A tokenizer cannot encode a document.

    Attributes:
        document: its number among those that were given, from 0.
        reason: what the tokenizer says, one line.
    """

    def __init__(self, document: int, reason: str) -> None:
        super().__init__(document, reason)
        self.document = document
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """The ids of some documents, one behind the other, boundary tokens included.

    Attributes:
        tokens: ``(tokens,)``, in the type that they are stored in.
        lengths: number of ids of each document, ``(documents,)`` int64.
        marks: of conversations, what each token is: ``(tokens,)`` uint8.
        bytes: of conversations, the length of the text that is scored, for each document.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    marks: NDArray[np.uint8] | None = None
    bytes: Sequence[int] | None = None


class _Piece(NamedTuple):
    text: str
    document: int
    opens: bool
    closes: bool


class _Encoding(NamedTuple):
    """A batch on its way through the threads.

    Attributes:
        parts: ids of some pieces, and how many each piece has; all pieces in order.
        owners: which document of the batch each piece is of.
    """

    parts: list[Future[tuple[NDArray[Any], list[int]]]]
    owners: list[int]

    def result(self) -> Encoded:
        """Wait until all is encoded."""
        found = [part.result() for part in self.parts]
        lengths = np.zeros(self.owners[-1] + 1, np.int64)
        np.add.at(lengths, self.owners, [count for _, counts in found for count in counts])
        return Encoded(np.concatenate([ids for ids, _ in found]), lengths)


class Encoders:
    """Threads that encode; leaving the context stops them.

    Args:
        tokenizer: what encodes. One that is written in Python gets a single thread.
        workers: number of threads.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        opening = tokenizer.bos_id
        self._opening = [] if opening is None or opening == tokenizer.eos_id else [opening]
        self._workers = workers if tokenizer.threads else 1
        self._stack = ExitStack()

    def __enter__(self) -> Encoders:
        self._stack.enter_context(without_rayon())
        self._pool = ThreadPoolExecutor(self._workers, "encode")
        # What waits is dropped; what runs is short.
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, batches: Iterable[Documents], ahead: int) -> Iterator[tuple[Documents, Encoded]]:
        """Encode batches of non-empty documents, some further ones while one is in use.

        The ids are those of :func:`moezoo_models.text.encoding.encode_texts`, with a
        beginning-of-text token before those of each document, where the tokenizer has one of its
        own, and an end-of-text token behind them; whatever the number of threads.

        Args:
            batches: read as they are needed, each once; its first documents are encoded while
                others of it are read.
            ahead: how many are read and encoded beyond the one that is yielded.

        Yields:
            Each batch with its ids, in order.

        Raises:
            InputError: an id is outside the tokenizer's vocabulary.
            EncodingError: the tokenizer cannot encode a document.
        """
        waiting: deque[tuple[Documents, _Encoding]] = deque()
        read = 0
        for batch in batches:
            encoding = self._submit(batch, read)
            waiting.append((batch, encoding))
            read += encoding.owners[-1] + 1
            if len(waiting) > ahead:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)

    def here(self, documents: Sequence[str]) -> NDArray[Any]:
        """Return the ids of documents as of :meth:`run`, encoded on the calling thread.

        Raises:
            InputError: as there.
            EncodingError: as there.
        """
        return self._encode(list(self._pieces(documents, 0)))[0]

    def _submit(self, documents: Iterable[str], first: int) -> _Encoding:
        parts, owners = [], []
        for task in _tasks(self._pieces(documents, first)):
            parts.append(self._pool.submit(self._encode, task))
            owners += [piece.document - first for piece in task]
        return _Encoding(parts, owners)

    def _pieces(self, documents: Iterable[str], first: int) -> Iterator[_Piece]:
        for number, document in enumerate(documents, start=first):
            with _telling(number):
                texts = pieces_of(self._tokenizer, document)
            for place, text in enumerate(texts, start=1):
                yield _Piece(text, number, place == 1, place == len(texts))

    def _encode(self, pieces: Sequence[_Piece]) -> tuple[NDArray[Any], list[int]]:
        ids = array("I")
        counts: list[int] = []
        for piece, inner in zip(pieces, self._inner(pieces), strict=True):
            if piece.opens:
                inner = [*self._opening, *inner]
            if piece.closes:
                inner.append(self._tokenizer.eos_id)
            ids += array("I", inner)  # in half of numpy's time
            counts.append(len(inner))
        found = np.array(ids)
        size = self._tokenizer.vocab_size
        if len(found) and (largest := found.max()) >= size:
            raise InputError(
                f"tokenizer: it gave token id {largest}, outside its vocabulary of {size}; its "
                "files do not belong together"
            )
        return found.astype(token_dtype(size)), counts

    def _inner(self, pieces: Sequence[_Piece]) -> list[list[int]]:
        try:
            return self._tokenizer.encode_here([piece.text for piece in pieces])
        except BaseException:  # whose fault was it?
            for piece in pieces:
                with _telling(piece.document):
                    self._tokenizer.encode_here([piece.text])
            raise


def _next(waiting: deque[tuple[Documents, _Encoding]]) -> tuple[Documents, Encoded]:
    batch, encoding = waiting.popleft()
    return batch, encoding.result()


def _tasks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces into what a thread encodes at once."""
    task: list[_Piece] = []
    held = 0
    for piece in pieces:
        task.append(piece)
        held += len(piece.text)
        if held >= _TASK_CHARACTERS:
            yield task
            task, held = [], 0
    if task:
        yield task


@contextmanager
def _telling(document: int) -> Iterator[None]:
    """Raise an error that names which document the tokenizer cannot encode.

    Raises:
        EncodingError: for whatever the libraries raise.
    """
    try:
        yield
    except BaseException as error:
        # Where it stumbles, the tokenizers library raises what is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise EncodingError(document, reason) from error
