"""What a stream does next: which call it makes, and after which error another one. Pure, used by both shells.

    stream(request):   ChatStream -> [WatchChat -> ...] -> the end
    watch(id, token):  WatchChat  -> [WatchChat -> ...] -> the end

A lost connection is followed by WatchChat from the next token on. Before anything was accepted it is the same call
again. If the server itself has lost the request, the same request is made with the seed that it had, until it is
accepted anew: that gives the same tokens, which are compared with those that came before.
"""

import logging

from oasst.v1 import chat_pb2

from oasst_client._accumulate import Accumulator
from oasst_client._errors import APIError, NotFoundError, OasstError, ProtocolError, StreamDivergedError
from oasst_client._retry import Attempts, is_cut_short, is_lost, is_transient
from oasst_client._types import Accepted, Event

__all__ = ["Continuation", "EventRequest", "ends_with_its_caller"]

logger = logging.getLogger("oasst_client")

EventRequest = chat_pb2.ChatRequest | chat_pb2.WatchChatRequest

# A server that loses the same request more often will not bring it to its end.
_MAX_RESTARTS = 3


def ends_with_its_caller(request: EventRequest) -> bool:
    """Whether the request is cancelled if its caller leaves: one's own is, unless it was given time to run on."""
    return isinstance(request, chat_pb2.ChatRequest) and not request.HasField("detach_grace")


class Continuation:
    """One request's way from its first call to its last event."""

    def __init__(self, request: EventRequest, accumulator: Accumulator, attempts: Attempts) -> None:
        self.accumulator = accumulator
        self.attempts = attempts
        # How often the stream was taken up again after it had begun.
        self.num_resumes: int = 0
        # Whether nothing more will come: it finished, failed, or was given up.
        self.is_over: bool = False
        # What it failed with: whoever asks again is told the same.
        self.error: OasstError | None = None
        # The call to make now.
        self.next_call: EventRequest = request
        self._request = request
        self._num_restarts = 0

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def ends_with_its_caller(self) -> bool:
        return ends_with_its_caller(self._request)

    def add(self, message: chat_pb2.ChatEvent) -> Event | None:
        """The next event as the caller sees it; None for one that tells nothing new.

        Raises:
            APIError: the request failed. `recover` tells whether it can go on.
            ProtocolError: the server's answer breaks the contract.
        """
        self.attempts.saw_life()
        try:
            event = self.accumulator.add(message)
        except ProtocolError as error:
            self.error = error
            raise
        self.is_over = self.accumulator.completion is not None
        return event

    def recover(self, error: APIError) -> float:
        """`next_call` is what to try next, after the delay in seconds that is returned.

        Raises:
            APIError: `error` itself, if nothing helps.
        """
        accepted = self.accumulator.accepted
        try:
            if accepted is None:
                return self._try_again(error)
            delay_s = self._resume(error, accepted)
        except APIError as final:
            self.is_over = True
            self.error = final
            raise
        self.num_resumes += 1
        logger.info(
            "resuming request_id=%s after=%d num_resumes=%d delay_s=%.2f cause=%s",
            self.request_id,
            self.accumulator.next_position,
            self.num_resumes,
            delay_s,
            error.reason or error.code,
        )
        return delay_s

    def take_up(self) -> None:
        """`next_call` goes on where its caller stopped reading."""
        if (accepted := self.accumulator.accepted) is not None:
            self.accumulator.resume()
            self.next_call = self._watch_request(accepted)

    def _try_again(self, error: APIError) -> float:
        """The same call again: nothing holds its request yet, or any more."""
        if not is_transient(error):
            raise error
        return self.attempts.delay_after(error, is_accepted=self.accumulator.seed is not None)

    def _resume(self, error: APIError, accepted: Accepted) -> float:
        if isinstance(error, StreamDivergedError):
            raise error  # What came anew differs from what is held, and would again.
        if is_lost(error) or isinstance(error, NotFoundError):
            self._begin_anew(error)
            self.next_call = self._same_request(error, accepted.seed)
            self.accumulator.forget_acceptance()
        elif is_cut_short(error):
            self._begin_anew(error)
            self.next_call = self._watch_request(accepted)
        elif is_transient(error):
            self.accumulator.resume()
            self.next_call = self._watch_request(accepted)
        else:
            raise error
        return self.attempts.delay_after(error, is_accepted=True)

    def _begin_anew(self, error: APIError) -> None:
        if self._num_restarts == _MAX_RESTARTS:
            raise error
        self._num_restarts += 1
        self.accumulator.restart()

    def _same_request(self, error: APIError, seed: int) -> chat_pb2.ChatRequest:
        """The request that gives the same tokens as the first one did."""
        if not isinstance(self._request, chat_pb2.ChatRequest):
            raise error  # Whoever only watches does not know what was asked.
        request = chat_pb2.ChatRequest()
        request.CopyFrom(self._request)
        request.sampling.seed = seed
        return request

    def _watch_request(self, accepted: Accepted) -> chat_pb2.WatchChatRequest:
        return chat_pb2.WatchChatRequest(
            request_id=accepted.request_id,
            resume_token=accepted.resume_token,
            after=self.accumulator.next_position,
        )
