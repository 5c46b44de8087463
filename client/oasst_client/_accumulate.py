"""The accumulator: from events to a whole completion. Pure, used by both shells."""

from collections.abc import Callable

from oasst.v1 import chat_pb2, generation_pb2

from oasst_client._errors import ProtocolError, StreamDivergedError, error_from_failed
from oasst_client._types import (
    Accepted,
    Choice,
    ChoiceFinish,
    Completion,
    Delta,
    Event,
    Finished,
    TokenLogprob,
    Waiting,
)
from oasst_client._wire import (
    accepted_from,
    delta_from,
    finish_from,
    queue_status_from,
    timings_from,
    usage_from,
)

__all__ = ["Accumulator"]


class Accumulator:
    """Gathers the events of one request, and proves on the way that none is missing and none came twice.

    A request may be told by several streams, one after the other: each goes on, or begins anew, somewhere in what is
    held already. What a later stream tells again must equal what is held, and is not told to the caller a second time.

    Owned by one stream; `on_finished` is called once, with the whole completion, if the request runs to its end.
    """

    def __init__(self, request_id: str, on_finished: Callable[[Completion], None] | None = None) -> None:
        self._request_id = request_id
        self._on_finished = on_finished
        self._choices: dict[int, _ChoiceParts] = {}
        # Of the request as the server holds it now.
        self.accepted: Accepted | None = None
        # What the tokens are drawn with, also those of a request that is made anew; None before the first acceptance.
        self.seed: int | None = None
        # Where a stream goes on that is to follow the present one.
        self.next_position: int = 0
        # The whole completion, once the request has finished.
        self.completion: Completion | None = None

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._parts_of(0).text

    def add(self, event: chat_pb2.ChatEvent) -> Event | None:
        """The event as the caller sees it; None for one that tells nothing new.

        Raises:
            APIError: the event says that the request failed.
            StreamDivergedError: what is told again is not what is held.
            ProtocolError: a delta does not go on where the one before ended.
        """
        told = self._take(event)
        if event.next_position > self.next_position:
            self.next_position = event.next_position
            for parts in self._choices.values():
                parts.mark()
        return told

    def resume(self) -> None:
        """The next stream begins at `next_position`."""
        for parts in self._choices.values():
            parts.go_to_mark()

    def restart(self) -> None:
        """The next stream begins at the first token."""
        self.next_position = 0
        for parts in self._choices.values():
            parts.go_to_start()

    def forget_acceptance(self) -> None:
        """The server has lost the request: it is to be accepted anew, which nobody is told a second time."""
        self.accepted = None

    def end(self) -> Completion:
        """The completion of a stream that gave its last event.

        Raises:
            ProtocolError: the last event was not `finished`.
        """
        if self.completion is None:
            raise ProtocolError(f"the stream of request {self._request_id} ended without its last event")
        return self.completion

    def _take(self, event: chat_pb2.ChatEvent) -> Event | None:
        match event.WhichOneof("event"):
            case "accepted":
                return self._accept(accepted_from(event.accepted))
            case "waiting":
                return Waiting(queue_status_from(event.waiting))
            case "delta":
                return self._add_delta(event.delta)
            case "finished":
                return self._finish(event.finished)
            case "failed":
                raise error_from_failed(event.failed, request_id=self._request_id)
            case _:
                return None  # An event that only a newer client knows.

    def _accept(self, accepted: Accepted) -> Accepted | None:
        is_first = self.seed is None
        self.accepted, self.seed = accepted, accepted.seed
        return accepted if is_first else None

    def _add_delta(self, proto: generation_pb2.Delta) -> Delta | None:
        delta = delta_from(proto)
        parts = self._parts_of(delta.choice)
        if delta.position != parts.num_told_tokens:
            raise ProtocolError(
                f"choice {delta.choice} of request {self._request_id} goes on at token {delta.position}, "
                f"but {parts.num_told_tokens} tokens have come"
            )
        try:
            return parts.add(delta)
        except _DivergedError as error:
            raise self._diverged() from error

    def _finish(self, proto: chat_pb2.Finished) -> Finished:
        if not proto.finishes:
            raise ProtocolError(f"request {self._request_id} finished without a choice")
        if not all(parts.is_told for parts in self._choices.values()):
            raise self._diverged()
        finished = Finished(
            finishes=tuple(finish_from(each) for each in proto.finishes),
            usage=usage_from(proto.usage),
            timings=timings_from(proto.timings),
        )
        self.completion = Completion(
            request_id=self._request_id,
            choices=tuple(self._parts_of(each.choice).choice(each) for each in finished.finishes),
            usage=finished.usage,
            timings=finished.timings,
            seed=self.seed or 0,
        )
        if self._on_finished:
            self._on_finished(self.completion)
        return finished

    def _diverged(self) -> StreamDivergedError:
        return StreamDivergedError(
            "the server lost part of the answer, and what it generated anew differs from what had come",
            code="ABORTED",
            reason="STREAM_DIVERGED",
            request_id=self._request_id,
        )

    def _parts_of(self, choice: int) -> "_ChoiceParts":
        return self._choices.setdefault(choice, _ChoiceParts())


