"""A prompt column's value as chat messages: text, messages, messages stored as JSON text, contents in parts.

Nothing is dropped or repaired: a value that would reach the model as something else raises BadRow.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from treepo.data.rows import BadRow, check_value, show
from treepo.data.tokenizer import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
_NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "images", "audio", "videos")
_STRUCTURE = re.compile(
    r"""\s*"?\s*(?:(?:np\.|numpy\.)?array\(\s*)?\[?\s*\{\s*\\?['"](role|content|from|value|messages|conversations)\\?['"]\s*:"""
)
_KEYS = ({"role", "content"}, {"from", "value"})
_ALLOWED = "allowed: text, or a list of messages with role and content"


def messages_of(value: Any, column: str) -> tuple[Message, ...]:
    """Read the messages of a prompt; text is a user's message. Raises BadRow."""
    if isinstance(value, str) and (_STRUCTURE.match(value) or _are_messages(value)):
        value = _parse(value, column)
    elif isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        raise _bad(f"column {column!r} is {show(value)}; {_ALLOWED}")
    return tuple(_message(one, f"column {column!r}, message {at}") for at, one in enumerate(value, start=1))


def with_system_prompt(messages: tuple[Message, ...], system_prompt: str | None) -> tuple[Message, ...]:
    """The messages with `system_prompt`, unless it is None, in place of their own."""
    if system_prompt is None:
        return messages
    others = tuple(message for message in messages if message["role"] != "system")
    return ({"role": "system", "content": system_prompt}, *others)


def question_of(messages: Sequence[Message]) -> str:
    """The last message of the user; without one, the last message."""
    asked = [message for message in messages if message["role"] == "user"]
    return (asked or messages)[-1]["content"]


def _parse(text: str, column: str) -> Any:
    """Read messages that are stored as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad(
            f"column {column!r} is {show(text)}: it looks like messages but is not JSON; {_ALLOWED}"
        ) from None
    if isinstance(value, str):
        return _parse(value, column)  # text of text
    check_value(value, column)  # escapes within the text are characters of it
    return value


def _are_messages(text: str) -> bool:
    """Whether it is JSON text of messages whose first key is one of a program, such as name or id."""
    if text.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and any(keys <= first.keys() for keys in _KEYS)


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        raise _bad(f"{place} is {show(value)}; {_ALLOWED}")
    role, content = value["role"], _content(value["content"], place)
    if role not in ROLES:
        raise _bad(f"{place} has role {show(role)}; allowed: {', '.join(ROLES)}")
    if not content.strip() and role in ("user", "assistant"):
        raise _bad(f"{place} ({role}) is empty")
    for key in _NOT_TEXT:
        if value.get(key):
            raise _bad(f"{place} has {key} = {show(value[key])}; only role and content are read")
    return {"role": role, "content": content}


def _content(value: Any, place: str) -> str:
    """The text of a message: a string, or a list of parts that are all text, joined without a separator."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _bad(f"{place} has content {show(value)}; allowed: text, or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise _bad(f"{place} has a part {show(part)}; only parts of type 'text' are read")
        texts.append(text)
    return "".join(texts)


def _bad(detail: str) -> BadRow:
    return BadRow("no prompt", detail)
