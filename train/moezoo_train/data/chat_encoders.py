"""Conversations to token ids, and which of them are learned, on several threads."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from moezoo.errors import InputError
from moezoo_models.text.chat import ChatTemplate, Conversation
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.data.encoders import Documents, Encoded, EncodingError
from moezoo_train.data.prepared import OPENS, SCORED, token_dtype

_TASK = 32
"""Conversations that a thread encodes at once."""


class ChatEncoders:
    """Threads that encode conversations; leaving the context stops them.

    The ids are the chat template's, with nothing around them: conversations are kept apart by the
    marks of their first tokens.

    Args:
        tokenizer: a tokenizer with a chat template.
        workers: number of threads.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._template = ChatTemplate(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._workers = workers

    def __enter__(self) -> ChatEncoders:
        self._pool = ThreadPoolExecutor(self._workers, "encode")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, batches: Iterable[Documents], ahead: int) -> Iterator[tuple[Documents, Encoded]]:
        """Encode batches of conversations, some further ones while one is in use.

        Args:
            batches: conversations as JSON; read as they are needed.
            ahead: how many batches are read beyond the one that is yielded.

        Yields:
            Each batch with its ids and marks, in order.

        Raises:
            EncodingError: the template or the tokenizer cannot write a conversation.
        """
        waiting: deque[tuple[Documents, list[Future[list[Conversation]]]]] = deque()
        read = 0
        for batch in batches:
            documents, tasks = iter(batch), []
            while task := list(islice(documents, _TASK)):
                tasks.append(self._pool.submit(self._encode, task, read))
                read += len(task)
            waiting.append((batch, tasks))
            if len(waiting) > ahead:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _encode(self, texts: Sequence[str], first: int) -> list[Conversation]:
        encoded = []
        for number, text in enumerate(texts, start=first):
            try:
                encoded.append(self._template.encode(json.loads(text)))
            except InputError as error:
                raise EncodingError(number, str(error)) from error
        return encoded

    def _next(
        self, waiting: deque[tuple[Documents, list[Future[list[Conversation]]]]]
    ) -> tuple[Documents, Encoded]:
        batch, tasks = waiting.popleft()
        found = [conversation for task in tasks for conversation in task.result()]
        ids = np.concatenate([each.ids for each in found])
        marks = np.concatenate([each.scored for each in found]).astype(np.uint8) * SCORED
        lengths = np.array([len(each.ids) for each in found], np.int64)
        marks[np.cumsum(lengths) - lengths] |= OPENS
        if (largest := int(ids.max())) >= self._vocab_size:
            raise InputError(
                f"tokenizer: it gave token id {largest}, outside its vocabulary of "
                f"{self._vocab_size}; its files do not belong together"
            )
        sizes = [each.bytes for each in found]
        return batch, Encoded(ids.astype(token_dtype(self._vocab_size)), lengths, marks, sizes)
