"""How a job that nobody watches any more ends, and how whoever watches keeps it alive."""

import pytest
import redis.asyncio
from job_samples import make_job
from oasst_jobs import JobState, QueueClient, QueueLimits, Submitter, Sweeper, SweepReport

WATCH_MS = 60_000


@pytest.fixture
def other(client: QueueClient) -> Submitter:
    """A second gateway."""
    return Submitter(client, gateway_id="gateway-2", limits=QueueLimits())


@pytest.fixture
def pass_time(redis_client: redis.asyncio.Redis, client: QueueClient):
    """So many milliseconds are over, as far as watching goes."""

    async def pass_ms(elapsed_ms: int) -> None:
        watched = f"{client.shards[0].keys.root}:watched"
        for job_id in await redis_client.zrange(watched, 0, -1):
            await redis_client.zincrby(watched, -elapsed_ms, job_id)

    return pass_ms


async def submit(submitter: Submitter, *, grace_ms: int | None, is_watched: bool = True) -> str:
    job = make_job("watched")
    await submitter.submit(job, digest=b"digest", timeout_ms=None, grace_ms=grace_ms, is_watched=is_watched)
    return job.job_id


async def state_of(submitter: Submitter, job_id: str) -> JobState:
    snapshot = await submitter.status(job_id)
    assert snapshot is not None
    return snapshot.state


async def test_without_a_grace_a_job_ends_with_its_last_watcher(submitter: Submitter, other: Submitter) -> None:
    job_id = await submit(submitter, grace_ms=0)
    await other.attach(job_id)
    assert await submitter.unwatch(job_id) is JobState.WAITING
    assert await other.unwatch(job_id) is JobState.CANCELLED
    assert await other.unwatch(job_id) is JobState.CANCELLED  # Applied twice, it changes nothing.


async def test_a_grace_begins_with_the_last_watchers_leave(submitter: Submitter, sweeper: Sweeper, pass_time) -> None:
    job_id = await submit(submitter, grace_ms=5_000)
    assert await submitter.unwatch(job_id) is JobState.WAITING
    await pass_time(4_000)
    assert await sweeper.sweep() == SweepReport()
    await pass_time(1_100)
    assert await sweeper.sweep() == SweepReport(abandoned=1)
    assert await state_of(submitter, job_id) is JobState.CANCELLED


async def test_whoever_comes_back_through_another_gateway_in_time_keeps_the_job(
    submitter: Submitter, other: Submitter, sweeper: Sweeper, pass_time
) -> None:
    job_id = await submit(submitter, grace_ms=5_000)
    await submitter.unwatch(job_id)
    await other.attach(job_id)
    await pass_time(10_000)
    assert await sweeper.sweep() == SweepReport()
    assert await state_of(submitter, job_id) is JobState.WAITING


async def test_a_gateway_that_died_watches_for_a_minute_and_the_grace(
    submitter: Submitter, sweeper: Sweeper, pass_time
) -> None:
    job_id = await submit(submitter, grace_ms=5_000)
    await pass_time(WATCH_MS + 4_000)
    assert await sweeper.sweep() == SweepReport()
    await pass_time(1_100)
    assert await sweeper.sweep() == SweepReport(abandoned=1)
    assert await state_of(submitter, job_id) is JobState.CANCELLED


async def test_watching_on_puts_the_end_off(submitter: Submitter, sweeper: Sweeper, pass_time) -> None:
    job_id = await submit(submitter, grace_ms=0)
    for _ in range(3):
        await pass_time(WATCH_MS - 1_000)
        await submitter.keep_watching([job_id, "no such job"])
    assert await sweeper.sweep() == SweepReport()
    assert await state_of(submitter, job_id) is JobState.WAITING


async def test_a_gateway_that_left_is_not_taken_back_by_watching_on(
    submitter: Submitter, other: Submitter, sweeper: Sweeper, pass_time
) -> None:
    job_id = await submit(submitter, grace_ms=5_000)
    assert await submitter.keep_watching([job_id]) == []
    assert await other.keep_watching([job_id, "no such job"]) == [job_id]
    await submitter.unwatch(job_id)
    assert await submitter.keep_watching([job_id]) == [job_id]
    await pass_time(5_100)
    assert await sweeper.sweep() == SweepReport(abandoned=1)
    assert await submitter.keep_watching([job_id]) == []


async def test_a_job_that_lost_its_watchers_keeps_no_other_from_being_watched(
    submitter: Submitter, sweeper: Sweeper, redis_client: redis.asyncio.Redis, client: QueueClient, pass_time
) -> None:
    job_id = await submit(submitter, grace_ms=0)
    damaged = make_job("damaged")
    await submitter.submit(damaged, digest=b"digest", timeout_ms=None, grace_ms=0)
    await redis_client.hdel(f"{client.shards[0].keys.root}:job:{damaged.job_id}", "watchers")
    await pass_time(WATCH_MS - 1_000)
    assert await submitter.keep_watching([damaged.job_id, job_id]) == [damaged.job_id]
    await pass_time(WATCH_MS - 1_000)
    assert await sweeper.sweep() == SweepReport(abandoned=1)
    assert await state_of(submitter, job_id) is JobState.WAITING


async def test_nobody_needs_to_watch_a_job_without_end_of_watching(
    submitter: Submitter, sweeper: Sweeper, redis_client: redis.asyncio.Redis, client: QueueClient
) -> None:
    job_id = await submit(submitter, grace_ms=None, is_watched=False)
    await submitter.attach(job_id)
    await submitter.unwatch(job_id)
    assert not await redis_client.exists(f"{client.shards[0].keys.root}:watched")
    assert await sweeper.sweep() == SweepReport()
    assert await state_of(submitter, job_id) is JobState.WAITING


async def test_after_a_stall_nobody_is_taken_for_gone(
    submitter: Submitter, sweeper: Sweeper, redis_client: redis.asyncio.Redis, client: QueueClient, pass_time
) -> None:
    job_id = await submit(submitter, grace_ms=0)
    await sweeper.sweep()
    await pass_time(2 * WATCH_MS)
    await redis_client.hincrby(f"{client.shards[0].keys.root}:counters", "swept_ms", -10_000)
    assert await sweeper.sweep() == SweepReport()
    assert await state_of(submitter, job_id) is JobState.WAITING


async def test_a_job_that_has_ended_is_not_watched(
    submitter: Submitter, redis_client: redis.asyncio.Redis, client: QueueClient
) -> None:
    job_id = await submit(submitter, grace_ms=5_000)
    await submitter.cancel(job_id)
    await submitter.keep_watching([job_id])
    assert not await redis_client.exists(f"{client.shards[0].keys.root}:watched")
    assert await submitter.unwatch("no such job") is None
