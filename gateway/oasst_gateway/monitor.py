"""Watches over what the gateway depends on: whether the queue answers, how much it holds, how late the loop runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import QueueError, Submitter, UnsupportedServerError, job_size

from oasst_gateway.admission import Outlook, SpeedEstimate
from oasst_gateway.health import Health
from oasst_gateway.metrics import GatewayMetrics

__all__ = ["QueueMonitor", "watch_event_loop"]

logger = logging.getLogger(__name__)

_LAG_INTERVAL_S = 0.25


class QueueMonitor:
    """Asks the queue for its load, again and again; tells its listener when it goes away and when it is back."""

    def __init__(
        self,
        submitter: Submitter,
        *,
        model_name: str,
        metrics: GatewayMetrics,
        on_change: Callable[[bool], Awaitable[None]],
        interval_s: float = 1.0,
        search_interval_s: float = 0.1,
    ) -> None:
        """`search_interval_s` is the interval while no worker is known: short requests are refused as long as it is."""
        self._submitter = submitter
        self._model_name = model_name
        self._metrics = metrics
        self._on_change = on_change
        self._interval_s = interval_s
        self._search_interval_s = search_interval_s
        self._is_available: bool | None = None  # None before the first look.
        self._came = asyncio.Event()
        self._has_workers = False
        self._speed = SpeedEstimate()

    async def run(self) -> None:
        """Watches until cancelled.

        Raises:
            UnsupportedServerError: whoever waits for such a server waits for ever.
        """
        while True:
            await self._look()
            await asyncio.sleep(self._interval_s if self._has_workers else self._search_interval_s)

    async def wait_available(self) -> None:
        """Returns once the queue has answered."""
        await self._came.wait()

    def look_out(self) -> Outlook:
        """What whoever comes now can expect."""
        return Outlook(self._has_workers, self._speed.asked_per_s, self._speed.asked_token_s)

    def saw_finished(self, job: job_pb2.Job, finished: chat_pb2.Finished) -> None:
        """A job has finished, and tells how much of what is asked for is used."""
        self._speed.saw_finished(asked=job_size(job), generated=finished.usage.completion_tokens)

    async def _look(self) -> None:
        try:
            load = await self._submitter.load(self._model_name)
        except UnsupportedServerError:
            raise
        except QueueError as error:
            await self._tell(False, error)
        else:
            statuses = [status for status, _ in load.workers]
            self._has_workers = bool(statuses)
            if self._has_workers:  # Otherwise the looks are too many for the speed, and tell nothing of it.
                self._speed.saw_speed(
                    sum(status.tokens_per_second for status in statuses),
                    num_workers=len(statuses),
                    num_running=sum(status.running_sequences for status in statuses),
                    num_waiting=load.waiting_jobs,
                )
            self._metrics.record_load(load)
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


async def watch_event_loop(metrics: GatewayMetrics, health: Health) -> None:
    """Observes how late the event loop wakes a sleeper, and tells health that it does, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        health.record_turn()
        metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due_s))
