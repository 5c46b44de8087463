"""The queue as a gateway sees it, for tests of workers."""

from oasst.jobs.v1.job_pb2 import Job
from oasst_jobs import JobState, LogSnapshot, QueueClient, QueueLimits, Submitter, Sweeper
from waiting import until

__all__ = ["Queue", "choice_text"]


class Queue:
    """What a gateway does, and what time does to leases and deadlines."""

    def __init__(self, client: QueueClient) -> None:
        self.client = client
        self.sweeper = Sweeper(client, stall_s=3600)
        self._submitter = Submitter(client, gateway_id="gateway", limits=QueueLimits())

    async def submit(self, job: Job) -> str:
        await self._submitter.submit(job, digest=b"", timeout_ms=None)
        return job.job_id

    async def state(self, job_id: str) -> JobState:
        snapshot = await self.client.status(job_id)
        assert snapshot is not None
        return snapshot.state

    async def log(self, job_id: str) -> LogSnapshot:
        log = await self.client.read(job_id, 0)
        assert log is not None
        return log

    async def ended(self, job_id: str) -> LogSnapshot:
        """The log of a job once it has ended."""
        await until(lambda: self._has_ended(job_id))
        return await self.log(job_id)

    async def charge(self, job_id: str) -> int:
        """How much the job is suspected of killing workers."""
        key = f"{self.client.shard_of(job_id).keys.root}:job:{job_id}"
        return int(await self.client.redis.hget(key, "charge") or 0)

    async def expire(self, job_id: str) -> None:
        """The job's deadline has passed; no sweep has seen it yet."""
        await self.client.redis.hset(f"{self.client.shard_of(job_id).keys.root}:job:{job_id}", "deadline_ms", 1)

    async def lose_lease(self, job_id: str) -> None:
        """The job's worker was silent for longer than its lease, and the job has gone back in line."""

        async def is_swept() -> bool:
            await self.client.redis.zadd(self._leases(job_id), {job_id: 1})
            return (await self.sweeper.sweep()).requeued == 1

        await until(is_swept)  # A push that is under way may renew it in between.

    async def lease_ends_ms(self, job_id: str) -> float:
        """When the job's lease lapses, on the queue's clock."""
        return await self.client.redis.zscore(self._leases(job_id), job_id)

    def _leases(self, job_id: str) -> str:
        return f"{self.client.shard_of(job_id).keys.root}:leases"

    async def _has_ended(self, job_id: str) -> bool:
        return (await self.state(job_id)).is_terminal


def choice_text(log: LogSnapshot, choice: int = 0) -> str:
    """The text of a choice, whose deltas must follow each other without gap or repeat."""
    deltas = [delta for entry in log.entries for delta in entry.deltas if delta.choice == choice]
    position = 0
    for delta in deltas:
        assert delta.position == position
        position += len(delta.token_ids)
    return "".join(delta.text for delta in deltas)
