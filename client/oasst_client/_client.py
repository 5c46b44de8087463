"""The synchronous shell: one thread, blocking calls."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import grpc
from google.protobuf.message import Message as ProtoMessage
from oasst.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc

from oasst_client import _wire as wire
from oasst_client._accumulate import Accumulator
from oasst_client._channel import channel_options, target_of
from oasst_client._errors import error_from_call
from oasst_client._types import ChatOptions, ChatState, Completion, Delta, Event, Load, MessageLike, Model

__all__ = ["Client", "CompletionStream"]


class _EventCall(Protocol):
    """What a stream needs of a gRPC call."""

    def __iter__(self) -> Iterator[chat_pb2.ChatEvent]: ...
    def cancel(self) -> object: ...


class CompletionStream:
    """A completion as it is generated. Iterating gives the first choice's text, piece by piece.

    Leaving the context before the end cancels the request:

    >>> with client.stream("What is a meme?") as stream:
    ...     for text in stream:
    ...         print(text, end="")
    An idea that spreads.
    >>> stream.completion().finish_reason
    <FinishReason.END_OF_TEXT: 'end_of_text'>
    """

    def __init__(self, call: _EventCall, request_id: str, accumulator: Accumulator) -> None:
        self.request_id = request_id
        self._call = call
        self._accumulator = accumulator

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if isinstance(event, Delta) and event.choice == 0 and event.text:
                yield event.text

    def events(self) -> Iterator[Event]:
        """Everything the server tells, of all choices, as typed events.

        Raises:
            APIError: the request failed, or was cancelled.
            ProtocolError: the stream has a gap, a repeat or no end.
        """
        if self._accumulator.completion:
            return
        try:
            for message in self._call:
                if event := self._accumulator.add(message):
                    yield event
        except grpc.RpcError as error:
            raise error_from_call(error, request_id=self.request_id) from error
        self._accumulator.end()

    def completion(self) -> Completion:
        """The whole completion, after reading what is left of the stream."""
        for _ in self.events():
            pass
        return self._accumulator.end()

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._accumulator.text

    def close(self) -> None:
        """Ends the call; a request that has not finished is cancelled."""
        self._call.cancel()


class Client:
    """A connection to the service, safe to share between threads.

    >>> client.chat("What is a meme?", temperature=0).text
    'An idea that spreads.'

    Args:
        address: `host:port`, several of them parted by commas, or any gRPC target.
        credentials: for TLS, from `grpc.ssl_channel_credentials()`; without them the connection is plain.
        metadata: sent with every call, for example an authorization header.
        query_timeout_s: how long calls that generate nothing may take.
        options: gRPC channel options on top of this package's own.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        query_timeout_s: float = 10.0,
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        target, all_options = target_of(address), channel_options(options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, all_options)
        else:
            self._channel = grpc.secure_channel(target, credentials, all_options)
        self._metadata = tuple(metadata)
        self._query_timeout_s = query_timeout_s
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        self._channel.close()

    def chat(
        self,
        messages: str | Iterable[MessageLike] | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """The assistant's next turn, whole.

        Args:
            messages: what a person said, or the turns of a conversation, the person's last.
            prompt: instead, a prompt already in the OASST format.
            token_ids: instead, a prompt as token ids.
            options: see `ChatOptions`.

        Raises:
            APIError: the request was refused or failed.
            TypeError, ValueError: the arguments make no request.

        >>> client.chat([("user", "Hi"), ("assistant", "Hello!"), ("user", "What is a meme?")]).text
        'An idea that spreads.'
        """
        request = wire.chat_request(messages, prompt, token_ids, options)
        return wire.completion_from(
            self._call(self._chat.Chat, request, options.get("timeout_s"), request_id=request.request_id)
        )

    def stream(
        self,
        messages: str | Iterable[MessageLike] | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        on_finished: Callable[[Completion], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> CompletionStream:
        """The assistant's next turn as it is generated; arguments as for `chat`.

        `on_finished` is called with the whole completion if the request runs to its end.
        """
        request = wire.chat_request(messages, prompt, token_ids, options)
        call = self._chat.ChatStream(request, timeout=options.get("timeout_s"), metadata=self._metadata)
        return CompletionStream(call, request.request_id, Accumulator(request.request_id, on_finished))

    def cancel(self, request_id: str, *, resume_token: str = "") -> ChatState:
        """The request has ended, and this is how; cancelling one that had ended before changes nothing.

        Raises:
            NotFoundError: there is no such request.
        """
        request = wire.cancel_request(request_id, resume_token)
        response = self._call(self._chat.CancelChat, request, self._query_timeout_s, request_id=request_id)
        return wire.state_from(response.state)

    def models(self) -> tuple[Model, ...]:
        """Every served model."""
        response = self._query(self._model.ListModels, model_pb2.ListModelsRequest())
        return tuple(wire.model_from(each) for each in response.models)

    def model(self, name: str = "") -> Model:
        """One served model; without a name the only one."""
        return wire.model_from(self._query(self._model.GetModel, model_pb2.GetModelRequest(name=name)).model)

    def tokenize(self, *texts: str, model: str = "", parse_control_tokens: bool = False) -> tuple[tuple[int, ...], ...]:
        """The token ids of each text.

        >>> client.tokenize("Hi", "you")
        ((72, 105), (121, 111, 117))
        """
        request = wire.tokenize_request(texts, model, parse_control_tokens)
        return tuple(tuple(each.ids) for each in self._query(self._model.Tokenize, request).sequences)

    def detokenize(
        self, *sequences: Sequence[int], model: str = "", skip_control_tokens: bool = False
    ) -> tuple[str, ...]:
        """The text of each sequence of token ids.

        >>> client.detokenize([72, 105])
        ('Hi',)
        """
        request = wire.detokenize_request(sequences, model, skip_control_tokens)
        return tuple(self._query(self._model.Detokenize, request).texts)

    def load(self, model: str = "") -> Load:
        """How much waits and runs now, and on which workers."""
        return wire.load_from(self._query(self._model.GetLoad, model_pb2.GetLoadRequest(model=model)))

    def _query(self, method: Callable[..., Any], request: ProtoMessage) -> Any:
        return self._call(method, request, self._query_timeout_s)

    def _call(
        self, method: Callable[..., Any], request: ProtoMessage, timeout_s: float | None, *, request_id: str = ""
    ) -> Any:  # The generated stubs carry no types.
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_call(error, request_id=request_id) from error
