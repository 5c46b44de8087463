"""Watches over what the gateway depends on: whether the queue answers, how much it holds, how late the loop runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from oasst.v1 import chat_pb2
from oasst_jobs import QueueError, QueueLoad, Submitter

from oasst_gateway.errors import StartError
from oasst_gateway.health import Health
from oasst_gateway.metrics import GatewayMetrics

__all__ = ["QueueMonitor", "estimate_wait_s", "watch_event_loop"]

logger = logging.getLogger(__name__)

_LAG_INTERVAL_S = 0.25


class QueueMonitor:
    """Asks the queue for its load, again and again; tells its listener when it goes away and when it is back."""

    def __init__(
        self,
        submitter: Submitter,
        *,
        metrics: GatewayMetrics,
        on_change: Callable[[bool], Awaitable[None]],
        interval_s: float = 1.0,
    ) -> None:
        self._submitter = submitter
        self._metrics = metrics
        self._on_change = on_change
        self._interval_s = interval_s
        self._is_available: bool | None = None  # None before the first look.
        self._came = asyncio.Event()
        self.load: QueueLoad | None = None  # As last seen; None while the queue is away.

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(self._interval_s)

    async def wait_available(self, timeout_s: float) -> None:
        """Returns once the queue has answered.

        Raises:
            StartError: if it did not within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._came.wait()
        except TimeoutError as error:
            raise StartError(f"Redis did not answer within {timeout_s:g} s") from error

    def describe_queue(self, position: int) -> chat_pb2.QueueStatus:
        """A place in the queue, and how long it takes from there as far as that is known."""
        status = chat_pb2.QueueStatus(position=position)
        wait_s = estimate_wait_s(self.load, position=position)
        if wait_s is not None:
            status.estimated_wait.FromMilliseconds(round(wait_s * 1000))
        return status

    async def _look(self) -> None:
        try:
            self.load = await self._submitter.load()
        except QueueError as error:
            self.load = None
            await self._tell(False, error)
        else:
            self._metrics.record_load(self.load)
            await self._tell(True)

    async def _tell(self, is_available: bool, error: QueueError | None = None) -> None:
        self._metrics.redis_up.set(int(is_available))
        if is_available == self._is_available:
            return
        self._is_available = is_available
        if is_available:
            self._came.set()
            logger.info("queue available")
        else:
            logger.warning("queue away, waiting for it error=%s", error)
        await self._on_change(is_available)


def estimate_wait_s(load: QueueLoad | None, *, position: int) -> float | None:
    """How long a request with `position` others ahead will wait, at the speed of late; None while none is known."""
    if load is None:
        return None
    tokens_per_s = sum(status.tokens_per_second for status, _ in load.workers)
    if tokens_per_s <= 0:
        return None
    share_ahead = min(1.0, position / max(1, load.waiting_jobs))
    return share_ahead * load.waiting_tokens / tokens_per_s


async def watch_event_loop(metrics: GatewayMetrics, health: Health) -> None:
    """Observes how late the event loop wakes a sleeper, and tells health that it does, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        health.record_turn()
        metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due_s))
