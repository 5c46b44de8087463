"""News of jobs for one gateway: one reader of its stream in each shard, fanned out to whoever waits.

The gateway's stream is fast and may lose; the job's log is the truth. A subscription knows the position up to which it
has told everything, so it sees what it missed and has it read from the log:

    told == start   the update joins on: it is passed on
    told <  start   something is missing: the log is read
    told >  start   the log was read meanwhile, or Redis has lost part of it: the log is read, which shows

All reading of Redis happens in the inbox's own tasks; whoever takes news waits in memory only, and may be cancelled at
any time.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from oasst.jobs.v1 import job_pb2

from oasst_jobs.client import QueueClient
from oasst_jobs.errors import QueueUnavailableError
from oasst_jobs.functions import Shard
from oasst_jobs.outcomes import diverged, lost, unreadable
from oasst_jobs.records import LogSnapshot

__all__ = ["Inbox", "Subscription"]

_log = logging.getLogger(__name__)

_RETRY_S = 0.2

# Batches read before the stream is cut behind them.
_BATCHES_PER_TRIM = 1000


class Subscription:
    """One reader's view of one job: LogEntry after LogEntry without gap or repeat, then its Outcome, and nothing more.

    Reading starts by the first `take`, once the job has been submitted or attached to. A job that is gone,
    because its retention is over or Redis lost it, ends with an Outcome that has failed as ABORTED with the reason
    JOB_LOST; one whose log is shorter than what was seen of it, with the reason STREAM_DIVERGED. One whose log cannot
    be read ends with an Outcome that has failed as INTERNAL with the reason UNREADABLE_LOG.
    """

    def __init__(self, job_id: str, *, after: int, now_s: float, catch_up: Callable[["Subscription"], None]) -> None:
        self.job_id = job_id
        # End position of what was put into `_news` so far.
        self.told_position = after
        # When the job was last heard of.
        self.heard_s = now_s
        # Whether reading the log is due.
        self.is_stale = False
        # Whether somebody reads: before that, the job need not exist.
        self.is_read = False
        # Whether the outcome was put into `_news`.
        self.is_over = False
        self._catch_up = catch_up
        self._news: deque[job_pb2.LogEntry | job_pb2.Outcome] = deque()
        self._failure: Exception | None = None
        # Set when the reader has something to look at.
        self._called = asyncio.Event()

    async def take(self) -> list[job_pb2.LogEntry | job_pb2.Outcome]:
        """Everything that came since the last time, waiting for some. Nothing if the reader was called for nothing."""
        self._start_reading()
        if not self._news:
            await self._wait()
        news = list(self._news)
        self._news.clear()
        return news

    def call(self) -> None:
        """The reader's `take` returns, with what there is."""
        self._called.set()

    def fail(self, failure: Exception) -> None:
        """The reader is raised `failure` once it has read what came before."""
        self._failure = failure
        self._called.set()

    def update(self, update: job_pb2.JobUpdate, now_s: float) -> None:
        """Takes news from the gateway's stream; asks for the log where they do not join on."""
        self.heard_s = now_s
        kind = update.WhichOneof("news")
        if kind is None or update.start_position != self.told_position:
            self._catch_up(self)
        elif kind == "entry":
            self._tell_entry(update.entry)
        else:
            self._tell_outcome(update.outcome)

    def catch_up(self, asked_position: int, log: LogSnapshot | None, now_s: float) -> None:
        """Takes what the log holds behind `asked_position`. Some of it may have come by the stream meanwhile."""
        self.heard_s = now_s
        if log is None:
            self._tell_outcome(lost())
        elif log.end_position < asked_position:
            self._tell_outcome(diverged(asked_position, log.end_position))
        else:
            for entry in log.entries:
                if entry.end_position > self.told_position:
                    self._tell_entry(entry)
            if log.outcome is not None:
                self._tell_outcome(log.outcome)

    def give_up(self) -> None:
        """The log cannot be read, now or later."""
        self._tell_outcome(unreadable())

    def _start_reading(self) -> None:
        if not self.is_read:
            self.is_read = True
            self._catch_up(self)

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._called.clear()
        await self._called.wait()
        if self._failure is not None and not self._news:
            raise self._failure

    def _tell_entry(self, entry: job_pb2.LogEntry) -> None:
        if not self.is_over:
            self.told_position = entry.end_position
            self._news.append(entry)
            self._called.set()

    def _tell_outcome(self, outcome: job_pb2.Outcome) -> None:
        if not self.is_over:
            self.is_over = True
            self._news.append(outcome)
            self._called.set()


