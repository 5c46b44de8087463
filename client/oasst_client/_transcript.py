"""Conversations as OASST text, the format the model was trained on, and back.

>>> text = render_transcript([("user", "What is a meme?"), ("assistant", "An idea that spreads.")])
>>> print(text)
<|prompter|>What is a meme?<|endoftext|><|assistant|>An idea that spreads.<|endoftext|>
>>> [(str(message.role), message.content) for message in parse_transcript(text)]
[('user', 'What is a meme?'), ('assistant', 'An idea that spreads.')]

The round trip is exact in both directions: a text that parses renders as itself, and messages that render come back
as they were, a prompter under its familiar name, user. So messages that spell out a control token do not render: as
text nobody could tell their words from a turn. (The service itself has no such limit: it encodes words and control
tokens apart.)
"""

import re
from collections.abc import Iterable

from oasst.prompt import ControlToken, Speaker

from oasst_client._types import Message, MessageLike, Role
from oasst_client._wire import message_from

__all__ = ["parse_transcript", "render_transcript"]

_MARKERS = {
    Role.USER: Speaker.PROMPTER.value.value,
    Role.PROMPTER: Speaker.PROMPTER.value.value,
    Role.ASSISTANT: Speaker.ASSISTANT.value.value,
}
_ROLES = {Speaker.PROMPTER.value.value: Role.USER, Speaker.ASSISTANT.value.value: Role.ASSISTANT}
_END = ControlToken.END_OF_TEXT.value
_CONTROL = re.compile("|".join(re.escape(token.value) for token in ControlToken))


def render_transcript(messages: Iterable[MessageLike]) -> str:
    """The conversation as OASST text. A system message stands as plain text before the first turn.

    Raises:
        ValueError: a message is a system message but not the first, is an empty one, or spells out a control token.
    """
    return "".join(_render(index, message_from(message)) for index, message in enumerate(messages))


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The conversation that OASST text holds.

    Raises:
        ValueError: the text is not whole turns, each opened by its speaker's token and closed by end-of-text.
    """
    start = _next_control(text, 0)
    messages = [Message(Role.SYSTEM, text[:start])] if start else []
    while start < len(text):
        marker = next((each for each in _ROLES if text.startswith(each, start)), None)
        if marker is None:
            raise ValueError(f"a turn must begin with {' or '.join(_ROLES)} at character {start}")
        content_start = start + len(marker)
        content_end = _next_control(text, content_start)
        if not text.startswith(_END, content_end):
            raise ValueError(f"the turn that begins at character {start} does not end with {_END}")
        messages.append(Message(_ROLES[marker], text[content_start:content_end]))
        start = content_end + len(_END)
    return tuple(messages)


def _render(index: int, message: Message) -> str:
    if found := _CONTROL.search(message.content):
        raise ValueError(f"message {index} spells out the control token {found[0]}; as text it would become a turn")
    if message.role is not Role.SYSTEM:
        return f"{_MARKERS[message.role]}{message.content}{_END}"
    if index:
        raise ValueError(f"message {index} is a system message; only the first may be")
    if not message.content:
        raise ValueError("the system message is empty; leave it out")
    return message.content


def _next_control(text: str, start: int) -> int:
    """Where the next control token stands at or after `start`; the text's end if there is none."""
    found = _CONTROL.search(text, start)
    return found.start() if found else len(text)
