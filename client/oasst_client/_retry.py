"""When to try again, and for how long. Pure: errors and a clock in, delays out."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from oasst_client._errors import AbortedError, APIError, OverloadedError, RequestCancelledError, UnavailableError

__all__ = [
    "DEFAULT_RETRY",
    "LEAVE_TIMEOUT_S",
    "Attempts",
    "RetryPolicy",
    "delay_before_retry",
    "is_cut_short",
    "is_lost",
    "is_transient",
]

# Whoever leaves waits no longer than this to say so.
LEAVE_TIMEOUT_S = 2.0

_JOB_LOST = "JOB_LOST"
_STREAM_DIVERGED = "STREAM_DIVERGED"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a client goes on after errors that may pass: a server that is away or restarts, a full queue.

    Every call may be made again: a request keeps its id, and a server that has it already attaches to it.

    >>> RetryPolicy(max_attempts=1)  # Tells every error at once; streams that were accepted still resume.
    RetryPolicy(max_attempts=1, patience_s=60.0, initial_backoff_s=0.1, max_backoff_s=5.0, max_wait_s=30.0)
    """

    # Of a call that nobody has answered, the first one included.
    max_attempts: int = 6
    # How long an accepted request is looked for while nobody answers. Each sign of life begins it anew.
    patience_s: float = 60.0
    # The first delay; each further one doubles it, up to the most. Half of each is random.
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    # A server that wants to be left alone for longer is not waited for.
    max_wait_s: float = 30.0


DEFAULT_RETRY = RetryPolicy()


class Attempts:
    """The attempts of one call, under its deadline."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._deadline_s = math.inf if timeout_s is None else clock() + timeout_s
        self._num_failures = 0  # Since something came, or from the start.
        self._first_failure_s = 0.0

    @property
    def remaining_s(self) -> float | None:
        """What the next attempt may take; None for as long as it wants."""
        return None if self._deadline_s == math.inf else max(0.0, self._deadline_s - self._clock())

    def saw_life(self) -> None:
        """The server has answered: failures are counted anew."""
        self._num_failures = 0

    def delay_after(self, error: APIError, *, is_accepted: bool = False) -> float:
        """How long to wait before the next attempt.

        Raises:
            APIError: `error` itself, if there is none.
        """
        now_s = self._clock()
        if self._num_failures == 0:
            self._first_failure_s = now_s
        self._num_failures += 1
        is_hopeless = (
            now_s - self._first_failure_s > self._policy.patience_s
            if is_accepted
            else self._num_failures >= self._policy.max_attempts
        )
        delay_s = self._delay_s(error)
        is_late = now_s + delay_s >= self._deadline_s
        if is_hopeless or is_late or delay_s > self._policy.max_wait_s:
            raise error
        return delay_s

    def _delay_s(self, error: APIError) -> float:
        """What the server told, and if it told nothing a growing delay that no two clients share.

        Told to retry at once, we do so once: whoever is told so again and again is in somebody's way.
        """
        if error.retry_after_s or (error.retry_after_s is not None and self._num_failures == 1):
            return error.retry_after_s
        most_s = min(self._policy.initial_backoff_s * 2.0 ** (self._num_failures - 1), self._policy.max_backoff_s)
        return most_s * (0.5 + 0.5 * self._draw())


def delay_before_retry(attempts: Attempts, error: APIError, *, cause: Exception) -> float:
    """How long to wait before a call with one answer is made again.

    Raises:
        APIError: `error`, if that would not help.
    """
    if not is_transient(error) and not is_lost(error):  # Of what was lost, nothing had been told.
        raise error from cause
    return attempts.delay_after(error)


def is_transient(error: APIError) -> bool:
    """Whether the same call may succeed later.

    A cancellation without a reason is none that anybody asked for: a gRPC server that stops answers so what it had not
    yet accepted (https://github.com/grpc/grpc/issues/41785). A refusal that tells no time to retry is for good.
    """
    match error:
        case UnavailableError():
            return True
        case RequestCancelledError():
            return not error.reason
        case OverloadedError():
            return error.retry_after_s is not None
        case _:
            return False


def is_lost(error: APIError) -> bool:
    """Whether the server has forgotten a request that it had accepted."""
    return isinstance(error, AbortedError) and error.reason == _JOB_LOST


def is_cut_short(error: APIError) -> bool:
    """Whether the server holds less of an answer than it has told."""
    return isinstance(error, AbortedError) and error.reason == _STREAM_DIVERGED
