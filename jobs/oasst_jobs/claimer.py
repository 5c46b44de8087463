"""The worker's side of the queue: jobs come out, tokens go back."""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence

from google.protobuf.message import DecodeError
from oasst.jobs.v1 import job_pb2

from oasst_jobs.client import QueueClient
from oasst_jobs.connection import of_all
from oasst_jobs.errors import QueueUnavailableError
from oasst_jobs.functions import ClaimReply, Shard, scoring_queue
from oasst_jobs.outcomes import malformed
from oasst_jobs.records import ClaimedJob, PushItem, PushStatus

__all__ = ["Claimer"]

# The sweep takes a lease that ends later than this for one made by a clock that jumped (MAX_LEASE_MS).
_MAX_LEASE_MS = 120_000

# A shard that did not answer twice rests for so many times as long as that took to see.
_REST = 5

# More choices than any job has.
_ANY_NUMBER = 2**31


class Claimer:
    """What one worker says to the queue. Every method may be repeated and raises QueueUnavailableError.

        claimer = Claimer(client, worker_id="worker-1", model="pythia")
        for claimed in await claimer.claim(max_jobs=8, max_tokens=16_384):
            ...
        statuses = await claimer.push([PushItem(claimed.job_id, claimed.fence, claimed.end_position, entry)])

    A lease is renewed by pushing. A worker that has nothing to push for a job, as during a long prefill, pushes an item
    without entry and outcome at least every third of the lease. Until its first token of a claim a job is suspected of
    killing its worker, should that be lost.
    """

    def __init__(
        self,
        client: QueueClient,
        *,
        worker_id: str,
        model: str,
        lease_ms: int = 4_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < lease_ms <= _MAX_LEASE_MS:
            raise ValueError(f"a lease is 1 to {_MAX_LEASE_MS} ms long, not {lease_ms}")
        self._client = client
        self._worker_id = worker_id
        self._model = model
        self._lease_ms = lease_ms
        # Names the next claim from each shard. It stays while a claim's answer is missing, so that the next call asks
        # for the same jobs again instead of leaving them to their leases.
        self._claim_ids = [secrets.token_hex(8) for _ in client.shards]
        # When that claim was asked for first; None before.
        self._asked_s: list[float | None] = [None for _ in client.shards]
        # Where the next claim from a queue begins: every shard comes first in its turn.
        self._first_shards = {model: 0, scoring_queue(model): 0}
        self._keeps_itself_to_score = False
        # A shard that did not answer is left alone for a while, so that one that hangs does not hide the others. Once
        # it answers again it is asked at once: it may have given jobs unheard, whose leases lapse.
        self._rests_until_s = [float("-inf")] * len(client.shards)
        self._clock = clock

    @property
    def num_shards(self) -> int:
        return len(self._client.shards)

    @property
    def keeps_itself_to_score(self) -> bool:
        """Whether the last claim to score got nothing because a job waits there that is to run alone, on this worker.

        It comes once the worker says that it is idle. Until then the worker should claim nothing else.
        """
        return self._keeps_itself_to_score

    def shard_number(self, job_id: str) -> int:
        """Which shard holds the job. What is pushed to one can be pushed while another does not answer."""
        return self._client.shard_number(job_id)

    async def claim(
        self,
        *,
        max_jobs: int,
        max_tokens: int,
        max_choices: int | None = None,
        tokens_per_choice: int = 0,
        is_idle: bool = False,
        is_scoring: bool = False,
    ) -> list[ClaimedJob]:
        """These jobs are this worker's now, in the queue's order, or those of a claim before whose answer was lost.

        `max_tokens` bounds the positions that all of them may come to hold: prompts, all tokens that every choice may
        generate, and `tokens_per_choice` more for each; `max_choices` bounds their choices. A job that does not fit is
        passed over for a while; then this worker may get nothing behind it until it does fit. So whoever is idle should
        offer all it has. Only a worker that says it is idle gets a job that is to run alone, and then no other. With
        `is_scoring` these are jobs to be scored, which have a queue of their own.

        Jobs come from the shards that answer; only if none does, that is raised.
        """
        queue = self._queue(is_scoring)
        away: QueueUnavailableError | None = None
        has_answered = False
        for number in self._shards_to_ask(queue):
            self._first_shards[queue] = (number + 1) % self.num_shards
            tried_s, is_repeated = self._clock(), self._asked_s[number] is not None
            try:
                claims, is_kept = await self._claim_from(
                    number,
                    queue,
                    max_jobs=max_jobs,
                    max_tokens=max_tokens,
                    max_choices=_ANY_NUMBER if max_choices is None else max_choices,
                    tokens_per_choice=tokens_per_choice,
                    is_idle=is_idle,
                )
            except QueueUnavailableError as error:
                away = error
                if is_repeated:  # The first time it may have given jobs, which are soon asked for again.
                    self._rests_until_s[number] = self._clock() + _REST * (self._clock() - tried_s)
                continue
            has_answered = True
            if is_kept:
                self._first_shards[queue] = number
            if is_scoring:
                self._keeps_itself_to_score = is_kept and not claims
            if claims or is_kept:
                return claims
        if away is not None and not has_answered:
            raise away
        return []

    async def _claim_from(
        self,
        number: int,
        queue: str,
        *,
        max_jobs: int,
        max_tokens: int,
        max_choices: int,
        tokens_per_choice: int,
        is_idle: bool,
    ) -> tuple[list[ClaimedJob], bool]:
        """One shard's jobs for the claim, and whether the worker keeps itself for another; as Shard.claim."""
        asked_s = self._asked_s[number]
        if asked_s is None:
            asked_s = self._asked_s[number] = self._clock()
        replies, is_kept = await self._client.shards[number].claim(
            self._worker_id,
            self._claim_ids[number],
            model=queue,
            lease_ms=self._lease_ms,
            max_jobs=max_jobs,
            max_tokens=max_tokens,
            max_choices=max_choices,
            tokens_per_choice=tokens_per_choice,
            is_idle=is_idle,
        )
        claims = [claimed for reply in replies if (claimed := await self._read_claim(reply, asked_s)) is not None]
        self._claim_ids[number], self._asked_s[number] = secrets.token_hex(8), None
        return claims, is_kept

    def _shards_to_ask(self, queue: str) -> list[int]:
        """Every shard, the one whose turn it is first; without those that rest, unless all do."""
        first = self._first_shards[queue]
        in_turn = [(first + offset) % self.num_shards for offset in range(self.num_shards)]
        now_s = self._clock()
        return [number for number in in_turn if self._rests_until_s[number] <= now_s] or in_turn

    async def wait_for_work(self, timeout_s: float, *, is_scoring: bool = False) -> None:
        """Returns when a job has been queued; otherwise after the timeout, or somewhat earlier."""
        await self._client.wait_for_wake(self._queue(is_scoring), timeout_s)

    async def push(self, items: Sequence[PushItem]) -> list[PushStatus]:
        """Each item is in its job's log and on its way to whoever watches, or its status says why not.

        After QueueUnavailableError the same items are pushed again, unchanged, before any later ones: those that had
        been applied are recognised by their positions.
        """
        return await self._client.push(self._worker_id, items, lease_ms=self._lease_ms)

    async def release(self, claims: Iterable[ClaimedJob]) -> None:
        """The jobs that were still this worker's wait again, at their old places. No attempt is charged."""
        held = [(claimed.job_id, claimed.fence) for claimed in claims]
        if held:
            await self._client.release(held)

    async def release_unheard(self) -> int:
        """What claims took whose answers were lost waits again, like anything released. Tells how many jobs those are.

        For whoever claims no more: the next claim would bring them.
        """
        unheard = [number for number, asked_s in enumerate(self._asked_s) if asked_s is not None]
        return sum(await of_all(map(self._release_unheard, unheard)))

    async def _release_unheard(self, number: int) -> int:
        claims, _ = await self._claim_from(
            number, self._model, max_jobs=0, max_tokens=0, max_choices=0, tokens_per_choice=0, is_idle=False
        )
        await self.release(claims)
        return len(claims)

    async def heartbeat(self, status: job_pb2.WorkerStatus) -> None:
        """The queue's load shows this status, for a while."""

        async def beat(shard: Shard) -> None:
            await shard.heartbeat(status)
            self._rests_until_s[shard.keys.shard] = float("-inf")

        await self._client.on_each_shard(beat)

    def _queue(self, is_scoring: bool) -> str:
        return scoring_queue(self._model) if is_scoring else self._model

    async def _read_claim(self, reply: ClaimReply, asked_s: float) -> ClaimedJob | None:
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
                is_solo=bool(reply.is_solo),
                is_first_claim=bool(reply.is_first_claim),
                asked_s=asked_s,
            )
        except DecodeError:
            await self.push([PushItem(reply.job_id, reply.fence, reply.end_position, outcome=malformed())])
            return None
