"""Conversations in the form of chat data: a list of messages with `role` and `content`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.data.files import Unreadable, kind_of

COLUMN = "messages"
Turn = tuple[str, str]


def turns(messages: Any) -> tuple[Turn, ...]:
    """Return question and answer of each turn.

    A system message stands before the first question, a blank line between them: templates have no place of its own
    for it.

    Raises:
        ValueError: saying what is wrong: not messages, roles out of turn, no answer at the end.
    """
    said = _said(messages)
    system = ""
    if said and said[0][0] == "system":
        system = f"{said.pop(0)[1]}\n\n"
    for number, (role, _) in enumerate(said):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise ValueError(f"has {role!r:.60} where {wanted!r} is due; user and assistant take turns")
    if not said or len(said) % 2:
        raise ValueError("does not end with an answer of the assistant")
    texts = [text for _, text in said]
    texts[0] = system + texts[0]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _said(messages: Any) -> list[tuple[str, str]]:
    """Return role and content of each message."""
    if isinstance(messages, Unreadable):
        raise ValueError(messages.reason)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"is {kind_of(messages)}, not a list of messages")
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"has {kind_of(message)} where a message is due")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"has a message whose {key} is {kind_of(message.get(key))}, not a text")
    return [(message["role"], message["content"]) for message in messages]