class _DivergedError(Exception):
    """What is told again is not what is held."""


class _ChoiceParts:
    """What is held of one choice, and how far into it the present stream has told.

        held:    |<-------- token_ids -------->|
        stream:  |<--- num_told_tokens --->|
        resume:  |<-- mark -->|

    Without a resume, all that is held was told by the present stream.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._num_chars = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.num_told_tokens = 0
        self._num_told_chars = 0
        self._mark = (0, 0)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def is_told(self) -> bool:
        """Whether the present stream has told all that is held."""
        return self.num_told_tokens == len(self._token_ids)

    def mark(self) -> None:
        """A later stream can go on behind what was told."""
        self._mark = (self.num_told_tokens, self._num_told_chars)

    def go_to_mark(self) -> None:
        self.num_told_tokens, self._num_told_chars = self._mark

    def go_to_start(self) -> None:
        self._mark = (0, 0)
        self.go_to_mark()

    def add(self, delta: Delta) -> Delta | None:
        """What of the delta is new; None if nothing is."""
        num_known_tokens = min(len(delta.token_ids), len(self._token_ids) - self.num_told_tokens)
        num_known_chars = min(len(delta.text), self._num_chars - self._num_told_chars)
        if num_known_tokens or num_known_chars:
            self._compare(delta, num_known_tokens, num_known_chars)
        self._texts.append(delta.text[num_known_chars:])
        self._num_chars += len(delta.text) - num_known_chars
        self._token_ids += delta.token_ids[num_known_tokens:]
        self._logprobs += delta.logprobs[num_known_tokens:]
        self.num_told_tokens += len(delta.token_ids)
        self._num_told_chars += len(delta.text)
        if not num_known_tokens:
            return delta
        if num_known_tokens == len(delta.token_ids):
            return None
        return Delta(
            choice=delta.choice,
            position=delta.position + num_known_tokens,
            text=delta.text[num_known_chars:],
            token_ids=delta.token_ids[num_known_tokens:],
            logprobs=delta.logprobs[num_known_tokens:],
        )

    def choice(self, finish: ChoiceFinish) -> Choice:
        return Choice(self.text, tuple(self._token_ids), tuple(self._logprobs), finish)

    def _compare(self, delta: Delta, num_tokens: int, num_chars: int) -> None:
        """Raises _DivergedError unless the delta begins with so many tokens and characters that are held."""
        tokens_end, chars_end = self.num_told_tokens + num_tokens, self._num_told_chars + num_chars
        held_text = self.text[self._num_told_chars : chars_end]
        # Held tokens made no more text than held text, and all of it comes before that of the tokens that follow.
        has_strange_text = num_tokens == len(delta.token_ids) and num_chars < len(delta.text)
        lacks_text = num_tokens < len(delta.token_ids) and chars_end < self._num_chars
        if (
            tuple(self._token_ids[self.num_told_tokens : tokens_end]) != delta.token_ids[:num_tokens]
            or delta.text[:num_chars] != held_text
            or has_strange_text
            or lacks_text
        ):
            raise _DivergedError