class Inbox:
    """The one reader of a gateway's streams.

    Any number of subscriptions may watch the same job. One that hears nothing for `recheck_s` has its log read, so
    that nothing lost on the way can leave a reader waiting.
    """

    def __init__(
        self,
        client: QueueClient,
        *,
        gateway_id: str,
        recheck_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        on_defect: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_defect` is told of each error that is no state of the queue."""
        self._client = client
        self._gateway_id = gateway_id
        self._recheck_s = recheck_s
        self._clock = clock
        self._on_defect = on_defect
        self._subscriptions: dict[str, set[Subscription]] = {}
        # By shard, so that one that hangs keeps nobody from the others' logs.
        self._stale: list[asyncio.Queue[Subscription]] = [asyncio.Queue() for _ in client.shards]

    async def run(self) -> None:
        """Serves the subscriptions until cancelled. While the queue is unavailable they wait."""
        async with asyncio.TaskGroup() as tasks:
            for shard in self._client.shards:
                tasks.create_task(self._read_stream(shard))
            for stale in self._stale:
                tasks.create_task(self._read_logs(stale))
            tasks.create_task(self._watch_silence())

    @asynccontextmanager
    async def subscribe(self, job_id: str, *, after: int = 0) -> AsyncIterator[Subscription]:
        """A subscription to a job, from the end position of what its reader has seen. Comes before submit or attach."""
        subscription = Subscription(job_id, after=after, now_s=self._clock(), catch_up=self._mark_stale)
        watching = self._subscriptions.setdefault(job_id, set())
        watching.add(subscription)
        try:
            yield subscription
        finally:
            watching.discard(subscription)
            if not watching and self._subscriptions.get(job_id) is watching:
                del self._subscriptions[job_id]

    async def _read_stream(self, shard: Shard) -> None:
        """Reads the gateway's stream of a shard, over lost connections."""
        while True:
            try:
                await self._read_from_now(shard)
            except QueueUnavailableError as error:
                _log.warning("inbox lost its connection gateway=%s reason=%s", self._gateway_id, error.reason)
            except Exception:  # What could not be read is passed over; subscriptions read it from their logs.
                _log.exception("inbox could not read its stream gateway=%s", self._gateway_id)
                self._on_defect()
            else:
                continue
            await asyncio.sleep(_RETRY_S)

    async def _read_from_now(self, shard: Shard) -> None:
        """Passes on each batch from now on; what came before, the subscriptions read from their logs.

        Returns when the stream's ids went back, as when it begins again after Redis's clock was set back: what comes
        now is not behind what was read.
        """
        last_id = await shard.last_update_id(self._gateway_id)
        self._mark_all_stale()
        num_read = 0
        while True:
            batches = await shard.read_updates(self._gateway_id, last_id)
            if not batches and _order_of(await shard.last_update_id(self._gateway_id)) < _order_of(last_id):
                return
            for batch_id, batch in batches:
                self._pass_on(batch)
                last_id = batch_id
                num_read += 1
            if num_read >= _BATCHES_PER_TRIM:
                await shard.trim_updates(self._gateway_id, last_id)
                num_read = 0

    async def _read_logs(self, stale: asyncio.Queue[Subscription]) -> None:
        """Reads the log of each stale subscription of a shard, one after the other."""
        while True:
            subscription = await stale.get()
            # Cleared before reading: whatever makes it stale from now on is not covered by this read.
            subscription.is_stale = False
            if subscription.is_over or subscription not in self._subscriptions.get(subscription.job_id, ()):
                continue
            asked_position = subscription.told_position
            try:
                log = await self._client.read(subscription.job_id, asked_position)
            except QueueUnavailableError:
                self._mark_stale(subscription)
                await asyncio.sleep(_RETRY_S)
            except Exception:  # One job's log must not end the others' streams.
                _log.exception("a log could not be read job_id=%s", subscription.job_id)
                self._on_defect()
                subscription.give_up()
            else:
                subscription.catch_up(asked_position, log, self._clock())

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(self._recheck_s / 2)
            silent_since_s = self._clock() - self._recheck_s
            for subscription in self._all_subscriptions():
                if subscription.heard_s <= silent_since_s:
                    self._mark_stale(subscription)

    def _pass_on(self, batch: job_pb2.UpdateBatch) -> None:
        now_s = self._clock()
        for update in batch.updates:
            for subscription in self._subscriptions.get(update.job_id, ()):
                subscription.update(update, now_s)

    def _mark_all_stale(self) -> None:
        for subscription in self._all_subscriptions():
            self._mark_stale(subscription)

    def _mark_stale(self, subscription: Subscription) -> None:
        if subscription.is_read and not subscription.is_over and not subscription.is_stale:
            subscription.is_stale = True
            self._stale[self._client.shard_number(subscription.job_id)].put_nowait(subscription)

    def _all_subscriptions(self) -> list[Subscription]:
        return [subscription for watching in self._subscriptions.values() for subscription in watching]


def _order_of(batch_id: str) -> tuple[int, ...]:
    """What ids of a stream are compared by: milliseconds, then a number."""
    return tuple(map(int, batch_id.split("-")))
