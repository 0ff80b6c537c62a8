"""Conversations as token ids, by a tokenizer's chat template, and which of them are learned.

The ids are those of the rendered text as one, so that a turn is learned in the ids in which it is
asked for later. What the template writes may be special tokens; what a message says may not: one
that spells a special token is refused, as it could end its turn and begin another's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_models.text.conversations import ASSISTANT, Message
from moezoo_models.text.tokenizer import HuggingFaceTokenizer, Tokenizer

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": ASSISTANT, "content": "b"},
]


class Conversation(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: ``(tokens,)`` int64.
        scored: ``(tokens,)`` bool: what the assistant says, up to and with the token that ends its
            turn; never the first token, before which there is nothing to predict it from.
        bytes: length in UTF-8 of the text that is scored.
    """

    ids: NDArray[np.int64]
    scored: NDArray[np.bool_]
    bytes: int


class ChatTemplate:
    """A tokenizer's own way to write conversations.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Raises:
        InputError: it has none, or is written in Python and does not say where its tokens are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.hf.chat_template:
            raise InputError(
                "tokenizer: it has no chat template; give that of an instruct model, or put a "
                "chat_template.jinja beside it"
            )
        self._hf = tokenizer.hf
        try:
            self.source = str(self._hf.get_chat_template())
        except ValueError as error:  # several, and none of them the default
            raise InputError(
                "tokenizer: none of its chat templates is named 'default'; leave one in "
                "chat_template.jinja"
            ) from error
        self._marked = _MARK.search(self.source) is not None
        own = getattr(self._hf, "backend_tokenizer", None)
        if own is None:
            raise InputError(
                "tokenizer: it is written in Python and has no places of its tokens; give one with "
                "a tokenizer.json"
            )
        # A copy, as the tokenizer's own spells special tokens letter by letter.
        self._backend = type(own).from_str(own.to_str())
        self._backend.encode_special_tokens = False
        added = self._hf.added_tokens_decoder
        self._special = {int(i) for i, token in added.items() if token.special}
        spellings = [re.escape(added[i].content) for i in sorted(self._special)]
        # The longest first, as an alternation takes what comes first.
        ordered = "|".join(sorted(spellings, key=len, reverse=True))
        self._spelled = re.compile(ordered) if ordered else None

    def render(self, messages: Sequence[Message], opens_reply: bool = False) -> str:
        """Return a conversation as text.

        Args:
            messages: its messages.
            opens_reply: whether the assistant's next turn is begun.

        Raises:
            InputError: the template refuses it, or a message spells a special token.
        """
        self._check_spelling(messages)
        with_reply = {"add_generation_prompt": opens_reply}
        return str(_rendered(self._hf.apply_chat_template, messages, tokenize=False, **with_reply))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids behind which the assistant's next turn follows.

        Raises:
            InputError: as for :meth:`render`.
        """
        return list(self._backend.encode(self.render(messages, True), add_special_tokens=False).ids)

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """Return a conversation's ids, and which of them are the assistant's.

        Raises:
            InputError: as for :meth:`render`; or the turns of the assistant are not to be found:
                a conversation's beginning is rendered otherwise than within the whole.
        """
        text = self.render(messages)
        spans = [self._without_tail(text, span) for span in self._spans(messages, text)]
        encoding = self._backend.encode(text, add_special_tokens=False)
        firsts = np.array([first for first, _ in encoding.offsets], np.int64)
        scored = np.zeros(len(firsts), np.bool_)
        for begin, end in spans:
            scored |= (firsts >= begin) & (firsts < end)
        scored[:1] = False
        if not scored.any():
            raise InputError("the chat template leaves nothing of what the assistant says")
        size = sum(len(text[begin:end].encode()) for begin, end in spans)
        return Conversation(np.array(encoding.ids, np.int64), scored, size)

    @cached_property
    def ends(self) -> list[int]:
        """The special tokens that end the assistant's turns; none if it has none."""
        found = self.encode(_PROBE)
        last = int(found.ids[np.flatnonzero(found.scored)[-1]])
        return [last] if last in self._special else []

    def _spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return where the assistant's turns begin and end in a rendered conversation."""
        if self._marked:
            from moezoo_models.adapters.transformers import render_generations  # imports models

            marked, spans = _rendered(render_generations, messages, tokenizer=self._hf)
            if marked == text:
                return list(spans)
            raise InputError("the chat template's generation marks change what it writes")
        return [
            self._span(messages, number, text)
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]

    def _span(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        before = self.render(messages[:number], opens_reply=True)
        behind = self.render(messages[: number + 1])
        if text.startswith(before) and text.startswith(behind) and len(before) <= len(behind):
            return len(before), len(behind)
        raise InputError(
            f"the chat template writes the conversation up to message {number + 1} otherwise when "
            "it goes on, so that the assistant's turns are not to be found; put {% generation %} "
            "marks around them in the template"
        )

    def _without_tail(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Leave out white space behind the token that ends a turn: nobody generates it."""
        begin, end = span
        kept = text[begin:end].rstrip()
        if self._spelled is not None:
            for found in self._spelled.finditer(kept):
                if found.end() == len(kept):
                    return begin, begin + len(kept)
        return span

    def _check_spelling(self, messages: Sequence[Message]) -> None:
        if self._spelled is None:
            return
        for number, message in enumerate(messages, start=1):
            if found := self._spelled.search(message["content"]):
                raise InputError(
                    f"message {number} spells the special token {found[0]!r}, by which it could "
                    "end its turn"
                )


def _rendered(render: Any, messages: Sequence[Message], **options: Any) -> Any:
    """Render, and say in a line what a template raises, which may be anything.

    Raises:
        InputError: the template refuses the conversation, or is broken.
    """
    try:
        return render(list(messages), **options)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(f"the chat template refuses it: {reason}") from error
