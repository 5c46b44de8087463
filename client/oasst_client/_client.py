"""The synchronous shell: one thread, blocking calls."""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import grpc
from google.protobuf.message import Message as ProtoMessage
from oasst.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, scoring_pb2, scoring_pb2_grpc

from oasst_client import _score as scoring
from oasst_client import _wire as wire
from oasst_client._accumulate import Accumulator
from oasst_client._channel import Tls, call_metadata, channel_credentials, channel_options, target_of, traced
from oasst_client._continuation import Continuation, EventRequest, ends_with_its_caller
from oasst_client._errors import (
    APIError,
    RequestCancelledError,
    client_closed,
    error_from_call,
    request_given_up,
    stream_closed,
)
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

    A connection that is lost is made again, to whichever address answers, and the stream goes on with the next token.

    A signal handler that raises while the stream is read, as that of Ctrl-C does, may leave gRPC's locks held: to go on
    with the client, or to close it, have the handler `close` the stream from another thread instead.
    """

    def __init__(
        self,
        continuation: Continuation,
        start_call: Callable[[EventRequest, float | None], _EventCall],
        cancel_request: Callable[[str], None],
        client_is_closed: threading.Event,
        next_attempts: threading.Condition,
    ) -> None:
        self._continuation = continuation
        self._start_call = start_call
        self._cancel_request = cancel_request
        self._client_is_closed = client_is_closed
        # The client's own: notified of what ends the wait for the next call.
        self._next_attempts = next_attempts
        self._closed = threading.Event()
        self._call = start_call(continuation.next_call, continuation.attempts.remaining_s)

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
        if self._continuation.error:
            raise self._continuation.error
        while not self._continuation.is_over:
            try:
                for message in self._call:
                    if event := self._continuation.add(message):
                        yield event
                self._accumulator.end()
            except grpc.RpcError as error:
                self._recover(error_from_call(error, request_id=self.request_id), error)
            except APIError as error:
                self._recover(error, error)

    def tokens(self) -> Iterator[Token]:
        """The first choice's tokens one by one, end-of-text included."""
        for event in self.events():
            if isinstance(event, Delta) and event.choice == 0:
                yield from event.tokens

    def completion(self) -> Completion:
        """The whole completion, after reading what is left of the stream."""
        for _ in self.events():
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

    def close(self) -> None:
        """Ends the call. One's own request is cancelled if it has not ended, unless it has a `detach_grace_s`."""
        if self._closed.is_set():
            return
        with self._next_attempts:
            self._closed.set()
            self._next_attempts.notify_all()
        self._call.cancel()
        if not self._continuation.is_over and self._continuation.ends_with_its_caller:
            self._cancel_request(self.request_id)

    @property
    def _accumulator(self) -> Accumulator:
        return self._continuation.accumulator

    @property
    def _is_closed(self) -> bool:
        return self._closed.is_set() or self._client_is_closed.is_set()

    def _recover(self, error: APIError, cause: Exception) -> None:
        """The next call has begun; raises the error if there is none."""
        self._call.cancel()
        if not self._is_closed:
            try:
                delay_s = self._continuation.recover(error)
            except APIError as final:
                if final is cause:
                    raise
                raise final from cause
            with self._next_attempts:
                self._next_attempts.wait_for(lambda: self._is_closed, delay_s)
        if not self._is_closed:
            self._call = self._start_call(self._continuation.next_call, self._continuation.attempts.remaining_s)
        if self._is_closed:  # Perhaps by another thread, which knew of the call before this one only.
            self._call.cancel()
            raise stream_closed(self.request_id) from cause


