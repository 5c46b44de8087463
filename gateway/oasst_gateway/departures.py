"""Jobs that nobody here watches any more, told to the queue: a few at a time, however many are left at once."""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Callable

from oasst_jobs import QueueUnavailableError, Submitter

__all__ = ["Departures"]

logger = logging.getLogger(__name__)

# Of one shard.
_AT_ONCE = 8
# The queue notices by itself what it has not heard for so long.
_NOTICED_S = 60.0


class Departures:
    """Tells each until the queue has heard of it, or notices by itself. Shards are told apart: one may hang."""

    def __init__(
        self, submitter: Submitter, *, retry_s: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._submitter = submitter
        self._make_line = functools.partial(_Line, submitter, retry_s=retry_s, clock=clock)
        self._lines: dict[int, _Line] = {}  # By number of the shard.

    def begin(self, job_id: str) -> None:
        """The queue is going to hear that this gateway does not watch the job."""
        self._line_of(job_id).begin(job_id)

    async def take_back(self, job_id: str) -> bool:
        """The queue is not going to hear it any more. Whether it was about to."""
        return await self._line_of(job_id).take_back(job_id)

    async def aclose(self, *, grace_s: float) -> None:
        """Nothing runs any more, after at most `grace_s`."""
        await asyncio.gather(*(line.aclose(grace_s=grace_s) for line in self._lines.values()))

    def _line_of(self, job_id: str) -> "_Line":
        shard_number = self._submitter.shard_number(job_id)
        if shard_number not in self._lines:
            self._lines[shard_number] = self._make_line()
        return self._lines[shard_number]


class _Line:
    """The departures from one shard's jobs."""

    def __init__(self, submitter: Submitter, *, retry_s: float, clock: Callable[[], float]) -> None:
        self._submitter = submitter
        self._retry_s = retry_s
        self._clock = clock
        self._left_s: dict[str, float] = {}  # By job id: when it was left. Those that were tried come last.
        self._calls: dict[str, asyncio.Task[bool]] = {}  # By job id: those made last.
        self._telling: asyncio.Task[None] | None = None

    def begin(self, job_id: str) -> None:
        self._left_s[job_id] = self._clock()
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def take_back(self, job_id: str) -> bool:
        while (call := self._calls.get(job_id)) is not None and not call.done():
            # Were it still to come, it would take back what begins now.
            await asyncio.wait([call])
        return self._left_s.pop(job_id, None) is not None

    async def aclose(self, *, grace_s: float) -> None:
        if self._telling is not None:
            await asyncio.wait([self._telling], timeout=grace_s)
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    async def _tell(self) -> None:
        while self._left_s:
            job_ids = list(itertools.islice(self._left_s, _AT_ONCE))
            async with asyncio.TaskGroup() as group:
                self._calls = {job_id: group.create_task(self._unwatch(job_id)) for job_id in job_ids}
            if not all(call.result() for call in self._calls.values()):
                await asyncio.sleep(self._retry_s)

    async def _unwatch(self, job_id: str) -> bool:
        """Whether that is settled: the queue has answered, or need not be asked any more."""
        try:
            if self._clock() - self._left_s[job_id] < _NOTICED_S:
                state = await self._submitter.unwatch(job_id)
                logger.info("left job_id=%s state=%s", job_id, state)
            else:
                logger.warning("the queue was not told that nobody watches job_id=%s", job_id)
        except QueueUnavailableError:
            self._left_s[job_id] = self._left_s.pop(job_id)
            return False
        except Exception:  # What one job did to it must not end the others' departures.
            logger.exception("the queue was not told that nobody watches job_id=%s", job_id)
        del self._left_s[job_id]
        return True
