"""The gateway's side of the queue: jobs go in, are asked about, and are cancelled."""

import hashlib
from collections.abc import Sequence

from oasst.jobs.v1 import job_pb2

from oasst_jobs.client import QueueClient
from oasst_jobs.records import (
    Durability,
    JobSnapshot,
    JobState,
    LogSnapshot,
    QueueLimits,
    QueueLoad,
    Submission,
    Submitted,
    TenantPolicy,
)

__all__ = ["Submitter", "job_id_for"]

_NO_POLICY = TenantPolicy()


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
        for news in await subscription.take(): ...
    """

    def __init__(
        self,
        client: QueueClient,
        *,
        gateway_id: str,
        limits: QueueLimits,
        durability: Durability = Durability.LOCAL,
    ) -> None:
        if not gateway_id or gateway_id.split() != [gateway_id]:
            raise ValueError(f"a gateway id is one word, {gateway_id!r} is not")
        self._client = client
        self._gateway_id = gateway_id
        self._limits = limits
        self._durability = durability

    @property
    def num_shards(self) -> int:
        return len(self._client.shards)

    def shard_number(self, job_id: str) -> int:
        """Which shard holds the job, or would. One may answer while another does not."""
        return self._client.shard_number(job_id)

    async def submit(
        self,
        job: job_pb2.Job,
        *,
        digest: bytes,
        timeout_ms: int | None,
        policy: TenantPolicy = _NO_POLICY,
        max_tokens_ahead: int | None = None,
        grace_ms: int | None = None,
        is_watched: bool = True,
    ) -> Submitted:
        """The job is in the queue, and this gateway watches it. If it was there before, it is as it was.

        `digest` is of the request as its client sent it. A new job is let in if what waits stays within the gateway's
        limits and the tenant's policy, and if no more than `max_tokens_ahead` would be served before it: what can be
        served until its deadline.

        With a grace, the job ends so long after nobody watches it any more; without one it goes on in any case. With
        `is_watched` off, this gateway does not watch it.

        Raises:
            RequestConflictError: if the id was used before with another digest.
            QueueFullError, TenantFullError, TooMuchAheadError, PoisonedPromptError: if it is not let in; all of them
                are JobNotAcceptedError.
        """
        return await self._client.enqueue(
            Submission(
                job=job,
                digest=digest,
                limits=self._limits,
                policy=policy,
                max_tokens_ahead=max_tokens_ahead,
                timeout_ms=timeout_ms,
                grace_ms=grace_ms,
                gateway_id=self._gateway_id if is_watched else "",
                durability=self._durability,
            )
        )

    async def attach(self, job_id: str) -> JobSnapshot | None:
        """This gateway watches the job from now on. None: there is no such job."""
        return await self._client.attach(job_id, self._gateway_id)

    async def keep_watching(self, job_ids: Sequence[str]) -> list[str]:
        """This gateway goes on watching the jobs. To be said every few seconds; after a minute of silence it counts as
        gone.

        Tells which of those that may still run the queue does not know it to watch: it has left them, or the queue has
        lost that it came. Then `attach` says so again.
        """
        return await self._client.keep_watching(self._gateway_id, job_ids)

    async def unwatch(self, job_id: str) -> JobState | None:
        """This gateway does not watch the job any more; if nobody does, the job's grace begins. Tells its state."""
        return await self._client.unwatch(job_id, self._gateway_id)

    async def read(self, job_id: str) -> LogSnapshot | None:
        """All that the job has generated. None: there is no such job."""
        return await self._client.read(job_id, 0)

    async def cancel(self, job_id: str) -> JobState | None:
        """The job has ended, by this or before. Tells its state; None: there is no such job.

        Its worker learns of it from its next push.
        """
        return await self._client.cancel(job_id)

    async def status(self, job_id: str) -> JobSnapshot | None:
        """The job as it is now. None: there is no such job."""
        return await self._client.status(job_id)

    async def load(self, model: str) -> QueueLoad:
        """How much waits for a model and runs, and on which workers."""
        return await self._client.load(model)