class _EndingMethod:
    """A method of a service whose calls, made by several threads, all end once they are given up."""

    # Any: generated code has no types.
    def __init__(self, method: Any, given_up: threading.Event) -> None:
        self._method = method
        self._given_up = given_up
        self._lock = threading.Lock()
        self._under_way: set[grpc.Future[Any]] = set()

    def __call__(self, request: scoring_pb2.ScoreRequest, **options: Any) -> Any:
        """The answer. Raises what the method raises, and RequestCancelledError once it is given up."""
        call: grpc.Future[Any] = self._method.future(request, **options)
        with self._lock:
            self._under_way.add(call)
        if self._given_up.is_set():  # Before `end_calls` could know of this one.
            call.cancel()
        try:
            return call.result()
        except grpc.FutureCancelledError:
            raise request_given_up(request.request_id) from None
        finally:
            with self._lock:
                self._under_way.discard(call)

    def end_calls(self) -> None:
        """All calls end, after they were given up."""
        with self._lock:
            under_way = list(self._under_way)
        for call in under_way:
            call.cancel()


class Client:
    """A connection to the service, safe to share between threads.

    >>> client.chat("What is a meme?", temperature=0).text
    'An idea that spreads.'

    Args:
        address: `host:port`, several `ip:port` separated by commas, or any gRPC target.
        api_key: proves who is calling. Over a plain connection it is sent to this machine only, unless `tls` is False.
        tls: True, or a `Tls` with files of one's own; without it the connection is plain.
        metadata: sent with every call.
        retry: how to go on after errors that may pass.
        query_timeout_s: how long calls that generate nothing may take, retries included.
        options: gRPC channel options on top of this package's own.
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
        target, all_options = target_of(address), channel_options(tls, options)
        self._metadata = call_metadata(address, tls, api_key, metadata)
        credentials = channel_credentials(tls)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, all_options)
        else:
            self._channel = grpc.secure_channel(target, credentials, all_options)
        self._closed = threading.Event()
        # Calls wait on it for their next attempt, and are notified of what ends the wait.
        self._next_attempts = threading.Condition()
        self._retry = retry
        self._query_timeout_s = query_timeout_s
        # Any: generated code has no types.
        self._chat: Any = chat_pb2_grpc.ChatServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._model: Any = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._scoring: Any = scoring_pb2_grpc.ScoringServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress end with RequestCancelledError."""
        self._end_calls(self._closed)
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
        try:
            response = self._call_again(self._chat.Chat, request, options.get("timeout_s"), request.request_id)
        except KeyboardInterrupt:
            if ends_with_its_caller(request):
                self._cancel_quietly(request.request_id)
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
    ) -> CompletionStream:
        """The assistant's next turn as it is generated; arguments as for `chat`.

        `on_finished` is called with the whole completion if the request runs to its end.
        """
        request = wire.chat_request(messages, prompt, token_ids, options)
        return self._stream(request, Accumulator(request.request_id, on_finished), options.get("timeout_s"))

    def submit(
        self,
        messages: str | Iterable[MessageLike] | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Accepted:
        """The request is in the queue and runs with nobody watching; arguments as for `chat`.

        `timeout_s` is for the request itself. Its id and resume token give it back, from anywhere:

        >>> accepted = client.submit("What is a meme?")
        >>> client.watch(accepted.request_id, accepted.resume_token).completion().text
        'An idea that spreads.'
        """
        request = wire.submit_request(messages, prompt, token_ids, options)
        response = self._call_again(self._chat.SubmitChat, request, self._query_timeout_s, request.request_id)
        return wire.accepted_from(response.accepted)

    def watch(
        self,
        request_id: str,
        resume_token: str,
        *,
        timeout_s: float | None = None,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> CompletionStream:
        """A request that was accepted before, from its first token on. Leaving early leaves it running.

        Raises:
            NotFoundError: when read, if there is no such request, or the token is not its own.
        """
        request = wire.watch_request(request_id, resume_token)
        return self._stream(request, Accumulator(request_id, on_finished), timeout_s)

    def get(self, request_id: str, resume_token: str) -> ChatSnapshot:
        """Where a request is in its life, and what it has generated so far.

        Raises:
            NotFoundError: there is no such request, or the token is not its own.

        >>> accepted = client.submit("What is a meme?")
        >>> client.get(accepted.request_id, accepted.resume_token).state
        <ChatState.FINISHED: 'finished'>
        """
        request = wire.get_request(request_id, resume_token)
        response = self._call_again(self._chat.GetChat, request, self._query_timeout_s, request_id)
        return wire.snapshot_from(response, request_id)

    def cancel(self, request_id: str, *, resume_token: str = "") -> ChatState:
        """The request has ended, and this is how; cancelling one that had ended before changes nothing.

        Raises:
            NotFoundError: there is no such request.
        """
        request = wire.cancel_request(request_id, resume_token)
        response = self._call_again(self._chat.CancelChat, request, self._query_timeout_s, request_id)
        return wire.state_from(response.state)

    def score(
        self,
        items: Iterable[ScoreItemLike],
        *,
        model: str = "",
        token_logprobs: bool = False,
        timeout_s: float | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> tuple[ItemScore, ...]:
        """How likely each continuation is after its context, in the order of the items.

        Any number of items: they travel in several requests, some of them at once. Items that share a context are
        computed together if they stand together. Scoring waits behind all chats.

        Args:
            items: token ids and how many of them are context, or the texts (context, continuation).
            model: the model's name as `models()` tells it; left out, the server's only model.
            token_logprobs: also returns each token's log-probability.
            timeout_s: how long all of it may take, tokenizing and retries included.
            on_progress: called with the number of items scored so far, each time it has grown.

        Raises:
            APIError: a request was refused or failed; the others are cancelled then.
            TypeError, ValueError: the items make no request.

        >>> blue, green = client.score([("The sky is", " blue"), ("The sky is", " green")])
        >>> blue.logprob, blue.is_greedy
        (-1.0, False)
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        parts = scoring.split_requests(
            self._score_items(list(items), model, deadline_s), model=model, token_logprobs=token_logprobs
        )
        given_up = threading.Event()
        method = _EndingMethod(self._scoring.Score, given_up)

        def score(part: scoring.ScorePart) -> list[ItemScore]:
            remaining_s, request_id = max(0.0, deadline_s - time.monotonic()), part.request.request_id
            try:
                with scoring.told_of_all_items(part):
                    response = self._call_again(method, part.request, remaining_s, request_id, given_up=given_up)
            except RequestCancelledError:
                if given_up.is_set():
                    self._cancel_quietly(request_id)
                raise
            return scoring.scores_from(response, part.request)

        with ThreadPoolExecutor(scoring.REQUESTS_AT_ONCE, thread_name_prefix="score") as pool:
            under_way = [pool.submit(score, part) for part in parts]
            num_scored = 0
            try:
                for future in as_completed(under_way):
                    num_scored += len(future.result())
                    if on_progress:
                        on_progress(num_scored)
                return tuple(each for future in under_way for each in future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._end_calls(given_up)
                method.end_calls()
                raise

    def models(self) -> tuple[Model, ...]:
        """Every served model."""
        response = self._query(self._model.ListModels, model_pb2.ListModelsRequest())
        return tuple(wire.model_from(each) for each in response.models)

    def model(self, name: str = "") -> Model:
        """One served model; without a name the only one."""
        return self._get_model(name)

    def tokenize(self, *texts: str, model: str = "", parse_control_tokens: bool = False) -> tuple[tuple[int, ...], ...]:
        """The token ids of each text. Any number of texts: they travel in several requests.

        >>> client.tokenize("Hi", "you")
        ((72, 105), (121, 111, 117))
        """
        return self._tokenize(texts, model, parse_control_tokens)

    def detokenize(
        self, *sequences: Sequence[int], model: str = "", skip_control_tokens: bool = False
    ) -> tuple[str, ...]:
        """The text of each sequence of token ids. Any number of sequences: they travel in several requests.

        >>> client.detokenize([72, 105])
        ('Hi',)
        """
        requests = wire.detokenize_requests(sequences, model, skip_control_tokens)
        responses = (self._query(self._model.Detokenize, request) for request in requests)
        return tuple(text for response in responses for text in response.texts)

    def load(self, model: str = "") -> Load:
        """How much waits and runs now, and on which workers."""
        return wire.load_from(self._query(self._model.GetLoad, model_pb2.GetLoadRequest(model=model)))

    def _get_model(self, name: str, deadline_s: float = math.inf) -> Model:
        request = model_pb2.GetModelRequest(name=name)
        return wire.model_from(self._query(self._model.GetModel, request, deadline_s).model)

    def _tokenize(
        self, texts: Sequence[str], model: str, parse_control_tokens: bool = False, deadline_s: float = math.inf
    ) -> tuple[tuple[int, ...], ...]:
        requests = wire.tokenize_requests(texts, model, parse_control_tokens)
        responses = (self._query(self._model.Tokenize, request, deadline_s) for request in requests)
        return tuple(tuple(each.ids) for response in responses for each in response.sequences)

    def _score_items(self, items: list[ScoreItemLike], model: str, deadline_s: float) -> list[ScoreItem]:
        """The items as token ids; the server tokenizes texts."""
        pairs = scoring.split_pairs(items)
        texts = scoring.texts_of(pairs)
        ids = self._tokenize(texts, model, deadline_s=deadline_s)
        has_empty_context = any(not pair.context for pair in pairs)
        end_of_text = self._get_model(model, deadline_s).control_tokens.end_of_text if has_empty_context else 0
        return scoring.token_items(items, pairs, dict(zip(texts, ids, strict=True)), end_of_text=end_of_text)

    def _query(self, method: Callable[..., Any], request: ProtoMessage, deadline_s: float = math.inf) -> Any:
        remaining_s = max(0.0, deadline_s - time.monotonic())
        return self._call_again(method, request, min(self._query_timeout_s, remaining_s))

    def _call_again(
        self,
        method: Callable[..., Any],
        request: ProtoMessage,
        timeout_s: float | None,
        request_id: str = "",
        *,
        given_up: threading.Event | None = None,
    ) -> Any:  # The generated stubs carry no types.
        """The answer, asked for again after errors that may pass, until it is `given_up`."""
        end = given_up or threading.Event()
        attempts = Attempts(self._retry, timeout_s=timeout_s)
        while not end.is_set():
            try:
                with self._told_if_closed(request_id):
                    return method(request, timeout=attempts.remaining_s, metadata=traced(self._metadata))
            except grpc.RpcError as error:
                delay_s = delay_before_retry(attempts, error_from_call(error, request_id=request_id), cause=error)
            with self._next_attempts:
                self._next_attempts.wait_for(lambda: end.is_set() or self._closed.is_set(), delay_s)
        raise request_given_up(request_id)

    def _end_calls(self, end: threading.Event) -> None:
        """The event is set, and no call that it ends waits for its next attempt."""
        with self._next_attempts:
            end.set()
            self._next_attempts.notify_all()

    @contextmanager
    def _told_if_closed(self, request_id: str) -> Generator[None]:
        """What goes wrong inside because the client was closed is told as that."""
        try:
            yield
        except (grpc.RpcError, ValueError) as error:  # The second: gRPC's word for a channel that is closed.
            if self._closed.is_set():
                raise client_closed(request_id) from error
            raise

    def _stream(self, request: EventRequest, accumulator: Accumulator, timeout_s: float | None) -> CompletionStream:
        def start_call(request: EventRequest, timeout_s: float | None) -> _EventCall:
            is_new = isinstance(request, chat_pb2.ChatRequest)
            method = self._chat.ChatStream if is_new else self._chat.WatchChat
            with self._told_if_closed(request.request_id):
                call: _EventCall = method(request, timeout=timeout_s, metadata=traced(self._metadata))
            return call

        attempts = Attempts(self._retry, timeout_s=timeout_s)
        continuation = Continuation(request, accumulator, attempts)
        return CompletionStream(continuation, start_call, self._cancel_quietly, self._closed, self._next_attempts)

    def _cancel_quietly(self, request_id: str) -> None:
        """The request is cancelled, if the server can be told at once; else it ends after its grace."""
        with suppress(grpc.RpcError, ValueError):  # The second: the client was closed before.
            self._chat.CancelChat(
                wire.cancel_request(request_id, ""), timeout=LEAVE_TIMEOUT_S, metadata=traced(self._metadata)
            )
