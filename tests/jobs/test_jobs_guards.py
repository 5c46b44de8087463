"""Every guard is needed: with one of them taken out of the functions, the test that stands for it fails.

Each mutant is the library without one check. The scenario that a guard protects is run on the real library, where it
must hold, and on the mutant, where it must not.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import redis.asyncio
from job_samples import MODEL, make_entry, make_job
from oasst_jobs import Claimer, PushItem, PushStatus, QueueClient, QueueLimits, Submitter, Sweeper
from oasst_jobs.library import LIBRARY, FunctionLibrary


def without(check: str, *, replacement: str = "") -> FunctionLibrary:
    """The library with one piece of its text taken out."""
    if LIBRARY.source.count(check) != 1:
        raise ValueError(f"the functions hold {LIBRARY.source.count(check)} of {check!r}")
    return FunctionLibrary(LIBRARY.source.replace(check, replacement))


@dataclass
class Queue:
    """A queue with one claimed job of three logged tokens."""

    client: QueueClient
    redis: redis.asyncio.Redis
    job_id: str
    fence: str

    @classmethod
    async def open(cls, redis_client: redis.asyncio.Redis, library: FunctionLibrary) -> "Queue":
        client = QueueClient(redis_client, library=library)
        job = make_job("guarded", max_new_tokens=100)
        submitter = Submitter(client, gateway_id="gateway", limits=QueueLimits())
        await submitter.submit(job, digest=b"digest", timeout_ms=None)
        worker = Claimer(client, worker_id="first", model=MODEL)
        [claimed] = await worker.claim(max_jobs=1, max_tokens=1000)
        await worker.push([PushItem(job.job_id, claimed.fence, 0, make_entry(0, 3))])
        return cls(client, redis_client, job.job_id, claimed.fence)

    async def push(self, fence: str, start: int, stop: int) -> PushStatus:
        item = PushItem(self.job_id, fence, start, make_entry(start, stop))
        [status] = await self.client.push("worker", [item], lease_ms=10_000)
        return status

    async def positions(self) -> list[int]:
        """The tokens that are logged, in the order of the log."""
        log = await self.client.read(self.job_id, 0)
        assert log is not None
        return [token for entry in log.entries for delta in entry.deltas for token in delta.token_ids]

    async def sweep(self) -> None:
        await Sweeper(self.client, stall_s=9.0).sweep()  # Shorter than the stall below, longer than one by accident.

    async def lose_lease(self) -> None:
        await self.redis.zadd(f"{self.client.shards[0].keys.root}:leases", {self.job_id: 1})


async def zombie_writes_nothing(queue: Queue) -> None:
    await queue.sweep()
    await queue.lose_lease()
    await queue.sweep()
    heir = Claimer(queue.client, worker_id="heir", model=MODEL)
    [claimed] = await heir.claim(max_jobs=1, max_tokens=1000)
    await queue.push(claimed.fence, 3, 4)
    assert await queue.push(queue.fence, 4, 5) is PushStatus.FENCED
    assert await queue.positions() == [0, 1, 2, 3]


async def log_has_no_gap(queue: Queue) -> None:
    assert await queue.push(queue.fence, 5, 6) is PushStatus.POSITION
    assert await queue.positions() == [0, 1, 2]


async def log_has_no_repeat(queue: Queue) -> None:
    # The job's hash lost a write that the stream did not lose.
    await queue.redis.hset(f"{queue.client.shards[0].keys.root}:job:{queue.job_id}", "end_position", 1)
    assert await queue.push(queue.fence, 1, 3) is PushStatus.POSITION
    assert await queue.positions() == [0, 1, 2]


async def stall_costs_nobody_its_job(queue: Queue) -> None:
    root = queue.client.shards[0].keys.root
    await queue.sweep()
    await queue.redis.hincrby(f"{root}:counters", "swept_ms", -10_000)
    await queue.lose_lease()
    await queue.sweep()
    assert await queue.push(queue.fence, 3, 4) is PushStatus.OK


async def restart_costs_nobody_its_job(queue: Queue) -> None:
    await queue.sweep()
    await queue.redis.hset(f"{queue.client.shards[0].keys.root}:counters", "swept_run", "another")
    await queue.lose_lease()
    await queue.sweep()
    assert await queue.push(queue.fence, 3, 4) is PushStatus.OK


async def end_is_final(queue: Queue) -> None:
    await queue.client.cancel(queue.job_id)
    assert await queue.push(queue.fence, 3, 4) is PushStatus.CANCELLED
    assert await queue.positions() == [0, 1, 2]


GUARDS: list[tuple[Callable[[Queue], Awaitable[None]], FunctionLibrary]] = [
    (zombie_writes_nothing, without("job.fence ~= fence", replacement="false")),
    (log_has_no_gap, without("job.end_position == start then", replacement="true then")),
    (
        log_has_no_repeat,
        without(
            "redis.pcall('XADD', shard.root .. ':log:' .. job.id, stop .. '-0',",
            replacement="redis.pcall('XADD', shard.root .. ':log:' .. job.id, '*',",
        ),
    ),
    (stall_costs_nobody_its_job, without("or swept_ms and math.abs(shard.now_ms - swept_ms) > stall_ms")),
    (restart_costs_nobody_its_job, without("is_another_run(shard) or", replacement="false or")),
    (end_is_final, without("job.state == 'cancelled' or job.state == 'expired'", replacement="false")),
]
NAMES = [scenario.__name__ for scenario, _ in GUARDS]


@pytest.mark.parametrize(("scenario", "mutant"), GUARDS, ids=NAMES)
async def test_a_guard_holds_and_without_it_its_test_fails(
    redis_client: redis.asyncio.Redis,
    scenario: Callable[[Queue], Awaitable[None]],
    mutant: FunctionLibrary,
) -> None:
    await scenario(await Queue.open(redis_client, LIBRARY))
    await redis_client.flushall()
    with pytest.raises(AssertionError):
        await scenario(await Queue.open(redis_client, mutant))


async def test_after_a_real_restart_longer_than_the_lease_nobody_loses_its_job(
    valkey, redis_client: redis.asyncio.Redis, client: QueueClient
) -> None:
    queue = await Queue.open(redis_client, LIBRARY)
    sweeper = Sweeper(client, interval_s=0.01)
    await sweeper.sweep()
    brief = Claimer(client, worker_id="brief", model=MODEL, lease_ms=200)
    await brief.push([PushItem(queue.job_id, queue.fence, 3, make_entry(3, 4))])
    valkey.kill()
    await asyncio.sleep(0.4)
    valkey.start()
    report = await sweeper.sweep()
    assert (report.amnestied, report.requeued) == (1, 0)
    assert await queue.push(queue.fence, 4, 5) is PushStatus.OK
