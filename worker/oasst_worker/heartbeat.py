"""Tells the queue about once a second how full this worker is and how fast it generates."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version

from oasst.jobs.v1.job_pb2 import WorkerStatus
from oasst_jobs import Claimer, QueueUnavailableError

from oasst_worker.consumer import Consumer
from oasst_worker.loop import EngineLoop

__all__ = ["TokenRate", "beat"]

logger = logging.getLogger(__name__)


class TokenRate:
    """Tokens per second over the last observations."""

    def __init__(self, num_observations: int = 6) -> None:
        self._observed: deque[tuple[float, int]] = deque(maxlen=num_observations)

    def observe(self, num_tokens: int, now_s: float) -> float:
        """The rate, once `num_tokens` have been generated since the start."""
        self._observed.append((now_s, num_tokens))
        first_s, first_tokens = self._observed[0]
        return (num_tokens - first_tokens) / (now_s - first_s) if now_s > first_s else 0.0


async def beat(
    claimer: Claimer,
    consumer: Consumer,
    loop: EngineLoop,
    *,
    worker_id: str,
    model: str,
    interval_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Beats until cancelled. A beat that does not get through is left out."""
    rate = TokenRate()
    release = version("oasst-serve")  # Read from a file.
    while True:
        status = WorkerStatus(
            worker_id=worker_id,
            model=model,
            running_sequences=loop.load.num_running,
            max_sequences=loop.max_sequences,
            kv_tokens_used=loop.load.kv_tokens_used,
            kv_tokens_total=loop.kv_tokens_total,
            tokens_per_second=rate.observe(consumer.num_generated_tokens, clock()),
            version=release,
        )
        try:
            await claimer.heartbeat(status)
        except QueueUnavailableError as error:
            logger.debug("heartbeat left out error=%s", error)
        await asyncio.sleep(interval_s)
