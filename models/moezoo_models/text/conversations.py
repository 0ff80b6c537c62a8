"""Conversations as rows hold them: lists of messages, judged before anything renders them."""

from __future__ import annotations

import json
from typing import Any

from moezoo.errors import InputError, nearest

Message = dict[str, str]
"""``{"role": ..., "content": ...}``."""

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_KEYS = ("role", "content")


def conversation_of(row: Any, field: str, place: str) -> str:
    """Return the conversation of a row as JSON, which is the same for equal conversations.

    Args:
        row: what was read.
        field: name of the field that holds the list of messages.
        place: where the row is, for messages.

    Raises:
        InputError: the row has no such field, or no conversation in it from which something can be
            learned.
    """
    if not isinstance(row, dict):
        raise InputError(f"source: {place} is not an object with a {field!r} field")
    if field not in row:
        raise InputError(f"messages_field: {place} has no {field!r}{nearest(field, row)}")
    messages = checked_messages(row[field], f"messages_field: {field!r} in {place}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise InputError(
            f"messages_field: {field!r} in {place} has no message of role {ASSISTANT!r}, of which "
            "a model could learn; remove the row"
        )
    return json.dumps(messages, ensure_ascii=False)


def checked_messages(messages: Any, what: str) -> list[Message]:
    """Return a list of messages with nothing in them but role and content.

    Args:
        messages: what should be one; keys without a value (null) are left out.
        what: the field and where it is, which begins what is said of it.

    Raises:
        InputError: names the message, from 1, and what is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{what} is not a list of messages; write [{{role, content}}, ...]")
    return [_checked(message, f"{what}, message {i}") for i, message in enumerate(messages, 1)]


def _checked(message: Any, what: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{what} is a {type(message).__name__}; write {{role, content}}")
    given = {key: value for key, value in message.items() if value is not None}
    for key in _KEYS:
        if not isinstance(given.get(key), str):
            raise InputError(f"{what} has no {key!r} that is a text; add it")
    if more := [key for key in given if key not in _KEYS]:
        raise InputError(f"{what} has {more[0]!r}, which is not read; remove it")
    if given["role"] not in ROLES:
        raise InputError(
            f"{what}: there is no role {given['role'][:40]!r}{nearest(given['role'], ROLES)}"
        )
    try:
        given["content"].encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half a surrogate pair, which is no character; repair it"
        ) from error
    return {key: given[key] for key in _KEYS}
