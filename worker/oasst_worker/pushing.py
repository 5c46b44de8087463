"""Logs what the engine gives, before anyone sees it, and tells how jobs end.

What the engine generates reaches the queue's log and the gateways in one call, once per step for all jobs of a shard.
While a call is under way the engine goes on; what comes meanwhile is merged into the next one.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat

from oasst_jobs import Claimer, PushItem, PushStatus, failpoints

from oasst_worker.held import HeldJob
from oasst_worker.holdings import Holdings
from oasst_worker.loop import EngineLoop, StepReport, StepWatchdog
from oasst_worker.metrics import WorkerMetrics
from oasst_worker.reaching import QueueCaller, wait_at_most

__all__ = ["PUSH_INTERVAL_S", "Pusher"]

# Between two pushes of tokens that nobody waits for in particular: more often than anyone can see costs only work.
PUSH_INTERVAL_S = 0.02


class Pusher:
    """Takes the loop's reports, pushes what is new of the jobs at hand, and keeps their leases."""

    def __init__(
        self,
        claimer: Claimer,
        loop: EngineLoop,
        holdings: Holdings,
        queue: QueueCaller,
        metrics: WorkerMetrics,
        watchdog: StepWatchdog,
        *,
        renew_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        """A lease that began `renew_after_s` ago is renewed, with news or without."""
        self._claimer = claimer
        self._loop = loop
        self._holdings = holdings
        self._queue = queue
        self._metrics = metrics
        self._watchdog = watchdog
        self._renew_after_s = renew_after_s
        self._clock = clock
        self.num_generated_tokens = 0  # Since the start.
        # By shard: when the last push to it began, and whether that is still under way.
        self._pushed_s = [float("-inf")] * claimer.num_shards
        self._pushing: set[int] = set()
        self._news = asyncio.Event()
        self._closing = asyncio.Event()  # One-way.

    @property
    def is_unheard(self) -> bool:
        """No shard answers a push: what was claimed now could not keep its lease either."""
        return self._queue.num_unanswered("push") == self._claimer.num_shards

    def wake(self) -> None:
        """There may be something to push."""
        self._news.set()

    def close(self) -> None:
        """No push is begun any more; `run` ends when those under way have, and they are tried no further."""
        self._closing.set()
        self._news.set()

    async def run(self) -> None:
        """Pushes until closed. One push at a time for each shard: one that does not answer holds up no other's jobs."""
        delay_s = 0.0
        quiet_until_s = float("-inf")  # The loop tells of some reports only; then we look by ourselves.
        async with asyncio.TaskGroup() as pushes:
            while not self._closing.is_set():
                await wait_at_most(self._news, delay_s)
                self._news.clear()
                if len(self._pushing) < self._claimer.num_shards:  # While none answers, the engine is held back.
                    reports = self._loop.take()
                    for report in reports:
                        self._take(report)
                    if reports:
                        quiet_until_s = self._clock() + PUSH_INTERVAL_S
                delay_s = self._renew_after_s / 4
                if (quiet_s := quiet_until_s - self._clock()) > 0:
                    delay_s = min(delay_s, quiet_s)
                for shard, jobs in self._jobs_to_push().items():
                    wait_s = self._delay_s(shard, jobs)
                    if wait_s:
                        delay_s = min(delay_s, wait_s)
                    else:
                        self._pushed_s[shard] = self._clock()
                        self._pushing.add(shard)
                        pushes.create_task(self._push(shard, jobs), name=f"push to shard {shard}")

    def _take(self, report: StepReport) -> None:
        self._metrics.record_step(report)
        if report.num_sequences:
            self._watchdog.record(report.step_s)
        self.num_generated_tokens += report.num_drawn_tokens
        self._holdings.take(report)

    def _jobs_to_push(self) -> dict[int, list[HeldJob]]:
        """Those with news, and those whose lease is to be renewed, by shard; none while a push to it is under way."""
        due_s = self._clock() - self._renew_after_s
        jobs = self._holdings.by_shard(job for job in self._holdings.jobs if job.has_news or job.renewed_s < due_s)
        return {shard: of_shard for shard, of_shard in jobs.items() if shard not in self._pushing}

    def _delay_s(self, shard: int, jobs: Sequence[HeldJob]) -> float:
        """How long these can wait for more to come; 0 if they must not."""
        if any(job.is_urgent for job in jobs):
            return 0.0
        return max(0.0, self._pushed_s[shard] + PUSH_INTERVAL_S - self._clock())

    async def _push(self, shard: int, jobs: Sequence[HeldJob]) -> None:
        """The queue has heard what is new of these jobs and that they are still ours; what is lost is dropped."""
        started_s = self._clock()
        items = [job.next_item(now_s=started_s, renew_after_s=self._renew_after_s) for job in jobs]
        tries = _tries(items)
        failpoints.reach("worker.pushing")
        try:
            statuses = await self._queue.call("push", lambda: self._claimer.push(next(tries)), give_up=self._closing)
        finally:
            self._pushing.discard(shard)
            self._news.set()
        failpoints.reach("worker.pushed")
        if statuses is None:
            return
        self._metrics.push_seconds.observe(self._clock() - started_s)
        for job, item, status in zip(jobs, items, statuses, strict=True):
            if not self._holdings.holds(job):
                continue
            if status is not PushStatus.OK:
                self._holdings.drop(job, status)
            elif item.outcome is not None:  # It may have ended since: that goes with the next item.
                self._holdings.finish(job)


def _tries(items: list[PushItem]) -> Iterator[list[PushItem]]:
    """What is pushed at first and each time after that. By then leases that were young are not: all are renewed."""
    yield items
    yield from repeat([replace(item, renews=True) for item in items])
