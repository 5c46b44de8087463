"""Conversations that remember: a history, and one thin shell for each client."""

from collections.abc import Callable, Iterable
from typing import Unpack

from oasst_client._async_client import AsyncClient, AsyncCompletionStream
from oasst_client._client import Client, CompletionStream
from oasst_client._types import ChatOptions, Completion, Message, MessageLike, Role
from oasst_client._wire import message_from

__all__ = ["AsyncConversation", "Conversation"]


class _History:
    """The turns so far. Grows only by whole exchanges, so a failed or abandoned answer leaves it as it was."""

    def __init__(self, messages: Iterable[MessageLike], system: str, options: ChatOptions) -> None:
        self._messages = [Message(Role.SYSTEM, system)] if system else []
        self._messages += [message_from(each) for each in messages]
        self._options = options

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far."""
        return tuple(self._messages)

    def _with_question(self, text: str) -> tuple[Message, ...]:
        return (*self._messages, Message(Role.USER, text))

    def _with_defaults(self, options: ChatOptions) -> ChatOptions:
        return {**self._options, **options}

    def _remember(self, question: str) -> Callable[[Completion], None]:
        def add_exchange(completion: Completion) -> None:
            self._messages += [Message(Role.USER, question), Message(Role.ASSISTANT, completion.text)]

        return add_exchange


class Conversation(_History):
    """A chat whose every question is asked with the turns before it.

    >>> conversation = Conversation(client, temperature=0)
    >>> conversation.ask("What is a meme?").text
    'An idea that spreads.'
    >>> [str(message.role) for message in conversation.messages]
    ['user', 'assistant']

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

    def ask(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """The answer; question and answer are now part of the conversation."""
        completion = self._client.chat(self._with_question(text), **self._with_defaults(options))
        self._remember(text)(completion)
        return completion

    def ask_stream(self, text: str, **options: Unpack[ChatOptions]) -> CompletionStream:
        """The answer as it is generated; once it is whole, question and answer are part of the conversation."""
        return self._client.stream(
            self._with_question(text), on_finished=self._remember(text), **self._with_defaults(options)
        )


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

    async def ask(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """The answer; question and answer are now part of the conversation."""
        completion = await self._client.chat(self._with_question(text), **self._with_defaults(options))
        self._remember(text)(completion)
        return completion

    def ask_stream(self, text: str, **options: Unpack[ChatOptions]) -> AsyncCompletionStream:
        """The answer as it is generated; once it is whole, question and answer are part of the conversation."""
        return self._client.stream(
            self._with_question(text), on_finished=self._remember(text), **self._with_defaults(options)
        )
