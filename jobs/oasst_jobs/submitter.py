"""The gateway's side of the queue: jobs go in, are asked about, and are cancelled."""

import hashlib
import random

from oasst.jobs.v1 import job_pb2

from oasst_jobs.errors import QueueFullError
from oasst_jobs.functions import QueueClient
from oasst_jobs.records import JobSnapshot, JobState, QueueLimits, QueueLoad, Submitted

__all__ = ["Submitter", "job_id_for"]

_RETRY_AFTER_WITHOUT_SPEED_S = 1.0
_MIN_RETRY_AFTER_S = 0.2
_MAX_RETRY_AFTER_S = 30.0


def job_id_for(tenant: str, request_id: str) -> str:
    """The internal id of a tenant's request: the same for the same two, and nothing that a client could choose."""
    tenant_bytes = tenant.encode()
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    named = len(tenant_bytes).to_bytes(4) + tenant_bytes + request_id.encode()
    return hashlib.blake2b(named, digest_size=20, person=b"oasst.jobs.v1").hexdigest()


class Submitter:
    """What one gateway says to the queue. Every method may be repeated and raises QueueUnavailableError.

    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits())
    async with inbox.subscribe(job.job_id) as subscription:
        await submitter.submit(job, digest=digest, timeout_ms=60_000)
        async for news in subscription: ...
    """

    def __init__(self, client: QueueClient, *, gateway_id: str, limits: QueueLimits) -> None:
        if not gateway_id or gateway_id.split() != [gateway_id]:
            raise ValueError(f"a gateway id is one word, {gateway_id!r} is not")
        self._client = client
        self._gateway_id = gateway_id
        self._limits = limits

    async def submit(self, job: job_pb2.Job, *, digest: bytes, timeout_ms: int | None) -> Submitted:
        """The job is in the queue, and this gateway watches it. If it was there before, it is as it was.

        `digest` is of the request as its client sent it.

        Raises:
            RequestConflictError: if the id was used before with another digest.
            QueueFullError: if as many jobs wait as are allowed to.
        """
        submitted = await self._client.enqueue(
            job,
            digest=digest,
            timeout_ms=timeout_ms,
            retention_ms=round(self._limits.retention_s * 1000),
            max_waiting_jobs=self._limits.max_waiting_jobs,
            gateway_id=self._gateway_id,
        )
        if submitted is None:
            load = await self._client.load()
            raise QueueFullError(load.waiting_jobs, _retry_after_s(load))
        return submitted

    async def attach(self, job_id: str) -> JobSnapshot | None:
        """This gateway watches the job from now on. None: there is no such job."""
        return await self._client.attach(job_id, self._gateway_id)

    async def cancel(self, job_id: str) -> JobState | None:
        """The job has ended, by this or before. Tells its state; None: there is no such job.

        Its worker learns of it from its next push.
        """
        return await self._client.cancel(job_id)

    async def status(self, job_id: str) -> JobSnapshot | None:
        """The job as it is now. None: there is no such job."""
        return await self._client.status(job_id)

    async def load(self) -> QueueLoad:
        """How much waits and runs, and on which workers."""
        return await self._client.load()


def _retry_after_s(load: QueueLoad) -> float:
    """How long the waiting jobs should take, spread so that those refused together do not come back together."""
    tokens_per_second = sum(status.tokens_per_second for status, _ in load.workers)
    wait_s = load.waiting_tokens / tokens_per_second if tokens_per_second > 0 else _RETRY_AFTER_WITHOUT_SPEED_S
    spread = random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries, protects nothing
    return min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S) * spread
