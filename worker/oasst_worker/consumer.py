"""Between queue and engine: claims jobs while there is room, logs what the engine gives, tells how jobs end.

Log before show: what the engine generates reaches the queue's log and the gateways in one call, once per step for all
jobs of a shard. While a call is under way the engine goes on; what comes meanwhile is merged into the next one.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from oasst_jobs import (
    ClaimedJob,
    Claimer,
    PushItem,
    PushStatus,
    QueueUnavailableError,
    failpoints,
    num_prompt_tokens,
)
from oasst_telemetry import Tracer

from oasst_worker.choice import Choice
from oasst_worker.generating import GeneratingJob
from oasst_worker.held import HeldJob
from oasst_worker.intake import Intake, JobRefusedError
from oasst_worker.loop import EngineLoop, StepReport, StepWatchdog
from oasst_worker.metrics import WorkerMetrics
from oasst_worker.parts import Part
from oasst_worker.reaching import QueueCaller, wait_at_most
from oasst_worker.refused import RefusedJob
from oasst_worker.scoring import ScoringJob
from oasst_worker.spans import JobSpans

__all__ = ["Consumer"]

logger = logging.getLogger(__name__)

# How long to wait for word of new work before looking anyway.
_LISTEN_S = 1.0
# More tokens than any job asks for: an idle worker takes the next job whatever its size.
_ANY_SIZE = 2**50
_SCORING_JOBS = 4  # Held at once.
# KV cache kept free for the next tokens of each running choice, so that a claim does not preempt at once.
_LOOKAHEAD_TOKENS = 64
# Between two pushes of tokens that nobody waits for in particular: more often than anyone can see costs only work.
_PUSH_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class _Room:
    """What a worker can take in."""

    jobs: int
    tokens: int
    choices: int
    is_idle: bool = False


_ROOM_OF_IDLE = _Room(jobs=1, tokens=_ANY_SIZE, choices=_ANY_SIZE, is_idle=True)


class Consumer:
    """Keeps an engine busy with the queue's jobs.

    Owns every job from its claim until its outcome is logged, it is lost, or it is given back. The engine's loop is
    started and stopped here.
    """

    def __init__(
        self,
        claimer: Claimer,
        loop: EngineLoop,
        intake: Intake,
        metrics: WorkerMetrics,
        watchdog: StepWatchdog,
        tracer: Tracer,
        *,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` is the claimer's too."""
        self._claimer = claimer
        self._loop = loop
        self._intake = intake
        self._metrics = metrics
        self._watchdog = watchdog
        self._tracer = tracer
        # A lease that began this long ago is renewed, with news or without; and no try to reach the queue comes later.
        self._renew_after_s = lease_s / 3
        self._queue = QueueCaller(
            metrics.queue_errors, longest_delay_s=self._renew_after_s, on_change=self._note_more_room
        )
        self._clock = clock
        self.num_generated_tokens = 0  # Since the start.
        self._jobs: dict[str, HeldJob] = {}
        self._owners: dict[Part, HeldJob] = {}  # Parts that belong in the engine.
        self._drain_ends_s = float("inf")
        # By shard: when the last push to it began, and whether that is still under way.
        self._pushed_s = [float("-inf")] * claimer.num_shards
        self._pushing: set[int] = set()
        # Wake-ups. Each is set by whoever changes something, and cleared by the one task that waits for it.
        self._claim_now = asyncio.Event()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room_to_score = asyncio.Event()
        self._job_left = asyncio.Event()
        # One-way: no claims after the first, no pushes after the second.
        self._draining = asyncio.Event()
        self._closing = asyncio.Event()

    @property
    def num_sequences(self) -> int:
        """Choices that run or wait in the engine."""
        return sum(isinstance(part, Choice) for part in self._owners)

    @property
    def queue_is_reachable(self) -> bool:
        """Whether the queue answers all that it is asked."""
        return self._queue.is_answered

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    def drain(self, budget_s: float) -> None:
        """No job is claimed any more; `run` ends when those at hand have, or after `budget_s`.

        A later call can only shorten the time.
        """
        self._drain_ends_s = min(self._drain_ends_s, self._clock() + budget_s)
        for event in (self._draining, self._claim_now, self._job_left):
            event.set()

    async def run(self) -> None:
        """Serves jobs until drained. Then every job has its outcome, or waits in the queue for another worker.

        If the queue cannot be reached by then, the leases lapse and other workers go on all the same.
        """
        asyncio_loop = asyncio.get_running_loop()
        self._loop.start(lambda: asyncio_loop.call_soon_threadsafe(self._news.set), quiet_s=_PUSH_INTERVAL_S)
        self._note_more_room()
        try:
            async with asyncio.TaskGroup() as tasks:
                listening = [
                    tasks.create_task(self._listen(self._room, is_scoring=False), name="listen"),
                    tasks.create_task(self._listen(self._room_to_score, is_scoring=True), name="listen to score"),
                ]
                claiming = tasks.create_task(self._claim_until_draining(), name="claim")
                tasks.create_task(self._push_until_closing(), name="push")
                try:
                    await self._draining.wait()
                    # A claim under way is not cancelled: its jobs would be nobody's for the length of a lease.
                    await claiming
                    for task in listening:
                        task.cancel()
                    await self._wait_until_drained()
                finally:
                    # Tasks end by these, not by cancellation alone: inside redis-py, Python 3.11 may swallow one.
                    for event in (self._draining, self._closing, self._claim_now, self._news):
                        event.set()
        finally:
            self._loop.stop()
        await self._release_jobs()

    # --- Claiming

    async def _listen(self, room: asyncio.Event, *, is_scoring: bool) -> None:
        """Has the claiming task look whenever there may be work, while there is room for it."""
        while not self._draining.is_set():
            await room.wait()
            await self._queue.call(
                "wait",
                lambda: self._claimer.wait_for_work(_LISTEN_S, is_scoring=is_scoring),
                give_up=self._draining,
            )
            self._claim_now.set()

    async def _claim_until_draining(self) -> None:
        while not self._draining.is_set():
            await self._claim_now.wait()
            self._claim_now.clear()
            while await self._claim() or await self._claim(is_scoring=True):
                pass

    async def _claim(self, *, is_scoring: bool = False) -> bool:
        """Takes in the next jobs there is room for; False once there is nothing more to take now."""
        room = self._room_for_scoring() if is_scoring else self._room_for_chats()
        if room is None or self._draining.is_set():
            return False
        started_s = self._clock()
        claimed_jobs = await self._queue.call(
            "claim",
            lambda: self._claimer.claim(
                max_jobs=room.jobs,
                max_tokens=room.tokens,
                max_choices=room.choices,
                # Its last block may be all but empty, and another is kept free for it.
                tokens_per_choice=2 * self._loop.block_size,
                is_idle=room.is_idle,
                is_scoring=is_scoring,
            ),
            give_up=self._draining,
        )
        if not claimed_jobs:
            self._note_room()  # Whether it keeps itself for something to score may be another than before.
            return False
        failpoints.reach("worker.claimed")
        self._metrics.claim_seconds.observe(self._clock() - started_s)
        # A long log takes a while to replay.
        for job in await asyncio.to_thread(lambda: [self._make_job(claimed) for claimed in claimed_jobs]):
            self._take_in(job)
        return True

    def _room_for_chats(self) -> _Room | None:
        """What may be claimed to generate; None for nothing.

        An idle worker takes one job whatever its size: so one that can never fit is told so, and one that needs the
        whole worker gets it. Beside a job that is to run alone nothing is claimed, and nothing while one of those to be
        scored waits for this worker to be idle.
        """
        if self._claimer.keeps_itself_to_score:
            return None
        if not self._jobs:
            return _ROOM_OF_IDLE
        if self._has_solo() or self._is_unheard():
            return None
        expected_tokens = sum(
            job.kv_tokens_expected(_LOOKAHEAD_TOKENS, block_size=self._loop.block_size) for job in self._jobs.values()
        )
        slots = self._loop.max_sequences - self.num_sequences
        tokens = self._loop.kv_tokens_total - expected_tokens
        return _Room(jobs=slots, tokens=tokens, choices=slots) if slots > 0 and tokens > 0 else None

    def _room_for_scoring(self) -> _Room | None:
        """What may be claimed to score; None for nothing.

        A few small requests at a time, and the next ones only once they have ended: whatever is to run alone then finds
        an idle worker, and what is lost with a worker is little.
        """
        is_scoring = any(isinstance(job, ScoringJob) for job in self._jobs.values())
        if self._has_solo() or is_scoring or self._is_unheard():
            return None
        return _Room(jobs=_SCORING_JOBS, tokens=_ANY_SIZE, choices=_ANY_SIZE, is_idle=not self._jobs)

    def _is_unheard(self) -> bool:
        """No shard answers a push: what was claimed now could not keep its lease either."""
        return self._queue.num_unanswered("push") == self._claimer.num_shards

    def _has_solo(self) -> bool:
        return any(job.claimed.is_solo for job in self._jobs.values())

    def _take_in(self, job: HeldJob) -> None:
        claimed = job.claimed
        self._metrics.record_claim(claimed)
        lost = self._jobs.get(job.job_id)
        if lost is not None:  # Its lease had lapsed, unknown to us; this claim is its successor.
            self._drop(lost, PushStatus.FENCED)
        self._jobs[job.job_id] = job
        for part in job.parts:
            self._owners[part] = job
            self._loop.add(part)
        self._news.set()  # It may have ended already, or its lease be old.
        self._note_room()
        logger.info(
            "job claimed job_id=%s attempt=%d prompt_tokens=%d logged_tokens=%d choices=%d waited_ms=%d",
            job.job_id,
            claimed.attempt,
            num_prompt_tokens(claimed.job),
            claimed.end_position,
            claimed.job.n,
            claimed.waited_ms,
            extra=job.spans.log_fields,
        )

    def _make_job(self, claimed: ClaimedJob) -> HeldJob:
        now_s = self._clock()
        spans = JobSpans(self._tracer, claimed, clock=self._clock)
        try:
            if claimed.job.score_items:
                return ScoringJob(claimed, self._intake.accept_scoring(claimed), spans, now_s=now_s)
            return GeneratingJob(claimed, self._intake.accept(claimed), spans, now_s=now_s)
        except JobRefusedError as error:
            return RefusedJob(claimed, error.failed, spans, now_s=now_s)

    # --- Pushing

    async def _push_until_closing(self) -> None:
        """One push at a time for each shard: one that does not answer holds up no job of the others."""
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
                        quiet_until_s = self._clock() + _PUSH_INTERVAL_S
                delay_s = self._renew_after_s / 4
                if (quiet_s := quiet_until_s - self._clock()) > 0:
                    delay_s = min(delay_s, quiet_s)
                for shard, jobs in self._jobs_to_push().items():
                    wait_s = self._push_delay_s(shard, jobs)
                    if wait_s:
                        delay_s = min(delay_s, wait_s)
                    else:
                        self._pushed_s[shard] = self._clock()
                        self._pushing.add(shard)
                        pushes.create_task(self._push(shard, jobs), name=f"push to shard {shard}")

    def _jobs_to_push(self) -> dict[int, list[HeldJob]]:
        """Those with news, and those whose lease is to be renewed, by shard; none while a push to it is under way."""
        due_s = self._clock() - self._renew_after_s
        jobs = self._by_shard(job for job in self._jobs.values() if job.has_news or job.renewed_s < due_s)
        return {shard: of_shard for shard, of_shard in jobs.items() if shard not in self._pushing}

    def _by_shard(self, jobs: Iterable[HeldJob]) -> dict[int, list[HeldJob]]:
        by_shard: dict[int, list[HeldJob]] = defaultdict(list)
        for job in jobs:
            by_shard[self._claimer.shard_number(job.job_id)].append(job)
        return by_shard

    def _push_delay_s(self, shard: int, jobs: Sequence[HeldJob]) -> float:
        """How long these can wait for more to come; 0 if they must not."""
        if any(job.is_urgent for job in jobs):
            return 0.0
        return max(0.0, self._pushed_s[shard] + _PUSH_INTERVAL_S - self._clock())

    def _take(self, report: StepReport) -> None:
        self._metrics.record_step(report)
        if report.num_sequences:
            self._watchdog.record(report.step_s)
        self.num_generated_tokens += report.num_drawn_tokens
        for output in report.outputs:
            job = self._owners.get(output.part)
            if job is None:
                continue  # Dropped since.
            job.take(output, now_s=report.ended_s)
            if output.error is not None:
                self._evict(job)
            elif output.has_ended:
                del self._owners[output.part]
                self._note_more_room()

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
            if self._jobs.get(job.job_id) is not job:
                continue  # Claimed anew meanwhile.
            if status is not PushStatus.OK:
                self._drop(job, status)
            elif item.outcome is not None:  # It may have ended since: that goes with the next item.
                self._finish(job)

    def _finish(self, job: HeldJob) -> None:
        self._forget(job)
        self._metrics.record_end(job)
        job.end_spans(job.outcome)
        extra = job.spans.log_fields
        if job.failed is None:
            logger.info("job finished job_id=%s new_tokens=%d", job.job_id, job.num_new_tokens, extra=extra)
        elif isinstance(job, RefusedJob):
            fields = (job.job_id, job.failed.reason, job.failed.message)
            logger.warning("job refused job_id=%s reason=%s message=%s", *fields, extra=extra)
        else:
            logger.error("job failed job_id=%s reason=%s", job.job_id, job.failed.reason, extra=extra)

    def _drop(self, job: HeldJob, status: PushStatus) -> None:
        """The job is not ours any more: nothing of it is left here."""
        self._evict(job)
        self._forget(job)
        self._metrics.record_drop(status)
        job.end_spans(status.value)
        fields = (job.job_id, status.value, job.num_new_tokens)
        logger.info("job dropped job_id=%s status=%s new_tokens=%d", *fields, extra=job.spans.log_fields)

    def _evict(self, job: HeldJob) -> None:
        """The engine holds none of the job's parts."""
        for part in job.parts:
            if self._owners.pop(part, None) is not None:
                self._loop.remove(part)

    def _forget(self, job: HeldJob) -> None:
        del self._jobs[job.job_id]
        self._job_left.set()
        self._note_more_room()

    # --- Leaving

    async def _wait_until_drained(self) -> None:
        while self._jobs and (left_s := self._drain_ends_s - self._clock()) > 0:
            self._job_left.clear()
            await wait_at_most(self._job_left, left_s)

    async def _release_jobs(self) -> None:
        async with asyncio.TaskGroup() as releases:
            releases.create_task(self._release_unheard(), name="release what was claimed unheard")
            if self._jobs:
                failpoints.reach("worker.releasing")
            for shard, jobs in self._by_shard(self._jobs.values()).items():
                releases.create_task(self._release(jobs), name=f"release to shard {shard}")

    async def _release_unheard(self) -> None:
        try:
            num_jobs = await self._claimer.release_unheard()
        except QueueUnavailableError as error:
            logger.warning("a claim stays unanswered, leases of what it took will lapse error=%s", error)
        else:
            if num_jobs:
                logger.info("jobs of an unanswered claim released jobs=%d", num_jobs)

    async def _release(self, jobs: Sequence[HeldJob]) -> None:
        outcome = "released"
        try:
            await self._claimer.release([job.claimed for job in jobs])
        except QueueUnavailableError as error:
            logger.warning("jobs not released, their leases will lapse jobs=%d error=%s", len(jobs), error)
            outcome = "abandoned"
        for job in jobs:
            self._metrics.jobs.labels(outcome).inc()
            job.end_spans(outcome)
            fields = (outcome, job.job_id, job.num_new_tokens)
            logger.info("job left outcome=%s job_id=%s new_tokens=%d", *fields, extra=job.spans.log_fields)

    # --- Room

    def _note_room(self) -> None:
        """Lets the listening tasks listen only while there is room: a wake-up they take is one that others miss."""
        for event, room in ((self._room, self._room_for_chats()), (self._room_to_score, self._room_for_scoring())):
            if room is None:
                event.clear()
            else:
                event.set()

    def _note_more_room(self) -> None:
        """What did not fit before may fit now."""
        self._note_room()
        self._claim_now.set()


def _tries(items: list[PushItem]) -> Iterator[list[PushItem]]:
    """What is pushed at first and each time after that. By then leases that were young are not: all are renewed."""
    yield items
    yield from repeat([replace(item, renews=True) for item in items])
