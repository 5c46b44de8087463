"""The jobs that a worker holds, and their parts in the engine: where a job comes in, and the one place where it leaves.

taken in -> ( finished | dropped | left )
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from oasst_jobs import PushStatus, num_prompt_tokens

from oasst_worker.choice import Choice
from oasst_worker.held import HeldJob
from oasst_worker.loop import EngineLoop, StepReport
from oasst_worker.metrics import WorkerMetrics
from oasst_worker.parts import Part
from oasst_worker.refused import RefusedJob

__all__ = ["Holdings"]

logger = logging.getLogger(__name__)


class Holdings:
    """Owns every job from its claim until its outcome is logged, it is lost, or it is given back."""

    def __init__(
        self,
        loop: EngineLoop,
        metrics: WorkerMetrics,
        *,
        shard_number: Callable[[str], int],
        on_more_room: Callable[[], object],
    ) -> None:
        """`shard_number` of a job's id; `on_more_room` is called when a job, or one of its parts, has left."""
        self._loop = loop
        self._metrics = metrics
        self._shard_number = shard_number
        self._on_more_room = on_more_room
        self._jobs: dict[str, HeldJob] = {}
        self._owners: dict[Part, HeldJob] = {}  # Parts that belong in the engine.

    @property
    def jobs(self) -> Collection[HeldJob]:
        return self._jobs.values()

    @property
    def num_sequences(self) -> int:
        """Choices that run or wait in the engine."""
        return sum(isinstance(part, Choice) for part in self._owners)

    def holds(self, job: HeldJob) -> bool:
        """Whether it is here still, and not claimed anew meanwhile."""
        return self._jobs.get(job.job_id) is job

    def by_shard(self, jobs: Iterable[HeldJob]) -> dict[int, list[HeldJob]]:
        by_shard: dict[int, list[HeldJob]] = defaultdict(list)
        for job in jobs:
            by_shard[self._shard_number(job.job_id)].append(job)
        return by_shard

    def take_in(self, job: HeldJob) -> None:
        """The job is held, and the engine has its parts."""
        claimed = job.claimed
        self._metrics.record_claim(claimed)
        lost = self._jobs.get(job.job_id)
        if lost is not None:  # Its lease had lapsed, unknown to us; this claim is its successor.
            self.drop(lost, PushStatus.FENCED)
        self._jobs[job.job_id] = job
        for part in job.parts:
            self._owners[part] = job
            self._loop.add(part)
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

    def take(self, report: StepReport) -> None:
        """The jobs have what a turn of the loop gave them."""
        for output in report.outputs:
            job = self._owners.get(output.part)
            if job is None:
                continue  # Dropped since.
            job.take(output, now_s=report.ended_s)
            if output.error is not None:
                self._evict(job)
            elif output.has_ended:
                del self._owners[output.part]
                self._on_more_room()

    def finish(self, job: HeldJob) -> None:
        """The job has gone with its own outcome, which is logged."""
        self._end(job, job.outcome)
        self._metrics.record_end(job)
        extra = job.spans.log_fields
        if job.failed is None:
            logger.info("job finished job_id=%s new_tokens=%d", job.job_id, job.num_new_tokens, extra=extra)
        elif isinstance(job, RefusedJob):
            fields = (job.job_id, job.failed.reason, job.failed.message)
            logger.warning("job refused job_id=%s reason=%s message=%s", *fields, extra=extra)
        else:
            logger.error("job failed job_id=%s reason=%s", job.job_id, job.failed.reason, extra=extra)

    def drop(self, job: HeldJob, status: PushStatus) -> None:
        """The job has gone: it is not ours any more."""
        self._end(job, status.value)
        self._metrics.record_drop(status)
        fields = (job.job_id, status.value, job.num_new_tokens)
        logger.info("job dropped job_id=%s status=%s new_tokens=%d", *fields, extra=job.spans.log_fields)

    def leave(self, job: HeldJob, outcome: str) -> None:
        """The job has gone to whichever worker comes next: released, or abandoned to its lease."""
        self._end(job, outcome)
        self._metrics.jobs.labels(outcome).inc()
        fields = (outcome, job.job_id, job.num_new_tokens)
        logger.info("job left outcome=%s job_id=%s new_tokens=%d", *fields, extra=job.spans.log_fields)

    def _end(self, job: HeldJob, outcome: str) -> None:
        """Nothing of the job is left here."""
        self._evict(job)
        del self._jobs[job.job_id]
        job.end_spans(outcome)
        self._on_more_room()

    def _evict(self, job: HeldJob) -> None:
        """The engine holds none of the job's parts."""
        for part in job.parts:
            if self._owners.pop(part, None) is not None:
                self._loop.remove(part)
