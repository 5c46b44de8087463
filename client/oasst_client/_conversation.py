"""Conversations that remember: a history, and one thin shell for each client."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

from oasst_client._async_client import AsyncClient, AsyncCompletionStream
from oasst_client._client import Client, CompletionStream
from oasst_client._files import write_atomically
from oasst_client._transcript import parse_transcript, render_transcript
from oasst_client._types import ChatOptions, Completion, Message, MessageLike, Role
from oasst_client._wire import message_from, submit_request

__all__ = ["AsyncConversation", "Conversation"]

# Of the saved form. A later form gets the next number, and is refused by clients that do not know it.
_FORMAT = "oasst-conversation"
_VERSION = 1

# A turn is its text between the token that opens it and end-of-text; the prompt ends with the assistant's token.
_CONTROL_TOKENS_PER_TURN = 2
_CONTROL_TOKENS_OF_PROMPT = 1


class _History:
    """The turns so far. Changes only by whole exchanges, so a failed or abandoned answer leaves it as it was."""

    def __init__(self, messages: Iterable[MessageLike], system: str, options: ChatOptions) -> None:
        own = [Message(Role.SYSTEM, system)] if system else []
        self._messages: tuple[Message, ...] = (*own, *map(message_from, messages))
        self._options = options

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far, the system text first if there is one."""
        return self._messages

    @property
    def options(self) -> ChatOptions:
        """What every question is asked with."""
        return self._options.copy()

    def to_text(self) -> str:
        """The turns as OASST text; `from_text` makes the same turns of it.

        Raises:
            ValueError: a turn spells out a control token, which as text would become a turn.
        """
        return render_transcript(self._messages)

    def to_json(self) -> str:
        """Turns and options as JSON; `from_json` makes the same conversation of it."""
        saved = {
            "format": _FORMAT,
            "version": _VERSION,
            "options": self._options,
            "messages": [{"role": each.role, "content": each.content} for each in self._messages],
        }
        return json.dumps(saved, ensure_ascii=False, indent=2) + "\n"

    def save(self, path: Path | str) -> None:
        """The file at `path` holds the conversation as JSON; if it cannot be written, what it held before."""
        write_atomically(Path(path), self.to_json())

    # What follows tells the shells what to ask and what to make of the answer.

    def _question(self, num_kept: int, text: str) -> tuple[tuple[Message, ...], Callable[[Completion], None]]:
        """The turns that ask `text` after the first `num_kept` messages, and what keeps the answer to them."""
        asked = (*self._messages[:num_kept], Message(Role.USER, text))

        def keep(completion: Completion) -> None:
            self._messages = (*asked, Message(Role.ASSISTANT, completion.text))

        return asked, keep

    def _with_defaults(self, options: ChatOptions) -> ChatOptions:
        return {**self._options, **options}

    def _position_of(self, question: int) -> int:
        """Where among the messages a question stands; negative ones count from the last.

        Raises:
            IndexError: there is no such question.
        """
        positions = self._question_positions()
        if not -len(positions) <= question < len(positions):
            raise IndexError(f"there is no question {question}: the conversation has {len(positions)}")
        return positions[question]

    def _last_question(self) -> str:
        return self._messages[self._position_of(-1)].content

    def _before(self, num_questions: int | None) -> tuple[Message, ...]:
        """The messages up to and with the answer to the last of `num_questions`; None is all of them."""
        positions = self._question_positions()
        if num_questions is None or num_questions == len(positions):
            return self._messages
        if not 0 <= num_questions < len(positions):
            raise IndexError(f"there are no {num_questions} questions: the conversation has {len(positions)}")
        return self._messages[: positions[num_questions]]

    def _question_positions(self) -> list[int]:
        return [index for index, each in enumerate(self._messages) if each.role in (Role.USER, Role.PROMPTER)]

    def _texts(self) -> list[str]:
        return [each.content for each in self._messages]

    def _prompt_tokens(self, lengths: Sequence[int]) -> int:
        """How many tokens the turns take in a prompt; `lengths` are those of the messages' texts."""
        num_turns = len(self._messages) - self._num_system()
        return sum(lengths) + _CONTROL_TOKENS_PER_TURN * num_turns + _CONTROL_TOKENS_OF_PROMPT

    def _drop_oldest(self, lengths: Sequence[int], max_tokens: int) -> int:
        """The fewest oldest exchanges are gone that leave at most `max_tokens`; how many messages those were."""
        first = end = self._num_system()
        excess = self._prompt_tokens(lengths) - max_tokens
        while excess > 0 and end < len(self._messages):
            exchange = lengths[end : end + 2]
            excess -= sum(exchange) + _CONTROL_TOKENS_PER_TURN * len(exchange)
            end += len(exchange)
        self._messages = self._messages[:first] + self._messages[end:]
        return end - first

    def _num_system(self) -> int:
        """How many messages come before the turns: one system message, or none."""
        return int(bool(self._messages) and self._messages[0].role is Role.SYSTEM)


