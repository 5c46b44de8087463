"""Events become a completion: the pure half of a stream."""

from collections.abc import Callable

from oasst.v1 import chat_pb2, generation_pb2

from oasst_client._errors import ProtocolError, error_from_failed
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
    """Gathers the events of one stream, and proves on the way that none is missing and none came twice.

    Owned by one stream; `on_finished` is called once, with the whole completion, if the request runs to its end.
    """

    def __init__(self, request_id: str, on_finished: Callable[[Completion], None] | None = None) -> None:
        self._request_id = request_id
        self._on_finished = on_finished
        self._accepted: Accepted | None = None
        self._choices: dict[int, _ChoiceParts] = {}
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion | None:
        """The whole completion, once the stream has finished."""
        return self._completion

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._parts_of(0).text

    def add(self, event: chat_pb2.ChatEvent) -> Event | None:
        """The event as the caller sees it; None for one that only a newer client knows.

        Raises:
            APIError: the event says that the request failed.
            ProtocolError: a delta does not go on where the one before ended.
        """
        match event.WhichOneof("event"):
            case "accepted":
                self._accepted = accepted_from(event.accepted)
                return self._accepted
            case "waiting":
                return Waiting(queue_status_from(event.waiting))
            case "delta":
                return self._add_delta(event.delta)
            case "finished":
                return self._finish(event.finished)
            case "failed":
                raise error_from_failed(event.failed, request_id=self._request_id)
        return None

    def end(self) -> Completion:
        """The completion of a stream that gave its last event.

        Raises:
            ProtocolError: the last event was not `finished`.
        """
        if self._completion is None:
            raise ProtocolError(f"the stream of request {self._request_id} ended without its last event")
        return self._completion

    def _add_delta(self, proto: generation_pb2.Delta) -> Delta:
        delta = delta_from(proto)
        parts = self._parts_of(delta.choice)
        if delta.position != len(parts.token_ids):
            raise ProtocolError(
                f"choice {delta.choice} of request {self._request_id} goes on at token {delta.position}, "
                f"but {len(parts.token_ids)} tokens have come"
            )
        parts.add(delta)
        return delta

    def _finish(self, proto: chat_pb2.Finished) -> Finished:
        if not proto.finishes:
            raise ProtocolError(f"request {self._request_id} finished without a choice")
        finished = Finished(
            finishes=tuple(finish_from(each) for each in proto.finishes),
            usage=usage_from(proto.usage),
            timings=timings_from(proto.timings),
        )
        self._completion = Completion(
            request_id=self._request_id,
            choices=tuple(self._parts_of(each.choice).choice(each) for each in finished.finishes),
            usage=finished.usage,
            timings=finished.timings,
            seed=self._accepted.seed if self._accepted else 0,
        )
        if self._on_finished:
            self._on_finished(self._completion)
        return finished

    def _parts_of(self, choice: int) -> "_ChoiceParts":
        return self._choices.setdefault(choice, _ChoiceParts())


class _ChoiceParts:
    """What one choice has gained so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs

    def choice(self, finish: ChoiceFinish) -> Choice:
        return Choice(self.text, tuple(self.token_ids), tuple(self.logprobs), finish)
