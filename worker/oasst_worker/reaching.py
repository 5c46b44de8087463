"""Asks the queue until it answers, and knows what it leaves unanswered."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from oasst_jobs import QueueUnavailableError
from prometheus_client import Counter

__all__ = ["QueueCaller", "wait_at_most"]

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_MIN_BACKOFF_S = 0.05


class QueueCaller:
    """Makes calls to the queue, each until it is answered.

    An operation is unanswered from a call's first failure to that call's end: by an answer, or because it was given up.
    """

    def __init__(self, errors: Counter, *, longest_delay_s: float, on_change: Callable[[], object]) -> None:
        """`errors` are counted by operation; `on_change` is called when other operations are unanswered than before."""
        self._errors = errors
        self._longest_delay_s = longest_delay_s
        self._on_change = on_change
        self._unanswered: list[str] = []

    @property
    def is_answered(self) -> bool:
        """No call is being tried again."""
        return not self._unanswered

    def num_unanswered(self, operation: str) -> int:
        """Calls of this operation that are being tried again."""
        return self._unanswered.count(operation)

    async def call(
        self, operation: str, ask: Callable[[], Awaitable[_Answer]], *, give_up: asyncio.Event
    ) -> _Answer | None:
        """The answer, asked for until there is one; None if `give_up` is set before."""
        has_failed = False
        try:
            for delay_s in _backoff(self._longest_delay_s):
                try:
                    answer = await ask()
                except QueueUnavailableError as error:
                    self._errors.labels(operation).inc()
                    if not self._unanswered:
                        logger.warning("queue away, waiting for it operation=%s error=%s", operation, error)
                    if not has_failed:
                        has_failed = True
                        self._unanswered.append(operation)
                        self._on_change()
                else:
                    if self._unanswered == [operation] and has_failed:
                        logger.info("queue back operation=%s", operation)
                    return answer
                if await wait_at_most(give_up, delay_s):
                    break
        finally:
            if has_failed:
                self._unanswered.remove(operation)
                self._on_change()
        return None


async def wait_at_most(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


def _backoff(longest_s: float) -> Iterator[float]:
    """Delays before each further try, growing, and spread so that workers do not come back all at once."""
    delay_s = _MIN_BACKOFF_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        delay_s = max(_MIN_BACKOFF_S, min(2 * delay_s, longest_s))
