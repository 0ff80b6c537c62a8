"""Conversations with a checkpoint: turn after turn, each by the tokenizer's chat template."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from moezoo.errors import InputError, check_text
from moezoo_models.text.chat import ChatTemplate
from moezoo_models.text.conversations import ASSISTANT, Message
from moezoo_models.text.tokenizer import Tokenizer

OnText = Callable[[str], None]
Answer = Callable[[Sequence[int], Sequence[int], OnText | None], str]
"""Continues ids until one of the others comes, or the model's own end; returns the new text."""


class Chat:
    """A conversation that goes on with each question.

    Args:
        answer: continues a prompt's ids.
        tokenizer: the model's tokenizer, with a chat template.
        system: what the model is told beforehand; empty for what the template says itself.

    Attributes:
        messages: all that was said.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, answer: Answer, tokenizer: Tokenizer, system: str = "") -> None:
        self._answer = answer
        self._template = ChatTemplate(tokenizer)
        self.messages: list[Message] = []
        if system:
            self.messages.append({"role": "system", "content": check_text("system", system)})

    def ask(self, question: str, on_text: OnText | None = None) -> str:
        """Return the answer to a question; both become part of the conversation.

        Args:
            question: what the user says.
            on_text: called with each piece of the answer as soon as its characters are whole.

        Raises:
            InputError: the conversation does not fit the model, the template refuses it, or the
                question spells a special token; the conversation is then as before.
        """
        asked = [*self.messages, {"role": "user", "content": check_text("prompt", question)}]
        try:
            prompt, ends = self._template.prompt(asked), self._template.ends
        except InputError as error:
            raise InputError(f"prompt: {error}") from error
        answer = self._answer(prompt, ends, on_text)
        self.messages = [*asked, {"role": ASSISTANT, "content": answer}]
        return answer


def talk(chat: Chat, prompt: str, stream: bool) -> str:
    """Answer a prompt, or, where it is empty, each line of the input until it ends.

    Args:
        chat: the conversation.
        prompt: what the user says; empty to read lines.
        stream: print answers as they come.

    Returns:
        The last answer.
    """
    answer = ""
    for question in [prompt] if prompt else _questions():
        try:
            answer = chat.ask(question, _show if stream else None)
        except InputError as error:
            if prompt or not sys.stdin.isatty():
                raise
            _show(str(error))  # the conversation goes on
        if stream:
            _show("\n")
    return answer


def _questions() -> Iterator[str]:
    """Yield the lines of the input; on a terminal, ask for each."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
