"""The asyncio shell. `AsyncClient` and `Client` have the same calls; what both know lives in the modules beside."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from oasst.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc

from oasst_client import _wire as wire
from oasst_client._accumulate import Accumulator
from oasst_client._channel import channel_options, target_of
from oasst_client._errors import RequestCancelledError, error_from_call
from oasst_client._types import ChatOptions, ChatState, Completion, Delta, Event, Load, MessageLike, Model

__all__ = ["AsyncClient", "AsyncCompletionStream"]


class _EventCall(Protocol):
    """What a stream needs of a gRPC call."""

    def __aiter__(self) -> AsyncIterator[chat_pb2.ChatEvent]: ...
    def cancel(self) -> object: ...


class AsyncCompletionStream:
    """A completion as it is generated. Iterating gives the first choice's text, piece by piece.

    Leaving the context before the end cancels the request:

        async with client.stream("What is a meme?") as stream:
            async for text in stream:
                print(text, end="")
    """

    def __init__(self, call: _EventCall, request_id: str, accumulator: Accumulator) -> None:
        self.request_id = request_id
        self._call = call
        self._accumulator = accumulator
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.events():
            if isinstance(event, Delta) and event.choice == 0 and event.text:
                yield event.text

    async def events(self) -> AsyncIterator[Event]:
        """Everything the server tells, of all choices, as typed events.

        Raises:
            APIError: the request failed, or was cancelled.
            ProtocolError: the stream has a gap, a repeat or no end.
        """
        if self._accumulator.completion:
            return
        try:
            async for message in self._call:
                if event := self._accumulator.add(message):
                    yield event
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, request_id=self.request_id) from error
        except asyncio.CancelledError:
            # gRPC says this both when our task is cancelled and when the call was closed under its reader.
            if not self._is_closed:
                raise
            raise RequestCancelledError(
                "the stream was closed", code=grpc.StatusCode.CANCELLED.name, request_id=self.request_id
            ) from None
        self._accumulator.end()

    async def completion(self) -> Completion:
        """The whole completion, after reading what is left of the stream."""
        async for _ in self.events():
            pass
        return self._accumulator.end()

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._accumulator.text

    def close(self) -> None:
        """Ends the call; a request that has not finished is cancelled."""
        self._is_closed = True
        self._call.cancel()


class AsyncClient:
    """A connection to the service, for one event loop; made inside a coroutine.

        async with AsyncClient("127.0.0.1:50051") as client:
            print((await client.chat("What is a meme?")).text)

    Arguments are those of `Client`.
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
        # Outside of a loop gRPC would bind the channel to one that never runs; this raises RuntimeError instead.
        asyncio.get_running_loop()
        target, all_options = target_of(address), channel_options(options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, all_options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, all_options)
        self._metadata = tuple(metadata)
        self._query_timeout_s = query_timeout_s
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        await self._channel.close()

    async def chat(
        self,
        messages: str | Iterable[MessageLike] | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """The assistant's next turn, whole. Arguments and errors as for `Client.chat`."""
        request = wire.chat_request(messages, prompt, token_ids, options)
        return wire.completion_from(
            await self._call(self._chat.Chat, request, options.get("timeout_s"), request_id=request.request_id)
        )

    def stream(
        self,
        messages: str | Iterable[MessageLike] | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        on_finished: Callable[[Completion], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncCompletionStream:
        """The assistant's next turn as it is generated. Arguments and errors as for `Client.stream`."""
        request = wire.chat_request(messages, prompt, token_ids, options)
        call = self._chat.ChatStream(request, timeout=options.get("timeout_s"), metadata=self._metadata)
        return AsyncCompletionStream(call, request.request_id, Accumulator(request.request_id, on_finished))

    async def cancel(self, request_id: str, *, resume_token: str = "") -> ChatState:
        """The request has ended, and this is how; cancelling one that had ended before changes nothing.

        Raises:
            NotFoundError: there is no such request.
        """
        request = wire.cancel_request(request_id, resume_token)
        response = await self._call(self._chat.CancelChat, request, self._query_timeout_s, request_id=request_id)
        return wire.state_from(response.state)

    async def models(self) -> tuple[Model, ...]:
        """Every served model."""
        response = await self._query(self._model.ListModels, model_pb2.ListModelsRequest())
        return tuple(wire.model_from(each) for each in response.models)

    async def model(self, name: str = "") -> Model:
        """One served model; without a name the only one."""
        return wire.model_from((await self._query(self._model.GetModel, model_pb2.GetModelRequest(name=name))).model)

    async def tokenize(
        self, *texts: str, model: str = "", parse_control_tokens: bool = False
    ) -> tuple[tuple[int, ...], ...]:
        """The token ids of each text."""
        request = wire.tokenize_request(texts, model, parse_control_tokens)
        return tuple(tuple(each.ids) for each in (await self._query(self._model.Tokenize, request)).sequences)

    async def detokenize(
        self, *sequences: Sequence[int], model: str = "", skip_control_tokens: bool = False
    ) -> tuple[str, ...]:
        """The text of each sequence of token ids."""
        request = wire.detokenize_request(sequences, model, skip_control_tokens)
        return tuple((await self._query(self._model.Detokenize, request)).texts)

    async def load(self, model: str = "") -> Load:
        """How much waits and runs now, and on which workers."""
        return wire.load_from(await self._query(self._model.GetLoad, model_pb2.GetLoadRequest(model=model)))

    async def _query(self, method: Callable[..., Any], request: ProtoMessage) -> Any:
        return await self._call(method, request, self._query_timeout_s)

    async def _call(
        self, method: Callable[..., Any], request: ProtoMessage, timeout_s: float | None, *, request_id: str = ""
    ) -> Any:  # The generated stubs carry no types.
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, request_id=request_id) from error
