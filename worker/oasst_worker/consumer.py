"""Between queue and engine: claims jobs while there is room, and gives back what is left at the end.

queue -> claim -> holdings -> engine's loop -> push -> queue
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from oasst_jobs import ClaimedJob, Claimer, QueueUnavailableError, failpoints
from oasst_telemetry import Tracer

from oasst_worker.generating import GeneratingJob
from oasst_worker.held import HeldJob
from oasst_worker.holdings import Holdings
from oasst_worker.intake import Intake, JobRefusedError
from oasst_worker.loop import EngineLoop, StepWatchdog
from oasst_worker.metrics import WorkerMetrics
from oasst_worker.pushing import PUSH_INTERVAL_S, Pusher
from oasst_worker.reaching import QueueCaller, wait_at_most
from oasst_worker.refused import RefusedJob
from oasst_worker.room import Room, room_for_chats, room_for_scoring
from oasst_worker.scoring import ScoringJob
from oasst_worker.spans import JobSpans

__all__ = ["Consumer"]

logger = logging.getLogger(__name__)

# How long to wait for word of new work before looking anyway.
_LISTEN_S = 1.0


class Consumer:
    """Keeps an engine busy with the queue's jobs. The engine's loop is started and stopped here."""

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
        self._tracer = tracer
        self._clock = clock
        # A lease that began this long ago is renewed; and no try to reach the queue comes later.
        renew_after_s = lease_s / 3
        self._queue = QueueCaller(metrics.queue_errors, longest_delay_s=renew_after_s, on_change=self._note_more_room)
        self._holdings = Holdings(loop, metrics, shard_number=claimer.shard_number, on_more_room=self._note_more_room)
        self._pusher = Pusher(
            claimer, loop, self._holdings, self._queue, metrics, watchdog, renew_after_s=renew_after_s, clock=clock
        )
        self._drain_ends_s = float("inf")
        # Set while there is room for one or the other.
        self._can_chat = asyncio.Event()
        self._can_score = asyncio.Event()
        # Wake-ups. Each is set by whoever changes something, and cleared by the one task that waits for it.
        self._claim_now = asyncio.Event()
        self._job_left = asyncio.Event()
        self._draining = asyncio.Event()  # One-way: no claims after it.

    @property
    def num_sequences(self) -> int:
        """Choices that run or wait in the engine."""
        return self._holdings.num_sequences

    @property
    def num_generated_tokens(self) -> int:
        """Since the start."""
        return self._pusher.num_generated_tokens

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
        self._loop.start(lambda: asyncio_loop.call_soon_threadsafe(self._pusher.wake), quiet_s=PUSH_INTERVAL_S)
        self._note_more_room()
        try:
            async with asyncio.TaskGroup() as tasks:
                listening = [
                    tasks.create_task(self._listen(self._can_chat, is_scoring=False), name="listen"),
                    tasks.create_task(self._listen(self._can_score, is_scoring=True), name="listen to score"),
                ]
                claiming = tasks.create_task(self._claim_until_draining(), name="claim")
                tasks.create_task(self._pusher.run(), name="push")
                try:
                    await self._draining.wait()
                    # A claim under way is not cancelled: its jobs would be nobody's for the length of a lease.
                    await claiming
                    for task in listening:
                        task.cancel()
                    await self._wait_until_drained()
                finally:
                    # Tasks end by these, not by cancellation alone: inside redis-py, Python 3.11 may swallow one.
                    self._draining.set()
                    self._claim_now.set()
                    self._pusher.close()
        finally:
            self._loop.stop()
        await self._release_jobs()

    # --- Claiming

    async def _listen(self, has_room: asyncio.Event, *, is_scoring: bool) -> None:
        """Has the claiming task look whenever there may be work, while there is room for it."""
        while not self._draining.is_set():
            await has_room.wait()
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
            self._holdings.take_in(job)
            self._pusher.wake()  # It may have ended already, or its lease be old.
            self._note_room()
        return True

    def _make_job(self, claimed: ClaimedJob) -> HeldJob:
        now_s = self._clock()
        spans = JobSpans(self._tracer, claimed, clock=self._clock)
        try:
            if claimed.job.score_items:
                return ScoringJob(claimed, self._intake.accept_scoring(claimed), spans, now_s=now_s)
            return GeneratingJob(claimed, self._intake.accept(claimed), spans, now_s=now_s)
        except JobRefusedError as error:
            return RefusedJob(claimed, error.failed, spans, now_s=now_s)

    # --- Room

    def _room_for_chats(self) -> Room | None:
        """Nothing while one that is to be scored alone waits for this worker to be idle."""
        if self._claimer.keeps_itself_to_score or self._pusher.is_unheard:
            return None
        return room_for_chats(
            self._holdings.jobs,
            free_slots=self._loop.max_sequences - self.num_sequences,
            kv_tokens=self._loop.kv_tokens_total,
            block_size=self._loop.block_size,
        )

    def _room_for_scoring(self) -> Room | None:
        return None if self._pusher.is_unheard else room_for_scoring(self._holdings.jobs)

    def _note_room(self) -> None:
        """Lets the listening tasks listen only while there is room: a wake-up they take is one that others miss."""
        for event, room in ((self._can_chat, self._room_for_chats()), (self._can_score, self._room_for_scoring())):
            if room is None:
                event.clear()
            else:
                event.set()

    def _note_more_room(self) -> None:
        """What did not fit before may fit now."""
        self._note_room()
        self._claim_now.set()
        self._job_left.set()

    # --- Leaving

    async def _wait_until_drained(self) -> None:
        while self._holdings.jobs and (left_s := self._drain_ends_s - self._clock()) > 0:
            self._job_left.clear()
            await wait_at_most(self._job_left, left_s)

    async def _release_jobs(self) -> None:
        async with asyncio.TaskGroup() as releases:
            releases.create_task(self._release_unheard(), name="release what was claimed unheard")
            if self._holdings.jobs:
                failpoints.reach("worker.releasing")
            for shard, jobs in self._holdings.by_shard(self._holdings.jobs).items():
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
            self._holdings.leave(job, outcome)