class Conversation(_History):
    """A chat whose every question is asked with the turns before it. One question at a time.

    >>> conversation = Conversation(client, temperature=0)
    >>> conversation.ask("What is a meme?").text
    'An idea that spreads.'
    >>> [str(message.role) for message in conversation.messages]
    ['user', 'assistant']
    >>> conversation.to_text()
    '<|prompter|>What is a meme?<|endoftext|><|assistant|>An idea that spreads.<|endoftext|>'

    Args:
        client: the connection to ask through.
        messages: turns to begin with.
        system: instructions that stand before the first turn.
        options: for every question; those of a single question come on top.
    """

    def __init__(
        self,
        client: Client,
        *,
        messages: Iterable[MessageLike] = (),
        system: str = "",
        **options: Unpack[ChatOptions],
    ) -> None:
        super().__init__(messages, system, options)
        self._client = client

    @classmethod
    def from_text(cls, client: Client, text: str, **options: Unpack[ChatOptions]) -> Self:
        """The conversation that OASST text holds, to be gone on with through `client`.

        Raises:
            ValueError: the text is not whole turns in the OASST format.
        """
        return cls(client, messages=parse_transcript(text), **options)

    @classmethod
    def from_json(cls, client: Client, saved: str) -> Self:
        """The conversation that `to_json` gave, to be gone on with through `client`.

        Raises:
            ValueError: it is no saved conversation, or one of a newer form.
        """
        messages, options = _parse_saved(saved)
        return cls(client, messages=messages, **options)

    @classmethod
    def load(cls, client: Client, path: Path | str) -> Self:
        """The conversation that `save` wrote to `path`. Raises what `from_json` raises, and OSError."""
        return cls.from_json(client, Path(path).read_text(encoding="utf-8"))

    def fork(self, num_questions: int | None = None) -> Self:
        """A conversation of its own with the same options and the same turns, or only those of the first questions."""
        return type(self)(self._client, messages=self._before(num_questions), **self._options)

    def ask(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """The answer; question and answer are now part of the conversation."""
        return self._ask(len(self._messages), text, options)

    def ask_stream(self, text: str, **options: Unpack[ChatOptions]) -> CompletionStream:
        """The answer as it is generated; once it is whole, question and answer are part of the conversation."""
        return self._ask_stream(len(self._messages), text, options)

    def regenerate(self, **options: Unpack[ChatOptions]) -> Completion:
        """Another answer to the last question, in the place of the one before. With the same seed it is the same.

        Raises:
            IndexError: nothing was asked yet.
        """
        return self.edit(self._last_question(), **options)

    def regenerate_stream(self, **options: Unpack[ChatOptions]) -> CompletionStream:
        """`regenerate` as it is generated; the answer before stays until this one is whole."""
        return self.edit_stream(self._last_question(), **options)

    def edit(self, text: str, *, question: int = -1, **options: Unpack[ChatOptions]) -> Completion:
        """The answer to `text`, asked in the place of an earlier question; what came after that one is gone.

        Args:
            text: what is asked instead.
            question: which one, counted from 0, or from -1 backwards.
            options: for this question.

        Raises:
            IndexError: there is no such question.
        """
        return self._ask(self._position_of(question), text, options)

    def edit_stream(self, text: str, *, question: int = -1, **options: Unpack[ChatOptions]) -> CompletionStream:
        """`edit` as it is generated; the conversation changes once the answer is whole."""
        return self._ask_stream(self._position_of(question), text, options)

    def num_tokens(self) -> int:
        """How many tokens of a prompt the turns take, counted by the service."""
        return self._prompt_tokens(self._text_lengths())

    def truncate(self, max_tokens: int) -> int:
        """The fewest oldest exchanges are gone that leave at most `max_tokens`; how many messages those were.

        The system text stays, even where it alone is longer.
        """
        return self._drop_oldest(self._text_lengths(), max_tokens)

    def _ask(self, num_kept: int, text: str, options: ChatOptions) -> Completion:
        messages, keep = self._question(num_kept, text)
        completion = self._client.chat(messages, **self._with_defaults(options))
        keep(completion)
        return completion

    def _ask_stream(self, num_kept: int, text: str, options: ChatOptions) -> CompletionStream:
        messages, keep = self._question(num_kept, text)
        return self._client.stream(messages, on_finished=keep, **self._with_defaults(options))

    def _text_lengths(self) -> list[int]:
        ids = self._client.tokenize(*self._texts(), model=self._options.get("model", ""))
        return list(map(len, ids))


class AsyncConversation(_History):
    """A chat whose every question is asked with the turns before it. Arguments are those of `Conversation`."""

    def __init__(
        self,
        client: AsyncClient,
        *,
        messages: Iterable[MessageLike] = (),
        system: str = "",
        **options: Unpack[ChatOptions],
    ) -> None:
        super().__init__(messages, system, options)
        self._client = client

    @classmethod
    def from_text(cls, client: AsyncClient, text: str, **options: Unpack[ChatOptions]) -> Self:
        """The conversation that OASST text holds, to be gone on with through `client`.

        Raises:
            ValueError: the text is not whole turns in the OASST format.
        """
        return cls(client, messages=parse_transcript(text), **options)

    @classmethod
    def from_json(cls, client: AsyncClient, saved: str) -> Self:
        """The conversation that `to_json` gave, to be gone on with through `client`.

        Raises:
            ValueError: it is no saved conversation, or one of a newer form.
        """
        messages, options = _parse_saved(saved)
        return cls(client, messages=messages, **options)

    @classmethod
    def load(cls, client: AsyncClient, path: Path | str) -> Self:
        """The conversation that `save` wrote to `path`. Raises what `from_json` raises, and OSError."""
        return cls.from_json(client, Path(path).read_text(encoding="utf-8"))

    def fork(self, num_questions: int | None = None) -> Self:
        """A conversation of its own with the same options and the same turns, or only those of the first questions."""
        return type(self)(self._client, messages=self._before(num_questions), **self._options)

    async def ask(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """The answer; question and answer are now part of the conversation."""
        return await self._ask(len(self._messages), text, options)

    def ask_stream(self, text: str, **options: Unpack[ChatOptions]) -> AsyncCompletionStream:
        """The answer as it is generated; once it is whole, question and answer are part of the conversation."""
        return self._ask_stream(len(self._messages), text, options)

    async def regenerate(self, **options: Unpack[ChatOptions]) -> Completion:
        """Another answer to the last question, in the place of the one before. With the same seed it is the same.

        Raises:
            IndexError: nothing was asked yet.
        """
        return await self.edit(self._last_question(), **options)

    def regenerate_stream(self, **options: Unpack[ChatOptions]) -> AsyncCompletionStream:
        """`regenerate` as it is generated; the answer before stays until this one is whole."""
        return self.edit_stream(self._last_question(), **options)

    async def edit(self, text: str, *, question: int = -1, **options: Unpack[ChatOptions]) -> Completion:
        """The answer to `text`, asked in the place of an earlier question; what came after that one is gone.

        Args:
            text: what is asked instead.
            question: which one, counted from 0, or from -1 backwards.
            options: for this question.

        Raises:
            IndexError: there is no such question.
        """
        return await self._ask(self._position_of(question), text, options)

    def edit_stream(self, text: str, *, question: int = -1, **options: Unpack[ChatOptions]) -> AsyncCompletionStream:
        """`edit` as it is generated; the conversation changes once the answer is whole."""
        return self._ask_stream(self._position_of(question), text, options)

    async def num_tokens(self) -> int:
        """How many tokens of a prompt the turns take, counted by the service."""
        return self._prompt_tokens(await self._text_lengths())

    async def truncate(self, max_tokens: int) -> int:
        """The fewest oldest exchanges are gone that leave at most `max_tokens`; how many messages those were.

        The system text stays, even where it alone is longer.
        """
        return self._drop_oldest(await self._text_lengths(), max_tokens)

    async def _ask(self, num_kept: int, text: str, options: ChatOptions) -> Completion:
        messages, keep = self._question(num_kept, text)
        completion = await self._client.chat(messages, **self._with_defaults(options))
        keep(completion)
        return completion

    def _ask_stream(self, num_kept: int, text: str, options: ChatOptions) -> AsyncCompletionStream:
        messages, keep = self._question(num_kept, text)
        return self._client.stream(messages, on_finished=keep, **self._with_defaults(options))

    async def _text_lengths(self) -> list[int]:
        ids = await self._client.tokenize(*self._texts(), model=self._options.get("model", ""))
        return list(map(len, ids))


def _parse_saved(saved: str) -> tuple[list[MessageLike], ChatOptions]:
    """Messages and options of a saved conversation.

    Raises:
        ValueError: it is no saved conversation, or one of a newer form.
    """
    try:
        content: Any = json.loads(saved)  # Checked right below.
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        if content["version"] != _VERSION:
            raise ValueError(f"it has version {content['version']!r} of the format; this client knows {_VERSION}")
        if not isinstance(content["options"], dict):
            raise ValueError("its options are no object")
        options = cast(ChatOptions, content["options"])
        if "logit_bias" in options:
            # The keys of a JSON object are strings.
            options["logit_bias"] = {int(token_id): bias for token_id, bias in dict(options["logit_bias"]).items()}
        messages: list[MessageLike] = [message_from(each) for each in content["messages"]]
        submit_request(messages, None, None, options)  # Raises for what no request can carry.
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no saved conversation: {error}") from error
    return messages, options
