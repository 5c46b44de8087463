"""The whole queue: one shard or several, each call to the shard that its job is in."""

import asyncio
import functools
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, compress
from typing import TypeVar

from oasst_jobs.connection import RedisClient, check_server, least_replicas, of_all, of_those_that_answer
from oasst_jobs.errors import OtherShardsError, QueueFullError, TenantFullError, TooMuchAheadError
from oasst_jobs.functions import PUSH_ITEMS_PER_CALL, WATCHED_PER_CALL, Shard
from oasst_jobs.library import LIBRARY, FunctionLibrary
from oasst_jobs.records import (
    DeadLetter,
    JobSnapshot,
    JobState,
    LogSnapshot,
    PushItem,
    PushStatus,
    QueueLoad,
    Submission,
    Submitted,
)

__all__ = ["QueueClient"]

T = TypeVar("T")
R = TypeVar("R")
Placed = TypeVar("Placed", Submitted, JobSnapshot)


class QueueClient:
    """Calls the functions of all shards.

    A job's shard follows from its id, so every process must name the same number of shards. With several, each holds
    its part of the jobs and orders them by itself: limits and places are then as exact as the parts are equal.
    """

    def __init__(self, redis: RedisClient, *, num_shards: int = 1, library: FunctionLibrary = LIBRARY) -> None:
        if num_shards < 1:
            raise ValueError(f"a queue has at least one shard, not {num_shards}")
        self.redis = redis
        self._num_shards = num_shards
        self._library = library
        self.shards = self._make_shards(num_shards)

    def shard_of(self, job_id: str) -> Shard:
        return self.shards[self.shard_number(job_id)]

    def shard_number(self, job_id: str) -> int:
        return zlib.crc32(job_id.encode()) % len(self.shards)

    async def check_server(self, *, may_spread_anew: bool = False) -> None:
        """The queue can be used: `load_functions` is done, and jobs are spread over as many shards as this client has.

        With `may_spread_anew` an empty queue takes this client's number: for whoever brings jobs.

        Raises:
            UnsupportedServerError, OtherShardsError: with a sentence that says what to change.
            QueueUnavailableError: if no shard answers, or one that may hold jobs spread over another number does not.
        """
        await check_server(self.redis)
        others = await self._other_numbers_of_shards()
        if may_spread_anew:
            await self._spread(others)
        else:
            self._refuse_others(others)

    async def load_functions(self) -> None:
        """The servers are new enough, keep what they are given, and have the functions, as far as they answer.

        Raises:
            UnsupportedServerError: with a sentence that says what to change.
            QueueUnavailableError: if no shard answers.
        """
        await check_server(self.redis)
        await self._other_numbers_of_shards()  # Any call loads the functions where they are missing.

    async def least_replicas(self) -> int:
        """How many replicas that server has which has the fewest, of those that are not away."""
        return await least_replicas(self.redis)

    async def enqueue(self, submission: Submission) -> Submitted:
        """Puts a job into its shard, which takes its part of what is allowed. Raises as Submitter.submit does."""
        limits, policy = submission.limits, submission.policy
        part = replace(
            submission,
            limits=replace(
                limits,
                max_waiting_jobs=self._part(limits.max_waiting_jobs),
                max_waiting_tokens=self._part(limits.max_waiting_tokens),
            ),
            policy=replace(
                policy,
                max_waiting_jobs=self._part(policy.max_waiting_jobs),
                max_waiting_tokens=self._part(policy.max_waiting_tokens),
            ),
            max_tokens_ahead=self._part(submission.max_tokens_ahead),
        )
        num_shards = len(self.shards)
        try:
            return self._over_all_shards(await self.shard_of(submission.job.job_id).enqueue(part))
        except (QueueFullError, TenantFullError) as error:
            raise type(error)(
                waiting_jobs=error.waiting_jobs * num_shards, waiting_tokens=error.waiting_tokens * num_shards
            ) from error
        except TooMuchAheadError as error:
            raise TooMuchAheadError(
                jobs_ahead=error.jobs_ahead * num_shards, tokens_ahead=error.tokens_ahead * num_shards
            ) from error

    async def attach(self, job_id: str, gateway_id: str) -> JobSnapshot | None:
        """Adds the gateway to a job's watchers."""
        snapshot = await self.shard_of(job_id).attach(job_id, gateway_id)
        return snapshot and self._over_all_shards(snapshot)

    async def keep_watching(self, gateway_id: str, job_ids: Sequence[str]) -> list[str]:
        """Puts off the end of any number of jobs that the gateway watches.

        Tells which of those that may still run do not name it as a watcher, of the shards that answer. Raises
        QueueUnavailableError only when none does.
        """
        by_shard = self._by_shard(job_ids, lambda job_id: job_id)

        async def keep_watching(shard: Shard) -> list[str]:
            unwatched: list[str] = []
            for part in _parts(by_shard[shard], WATCHED_PER_CALL):
                unwatched += compress(part, await shard.keep_watching(gateway_id, part))
            return unwatched

        return list(chain.from_iterable(await of_those_that_answer(map(keep_watching, by_shard))))

    async def unwatch(self, job_id: str, gateway_id: str) -> JobState | None:
        """Takes the gateway from a job's watchers; if it was the last, the job's grace begins. Tells its state."""
        return await self.shard_of(job_id).unwatch(job_id, gateway_id)

    async def status(self, job_id: str) -> JobSnapshot | None:
        snapshot = await self.shard_of(job_id).status(job_id)
        return snapshot and self._over_all_shards(snapshot)

    async def read(self, job_id: str, after: int) -> LogSnapshot | None:
        """What a job has logged behind position `after`."""
        return await self.shard_of(job_id).read(job_id, after)

    async def cancel(self, job_id: str) -> JobState | None:
        """Ends a job that has not ended. Tells the state it is in now."""
        return await self.shard_of(job_id).cancel(job_id)

    async def load(self, model: str) -> QueueLoad:
        """What the shards that answer hold for a model. Raises QueueUnavailableError only when none does."""
        loads = await of_those_that_answer(shard.load(model) for shard in self.shards)
        # Every worker tells every shard of itself.
        workers = {status.worker_id: (status, age_ms) for load in loads for status, age_ms in load.workers}
        return QueueLoad(
            waiting_jobs=sum(load.waiting_jobs for load in loads),
            waiting_tokens=sum(load.waiting_tokens for load in loads),
            running_jobs=sum(load.running_jobs for load in loads),
            dead_jobs=sum(load.dead_jobs for load in loads),
            workers=list(workers.values()),
            waiting_scoring_jobs=sum(load.waiting_scoring_jobs for load in loads),
            waiting_scoring_tokens=sum(load.waiting_scoring_tokens for load in loads),
        )

    async def push(self, worker_id: str, items: Sequence[PushItem], *, lease_ms: int) -> list[PushStatus]:
        """Applies any number of items, and tells their statuses in the same order."""
        statuses: dict[int, PushStatus] = {}
        by_shard = self._by_shard(range(len(items)), lambda index: items[index].job_id)

        async def push(shard: Shard) -> None:
            for part in _parts(by_shard[shard], PUSH_ITEMS_PER_CALL):
                answers = await shard.push(worker_id, [items[index] for index in part], lease_ms=lease_ms)
                statuses.update(zip(part, answers, strict=True))

        await of_all(map(push, by_shard))
        return [statuses[index] for index in range(len(items))]

    async def release(self, claims: Sequence[tuple[str, str]]) -> None:
        """Gives back jobs by id and fence."""

        by_shard = self._by_shard(claims, lambda claim: claim[0])

        async def release(shard: Shard) -> None:
            for part in _parts(by_shard[shard], PUSH_ITEMS_PER_CALL):
                await shard.release(part)

        await of_all(map(release, by_shard))

    async def wait_for_wake(self, model: str, timeout_s: float) -> None:
        """Returns when a job of the model was queued, and at the latest after the timeout or MAX_BLOCK_S.

        A shard that is away does not keep the others from being heard.
        """
        waits = [asyncio.ensure_future(shard.wait_for_wake(model, timeout_s)) for shard in self.shards]
        pending = set(waits)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if not pending or any(wait.exception() is None for wait in done):
                    break
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if all(wait.exception() is not None for wait in done):
            done.pop().result()

    async def dead(self, max_jobs: int) -> list[DeadLetter]:
        """Dead jobs of all shards, the last to die first."""
        letters = await self.on_each_shard(lambda shard: shard.dead(max_jobs))
        return sorted(chain.from_iterable(letters), key=lambda letter: letter.age_ms)[:max_jobs]

    async def revive(self, job_id: str) -> bool:
        """Has a dead job wait again. False: it was not dead."""
        return await self.shard_of(job_id).revive(job_id)

    async def on_each_shard(self, call: Callable[[Shard], Awaitable[R]]) -> list[R]:
        """The answers of all shards, in their order. All are asked at once; then the first error is raised."""
        return await of_all(map(call, self.shards))

    async def _other_numbers_of_shards(self) -> set[int]:
        """Numbers of shards that jobs are spread over, and that are not this client's; of the shards that answer."""
        told = await of_those_that_answer(shard.spreading() for shard in self.shards)
        return {num_shards for num_shards, _ in told if num_shards not in (None, self._num_shards)}

    async def _spread(self, others: set[int]) -> None:
        """Shards without a number have this client's, and so have all if there are no jobs by these others."""
        if not others:
            self._refuse_others(await of_those_that_answer(shard.spread() for shard in self.shards))
            return
        # Two steps, so that the number changes nowhere if there are jobs anywhere. Where one came in between, its shard
        # keeps the other number; and the first shard, which every start asks, is the last to change.
        shards = self._make_shards(max(self._num_shards, *others))
        for num_shards, has_jobs in await of_all(shard.spreading() for shard in shards):
            if has_jobs and num_shards != self._num_shards:
                raise OtherShardsError(num_shards=num_shards or max(others), wanted=self._num_shards)
        for shard in reversed(shards):
            self._refuse_others([await shard.spread()])

    def _refuse_others(self, told: Iterable[int]) -> None:
        """Raises OtherShardsError if jobs are spread over another number of shards than this client's."""
        if others := set(told) - {self._num_shards}:
            raise OtherShardsError(num_shards=max(others), wanted=self._num_shards)

    def _make_shards(self, number: int) -> tuple[Shard, ...]:
        make = functools.partial(Shard, self.redis, num_shards=self._num_shards, library=self._library)
        return tuple(map(make, range(number)))

    def _part(self, limit: int | None) -> int | None:
        """One shard's part of a limit for all."""
        return None if limit is None else -(-limit // len(self.shards))

    def _over_all_shards(self, placed: Placed) -> Placed:
        """The same with what is ahead in all shards, taken as equal to what is in its own."""
        if len(self.shards) == 1:
            return placed
        return replace(
            placed,
            queue_position=placed.queue_position * len(self.shards),
            tokens_ahead=placed.tokens_ahead * len(self.shards),
        )

    def _by_shard(self, things: Iterable[T], job_id_of: Callable[[T], str]) -> dict[Shard, list[T]]:
        by_shard: dict[Shard, list[T]] = defaultdict(list)
        for thing in things:
            by_shard[self.shard_of(job_id_of(thing))].append(thing)
        return by_shard


def _parts(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]
