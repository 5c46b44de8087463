"""The worker's side of the queue: jobs come out, tokens go back."""

import secrets
from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError
from oasst.jobs.v1 import job_pb2

from oasst_jobs.errors import FencedError
from oasst_jobs.functions import PUSH_ITEMS_PER_CALL, ClaimReply, QueueClient
from oasst_jobs.outcomes import malformed
from oasst_jobs.records import ClaimedJob, PushItem, PushStatus

__all__ = ["Claimer"]

# The sweep takes a lease that ends later than this for one made by a clock that jumped (MAX_LEASE_MS).
_MAX_LEASE_MS = 120_000


class Claimer:
    """What one worker says to the queue. Every method may be repeated and raises QueueUnavailableError.

        claimer = Claimer(client, worker_id="worker-1", model="pythia")
        for claimed in await claimer.claim(max_jobs=8, max_tokens=16_384):
            ...
        statuses = await claimer.push([PushItem(claimed.job_id, claimed.fence, claimed.end_position, entry)])

    A lease is renewed by pushing. A worker that has nothing to push for a job, as during a long prefill, pushes an item
    without entry and outcome at least every third of the lease.
    """

    def __init__(self, client: QueueClient, *, worker_id: str, model: str, lease_ms: int = 10_000) -> None:
        if not 0 < lease_ms <= _MAX_LEASE_MS:
            raise ValueError(f"a lease is 1 to {_MAX_LEASE_MS} ms long, not {lease_ms}")
        self._client = client
        self._worker_id = worker_id
        self._model = model
        self._lease_ms = lease_ms
        # Names the next claim. It stays while a claim's answer is missing, so that the next call asks for the same
        # jobs again instead of leaving them to their leases.
        self._claim_id = secrets.token_hex(8)

    async def claim(self, *, max_jobs: int, max_tokens: int) -> list[ClaimedJob]:
        """These jobs are this worker's now: most urgent first, then by arrival.

        `max_tokens` bounds the positions that all of them may come to hold: prompts, and all tokens that every choice
        may generate. The first job that does not fit ends the claim, so that large jobs are not overtaken for ever;
        whoever is idle should therefore offer all it has.
        """
        replies = await self._client.claim(
            self._worker_id,
            self._claim_id,
            model=self._model,
            lease_ms=self._lease_ms,
            max_jobs=max_jobs,
            max_tokens=max_tokens,
        )
        claims = [claimed for reply in replies if (claimed := await self._read_claim(reply)) is not None]
        self._claim_id = secrets.token_hex(8)
        return claims

    async def wait_for_work(self, timeout_s: float) -> None:
        """Returns when a job has been queued; otherwise after the timeout, or somewhat earlier."""
        await self._client.wait_for_wake(self._model, timeout_s)

    async def push(self, items: Sequence[PushItem]) -> list[PushStatus]:
        """Each item is in its job's log and on its way to whoever watches, or its status says why not.

        After QueueUnavailableError the same items are pushed again, unchanged, before any later ones: those that had
        been applied are recognised by their positions.
        """
        statuses: list[PushStatus] = []
        for start in range(0, len(items), PUSH_ITEMS_PER_CALL):
            chunk = items[start : start + PUSH_ITEMS_PER_CALL]
            statuses += await self._client.push(chunk, lease_ms=self._lease_ms)
        return statuses

    async def finish(self, claimed: ClaimedJob, outcome: job_pb2.Outcome) -> None:
        """The job has ended without a token of this attempt.

        Raises:
            FencedError: if it was no longer this worker's to end.
        """
        item = PushItem(claimed.job_id, claimed.fence, claimed.end_position, outcome=outcome)
        (status,) = await self.push([item])
        if status is not PushStatus.OK:
            raise FencedError(claimed.job_id, status.value)

    async def release(self, claims: Iterable[ClaimedJob]) -> None:
        """The jobs that were still this worker's wait again, at their old places. No attempt is charged."""
        held = [(claimed.job_id, claimed.fence) for claimed in claims]
        if held:
            await self._client.release(held)

    async def heartbeat(self, status: job_pb2.WorkerStatus) -> None:
        """The queue's load shows this status, for a while."""
        await self._client.heartbeat(status)

    async def _read_claim(self, reply: ClaimReply) -> ClaimedJob | None:
        """The claimed job; None if its bytes cannot be read, and then it has failed."""
        try:
            return ClaimedJob(
                job_id=reply.job_id,
                fence=reply.fence,
                job=job_pb2.Job.FromString(reply.job),
                log=[job_pb2.LogEntry.FromString(entry) for entry in reply.log],
                end_position=reply.end_position,
                attempt=reply.attempt,
                waited_ms=reply.waited_ms,
                remaining_ms=reply.remaining_ms,
            )
        except DecodeError:
            await self.push([PushItem(reply.job_id, reply.fence, reply.end_position, outcome=malformed())])
            return None
