"""A slow walk over all jobs that finds where a job and the indexes disagree, and puts it right.

Every change of a job and its indexes is one function, so there should be nothing to find. There is, when somebody
deletes keys by hand, a server evicts them, or a function has a defect: a job in no index would wait for ever.
"""

import asyncio
import logging
from collections.abc import Callable

from oasst_jobs.client import QueueClient
from oasst_jobs.connection import of_those_that_answer
from oasst_jobs.errors import QueueUnavailableError

__all__ = ["Reconciler"]

_log = logging.getLogger(__name__)


class Reconciler:
    """Walks over all shards again and again. Any number of processes may: they share one walk, and its pace."""

    def __init__(
        self,
        client: QueueClient,
        *,
        interval_s: float = 0.5,
        max_keys: int = 250,
        on_defect: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_defect` is told of each error that is no state of the queue."""
        self._client = client
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._on_defect = on_defect
        # Since the start, by this process. More than 0 is worth an alarm.
        self.num_repairs = 0

    async def run(self) -> None:
        """Walks until cancelled; an unavailable queue is tried again at the next turn."""
        while True:
            try:
                await self.walk()
            except QueueUnavailableError as error:
                _log.debug("walk skipped reason=%s", error.reason)
            except Exception:
                _log.exception("walk failed")
                self._on_defect()
            await asyncio.sleep(self._interval_s)

    async def walk(self) -> int:
        """Goes one stretch further in each shard that is not away, unless another process just has.

        Tells how many repairs it took.
        """
        # A little less than the interval: with one process, every turn is its own.
        pause_ms = round(900 * self._interval_s)
        walked = await of_those_that_answer(
            shard.reconcile(max_keys=self._max_keys, pause_ms=pause_ms) for shard in self._client.shards
        )
        num_repairs = sum(repairs for _, repairs in walked)
        if num_repairs:
            self.num_repairs += num_repairs
            _log.error("jobs and indexes disagreed repairs=%d", num_repairs)
        return num_repairs
