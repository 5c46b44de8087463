"""The asyncio shell. `AsyncClient` and `Client` have the same calls; what both know lives in the modules beside."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from oasst.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, scoring_pb2_grpc

from oasst_client import _score as scoring
from oasst_client import _wire as wire
from oasst_client._accumulate import Accumulator
from oasst_client._channel import Tls, call_metadata, channel_credentials, channel_options, target_of, traced
from oasst_client._continuation import Continuation, EventRequest, ends_with_its_caller
from oasst_client._errors import APIError, RequestCancelledError, client_closed, error_from_call, stream_closed
from oasst_client._retry import DEFAULT_RETRY, LEAVE_TIMEOUT_S, Attempts, RetryPolicy, delay_before_retry
from oasst_client._types import (
    Accepted,
    ChatOptions,
    ChatSnapshot,
    ChatState,
    Completion,
    Delta,
    Event,
    ItemScore,
    Load,
    MessageLike,
    Model,
    ScoreItem,
    ScoreItemLike,
    Token,
)

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

    A connection that is lost is made again, to whichever address answers, and the stream goes on with the next token.
    So it does when it is read again after a read that was cancelled, as `asyncio.timeout` does, if the server still has
    the request.
    """

    def __init__(
        self,
        continuation: Continuation,
        start_call: Callable[[EventRequest, float | None], _EventCall],
        cancel_request: Callable[[str], Awaitable[None]],
        client_is_closed: asyncio.Event,
    ) -> None:
        self._continuation = continuation
        self._start_call = start_call
        self._cancel_request = cancel_request
        self._client_is_closed = client_is_closed
        self._closed = asyncio.Event()
        # Whether the last call has ended and the next one has not begun: their reader was cancelled.
        self._is_between_calls = False
        self._call = start_call(continuation.next_call, continuation.attempts.remaining_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

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
        if self._continuation.error:
            raise self._continuation.error
        if self._is_between_calls:
            self._take_up()
        while not self._continuation.is_over:
            try:
                async for message in self._call:
                    if event := self._continuation.add(message):
                        yield event
                self._accumulator.end()
            except grpc.aio.AioRpcError as error:
                await self._recover(error_from_call(error, request_id=self.request_id), error)
            except APIError as error:
                await self._recover(error, error)
            except asyncio.CancelledError:
                if not self._is_closed or _is_our_task_cancelled():
                    self._is_between_calls = True  # gRPC ends a call whose reader is cancelled.
                    raise
                raise stream_closed(self.request_id) from None

    async def tokens(self) -> AsyncIterator[Token]:
        """The first choice's tokens one by one, end-of-text included."""
        async for event in self.events():
            if isinstance(event, Delta) and event.choice == 0:
                for token in event.tokens:
                    yield token

    async def completion(self) -> Completion:
        """The whole completion, after reading what is left of the stream."""
        async for _ in self.events():
            pass
        return self._accumulator.end()

    @property
    def request_id(self) -> str:
        """The request's id: with the resume token of its `accepted` event, it can be watched from elsewhere."""
        return self._continuation.request_id

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._accumulator.text

    @property
    def num_resumes(self) -> int:
        """How often the stream was taken up again after its connection, or its request, was lost."""
        return self._continuation.num_resumes

    async def close(self) -> None:
        """Ends the call. One's own request is cancelled if it has not ended, unless it has a `detach_grace_s`."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._call.cancel()
        if not self._continuation.is_over and self._continuation.ends_with_its_caller:
            await self._cancel_request(self.request_id)

    @property
    def _accumulator(self) -> Accumulator:
        return self._continuation.accumulator

    @property
    def _is_closed(self) -> bool:
        return self._closed.is_set() or self._client_is_closed.is_set()

    def _take_up(self) -> None:
        """The next call has begun, after a reader was cancelled."""
        if self._is_closed:
            raise stream_closed(self.request_id)
        self._continuation.take_up()
        self._begin_next_call()

    async def _recover(self, error: APIError, cause: Exception) -> None:
        """The next call has begun; raises the error if there is none."""
        self._call.cancel()
        self._is_between_calls = True
        if not self._is_closed:
            try:
                delay_s = self._continuation.recover(error)
            except APIError as final:
                if final is cause:
                    raise
                raise final from cause
            await _wait_for_any(self._closed, self._client_is_closed, timeout_s=delay_s)
        if self._is_closed:
            raise stream_closed(self.request_id) from cause
        self._begin_next_call()

    def _begin_next_call(self) -> None:
        self._call = self._start_call(self._continuation.next_call, self._continuation.attempts.remaining_s)
        self._is_between_calls = False


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
        api_key: str | None = None,
        tls: Tls | bool | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        retry: RetryPolicy = DEFAULT_RETRY,
        query_timeout_s: float = 10.0,
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        # Outside of a loop gRPC would bind the channel to one that never runs; this raises RuntimeError instead.
        asyncio.get_running_loop()
        target, all_options = target_of(address), channel_options(tls, options)
        self._metadata = call_metadata(address, tls, api_key, metadata)
        credentials = channel_credentials(tls)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, all_options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, all_options)
        self._closed = asyncio.Event()
        self._retry = retry
        self._query_timeout_s = query_timeout_s
        # Any: generated code has no types.
        self._chat: Any = chat_pb2_grpc.ChatServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._model: Any = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._scoring: Any = scoring_pb2_grpc.ScoringServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls in progress end with RequestCancelledError."""
        self._closed.set()
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
        try:
            response = await self._call_again(self._chat.Chat, request, options.get("timeout_s"), request.request_id)
        except asyncio.CancelledError:
            if ends_with_its_caller(request):
                await self._cancel_quietly(request.request_id)
            raise
        return wire.completion_from(response)

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
        return self._stream(request, Accumulator(request.request_id, on_finished), options.get("timeout_s"))

    async def submit(
        self,
        messages: str | Iterable[MessageLike] | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Accepted:
        """The request is in the queue and runs with nobody watching. Arguments and errors as for `Client.submit`."""
        request = wire.submit_request(messages, prompt, token_ids, options)
        response = await self._call_again(self._chat.SubmitChat, request, self._query_timeout_s, request.request_id)
        return wire.accepted_from(response.accepted)

    def watch(
        self,
        request_id: str,
        resume_token: str,
        *,
        timeout_s: float | None = None,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> AsyncCompletionStream:
        """A request that was accepted before, from its first token on. Leaving early leaves it running.

        Raises:
            NotFoundError: when read, if there is no such request, or the token is not its own.
        """
        request = wire.watch_request(request_id, resume_token)
        return self._stream(request, Accumulator(request_id, on_finished), timeout_s)

    async def get(self, request_id: str, resume_token: str) -> ChatSnapshot:
        """Where a request is in its life, and what it has generated so far.

        Raises:
            NotFoundError: there is no such request, or the token is not its own.
        """
        request = wire.get_request(request_id, resume_token)
        response = await self._call_again(self._chat.GetChat, request, self._query_timeout_s, request_id)
        return wire.snapshot_from(response, request_id)

    async def cancel(self, request_id: str, *, resume_token: str = "") -> ChatState:
        """The request has ended, and this is how; cancelling one that had ended before changes nothing.

        Raises:
            NotFoundError: there is no such request.
        """
        request = wire.cancel_request(request_id, resume_token)
        response = await self._call_again(self._chat.CancelChat, request, self._query_timeout_s, request_id)
        return wire.state_from(response.state)

    async def score(
        self,
        items: Iterable[ScoreItemLike],
        *,
        model: str = "",
        token_logprobs: bool = False,
        timeout_s: float | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> tuple[ItemScore, ...]:
        """How likely each continuation is after its context. Arguments and errors as for `Client.score`."""
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        parts = scoring.split_requests(
            await self._score_items(list(items), model, deadline_s), model=model, token_logprobs=token_logprobs
        )
        slots = asyncio.Semaphore(scoring.REQUESTS_AT_ONCE)
        num_scored = 0

        async def score(part: scoring.ScorePart) -> list[ItemScore]:
            nonlocal num_scored
            async with slots:
                remaining_s = max(0.0, deadline_s - time.monotonic())
                request_id = part.request.request_id
                try:
                    with scoring.told_of_all_items(part):
                        response = await self._call_again(self._scoring.Score, part.request, remaining_s, request_id)
                except asyncio.CancelledError:
                    await self._cancel_quietly(request_id)
                    raise
            scores = scoring.scores_from(response, part.request)
            num_scored += len(scores)
            if on_progress:
                on_progress(num_scored)
            return scores

        under_way = [asyncio.ensure_future(score(part)) for part in parts]
        try:
            return tuple(each for scores in await asyncio.gather(*under_way) for each in scores)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def models(self) -> tuple[Model, ...]:
        """Every served model."""
        response = await self._query(self._model.ListModels, model_pb2.ListModelsRequest())
        return tuple(wire.model_from(each) for each in response.models)

    async def model(self, name: str = "") -> Model:
        """One served model; without a name the only one."""
        return await self._get_model(name)

    async def tokenize(
        self, *texts: str, model: str = "", parse_control_tokens: bool = False
    ) -> tuple[tuple[int, ...], ...]:
        """The token ids of each text. Any number of texts, as for `Client.tokenize`."""
        return await self._tokenize(texts, model, parse_control_tokens)

    async def detokenize(
        self, *sequences: Sequence[int], model: str = "", skip_control_tokens: bool = False
    ) -> tuple[str, ...]:
        """The text of each sequence of token ids. Any number of sequences: they travel in several requests."""
        requests = wire.detokenize_requests(sequences, model, skip_control_tokens)
        responses = [await self._query(self._model.Detokenize, request) for request in requests]
        return tuple(text for response in responses for text in response.texts)

    async def load(self, model: str = "") -> Load:
        """How much waits and runs now, and on which workers."""
        return wire.load_from(await self._query(self._model.GetLoad, model_pb2.GetLoadRequest(model=model)))

    async def _get_model(self, name: str, deadline_s: float = math.inf) -> Model:
        request = model_pb2.GetModelRequest(name=name)
        return wire.model_from((await self._query(self._model.GetModel, request, deadline_s)).model)

    async def _tokenize(
        self, texts: Sequence[str], model: str, parse_control_tokens: bool = False, deadline_s: float = math.inf
    ) -> tuple[tuple[int, ...], ...]:
        requests = wire.tokenize_requests(texts, model, parse_control_tokens)
        responses = [await self._query(self._model.Tokenize, request, deadline_s) for request in requests]
        return tuple(tuple(each.ids) for response in responses for each in response.sequences)

    async def _score_items(self, items: list[ScoreItemLike], model: str, deadline_s: float) -> list[ScoreItem]:
        """The items as token ids; the server tokenizes texts."""
        pairs = scoring.split_pairs(items)
        texts = scoring.texts_of(pairs)
        ids = await self._tokenize(texts, model, deadline_s=deadline_s)
        has_empty_context = any(not pair.context for pair in pairs)
        end_of_text = (await self._get_model(model, deadline_s)).control_tokens.end_of_text if has_empty_context else 0
        return scoring.token_items(items, pairs, dict(zip(texts, ids, strict=True)), end_of_text=end_of_text)

    async def _query(self, method: Callable[..., Any], request: ProtoMessage, deadline_s: float = math.inf) -> Any:
        remaining_s = max(0.0, deadline_s - time.monotonic())
        return await self._call_again(method, request, min(self._query_timeout_s, remaining_s))

    async def _call_again(
        self, method: Callable[..., Any], request: ProtoMessage, timeout_s: float | None, request_id: str = ""
    ) -> Any:  # The generated stubs carry no types.
        """The answer, asked for again after errors that may pass."""
        attempts = Attempts(self._retry, timeout_s=timeout_s)
        while True:
            try:
                with self._told_if_closed(request_id):
                    return await method(request, timeout=attempts.remaining_s, metadata=traced(self._metadata))
            except grpc.aio.AioRpcError as error:
                delay_s = delay_before_retry(attempts, error_from_call(error, request_id=request_id), cause=error)
            await _wait_for_any(self._closed, timeout_s=delay_s)

    @contextmanager
    def _told_if_closed(self, request_id: str) -> Generator[None]:
        """What goes wrong inside because the client was closed is told as that."""
        try:
            yield
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            if self._closed.is_set() and not _is_our_task_cancelled():
                raise client_closed(request_id) from error
            raise

    def _stream(
        self, request: EventRequest, accumulator: Accumulator, timeout_s: float | None
    ) -> AsyncCompletionStream:
        def start_call(request: EventRequest, timeout_s: float | None) -> _EventCall:
            is_new = isinstance(request, chat_pb2.ChatRequest)
            method = self._chat.ChatStream if is_new else self._chat.WatchChat
            with self._told_if_closed(request.request_id):
                call: _EventCall = method(request, timeout=timeout_s, metadata=traced(self._metadata))
            return call

        attempts = Attempts(self._retry, timeout_s=timeout_s)
        continuation = Continuation(request, accumulator, attempts)
        return AsyncCompletionStream(continuation, start_call, self._cancel_quietly, self._closed)

    async def _cancel_quietly(self, request_id: str) -> None:
        """The request is cancelled, if the server can be told at once; else it ends after its grace."""
        closed = (grpc.aio.UsageError, RequestCancelledError)
        with suppress(grpc.aio.AioRpcError, *closed), self._told_if_closed(request_id):
            await self._chat.CancelChat(
                wire.cancel_request(request_id, ""), timeout=LEAVE_TIMEOUT_S, metadata=traced(self._metadata)
            )


def _is_our_task_cancelled() -> bool:
    """Whether somebody cancels this task; gRPC says the same where a call is closed under whoever awaits it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _wait_for_any(*events: asyncio.Event, timeout_s: float) -> None:
    """One of the events is set, or the time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
