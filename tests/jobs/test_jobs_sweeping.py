"""How the queue gets over lost workers, passed deadlines, stalls and wrong clocks."""

import asyncio

import pytest
import redis.asyncio
from job_samples import make_entry, make_job
from oasst_jobs import Claimer, JobState, PushItem, PushStatus, QueueClient, Submitter, Sweeper, SweepReport
from waiting import until


async def submit(submitter: Submitter, request_id: str, *, timeout_ms: int | None = None) -> str:
    job = make_job(request_id)
    await submitter.submit(job, digest=b"digest", timeout_ms=timeout_ms)
    return job.job_id


async def state_of(submitter: Submitter, job_id: str) -> JobState:
    snapshot = await submitter.status(job_id)
    assert snapshot is not None
    return snapshot.state


async def lose_lease(redis_client: redis.asyncio.Redis, client: QueueClient, job_id: str) -> None:
    await redis_client.zadd(f"{client.shards[0].keys.root}:leases", {job_id: 1})


async def stall(redis_client: redis.asyncio.Redis, client: QueueClient) -> None:
    """The last sweep was ten seconds ago."""
    await redis_client.hincrby(f"{client.shards[0].keys.root}:counters", "swept_ms", -10_000)


async def test_nothing_due_changes_nothing(submitter: Submitter, claimer: Claimer, sweeper: Sweeper) -> None:
    running, waiting = await submit(submitter, "running", timeout_ms=60_000), await submit(submitter, "waiting")
    await claimer.claim(max_jobs=1, max_tokens=1000)
    assert await sweeper.sweep() == SweepReport()
    assert await state_of(submitter, running) is JobState.RUNNING
    assert await state_of(submitter, waiting) is JobState.WAITING


async def test_a_job_that_lost_its_worker_goes_on_from_its_log(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await submit(submitter, "orphan")
    [first] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await claimer.push([PushItem(job_id, first.fence, 0, make_entry(0, 3))])
    await lose_lease(redis_client, client, job_id)

    assert await sweeper.sweep() == SweepReport(requeued=1)
    assert await sweeper.sweep() == SweepReport()
    [second] = await claimer.claim(max_jobs=1, max_tokens=1000)
    assert (second.attempt, second.end_position, second.log) == (2, 3, [make_entry(0, 3)])


@pytest.mark.parametrize("is_running", [False, True])
async def test_a_job_expires_with_its_deadline_waiting_or_running(
    submitter: Submitter,
    claimer: Claimer,
    sweeper: Sweeper,
    client: QueueClient,
    redis_client: redis.asyncio.Redis,
    is_running: bool,
) -> None:
    job_id = await submit(submitter, "expires", timeout_ms=60_000)
    claims = await claimer.claim(max_jobs=int(is_running), max_tokens=1000)
    await redis_client.zadd(f"{client.shards[0].keys.root}:deadlines", {job_id: 1})

    assert await sweeper.sweep() == SweepReport(expired=1)
    assert await sweeper.sweep() == SweepReport()
    assert await state_of(submitter, job_id) is JobState.EXPIRED
    for claimed in claims:
        assert await claimer.push([PushItem(job_id, claimed.fence, 0, make_entry(0, 1))]) == [PushStatus.EXPIRED]


async def test_a_sweep_goes_through_more_jobs_than_fit_into_one_call(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    job_ids = [await submit(submitter, str(number)) for number in range(230)]
    assert len(await claimer.claim(max_jobs=230, max_tokens=100_000)) == 230
    for job_id in job_ids:
        await lose_lease(redis_client, client, job_id)
    assert await sweeper.sweep() == SweepReport(requeued=230)


async def test_after_a_stall_live_workers_keep_their_jobs(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await submit(submitter, "kept")
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await sweeper.sweep()
    await lose_lease(redis_client, client, job_id)
    await stall(redis_client, client)

    assert await sweeper.sweep() == SweepReport(amnestied=1)
    assert await claimer.push([PushItem(job_id, claimed.fence, 0, make_entry(0, 1))]) == [PushStatus.OK]


async def test_an_amnesty_is_given_once(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await submit(submitter, "orphan")
    await claimer.claim(max_jobs=1, max_tokens=1000)
    await sweeper.sweep()
    await stall(redis_client, client)
    await lose_lease(redis_client, client, job_id)
    assert await sweeper.sweep() == SweepReport(amnestied=1)
    await lose_lease(redis_client, client, job_id)
    assert await sweeper.sweep() == SweepReport(requeued=1)


async def test_a_paused_server_steals_nothing(
    valkey, submitter: Submitter, claimer: Claimer, client: QueueClient
) -> None:
    sweeper = Sweeper(client, interval_s=0.01, stall_s=0.2)
    brief = Claimer(client, worker_id="brief", model="tiny-pythia", lease_ms=300)
    job_id = await submit(submitter, "kept")
    [claimed] = await brief.claim(max_jobs=1, max_tokens=1000)
    await sweeper.sweep()

    valkey.pause()
    await asyncio.sleep(0.5)
    valkey.resume()
    assert await sweeper.sweep() == SweepReport(amnestied=1)
    assert await brief.push([PushItem(job_id, claimed.fence, 0, make_entry(0, 1))]) == [PushStatus.OK]


async def test_a_lease_from_a_clock_that_was_set_back_ends_in_time(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await submit(submitter, "far away")
    await claimer.claim(max_jobs=1, max_tokens=1000)
    leases = f"{client.shards[0].keys.root}:leases"
    await redis_client.zincrby(leases, 3_600_000, job_id)
    await sweeper.sweep()
    seconds, _ = await redis_client.time()
    assert await redis_client.zscore(leases, job_id) <= (seconds + 1) * 1000 + 120_000


async def test_after_the_clock_was_set_back_a_lease_lasts_no_longer_than_it_should(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    """To the queue, an hour back looks like leases and a last sweep of an hour from now."""
    job_id = await submit(submitter, "held")
    await claimer.claim(max_jobs=1, max_tokens=1000)
    await sweeper.sweep()
    root = client.shards[0].keys.root
    usual_ms = await redis_client.zscore(f"{root}:leases", job_id)
    await redis_client.zincrby(f"{root}:leases", 3_600_000, job_id)
    await redis_client.hincrby(f"{root}:counters", "swept_ms", 3_600_000)
    assert (await sweeper.sweep()).amnestied == 1
    assert 0 <= await redis_client.zscore(f"{root}:leases", job_id) - usual_ms < 2_000


async def test_index_entries_without_a_job_are_cleared_away(
    sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    for index in ("leases", "deadlines"):
        await redis_client.zadd(f"{client.shards[0].keys.root}:{index}", {"orphan": 1})
    assert await sweeper.sweep() == SweepReport()
    root = client.shards[0].keys.root
    assert sorted(await redis_client.keys()) == [f"{root}:counters".encode(), f"{root}:versions".encode()]


def test_a_sweeper_slower_than_the_stall_it_looks_for_is_refused(client: QueueClient) -> None:
    with pytest.raises(ValueError, match="stall"):
        Sweeper(client, interval_s=2.0, stall_s=2.0)


async def test_a_running_sweeper_survives_a_server_that_dies(
    valkey, submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    sweeper = Sweeper(client, interval_s=0.01)
    running = asyncio.create_task(sweeper.run())
    try:
        job_id = await submit(submitter, "orphan")
        await claimer.claim(max_jobs=1, max_tokens=1000)
        valkey.kill()
        await asyncio.sleep(0.05)
        valkey.start()

        async def is_requeued() -> bool:
            # Again and again, because the first sweep after the restart grants an amnesty.
            await lose_lease(redis_client, client, job_id)
            return await state_of(submitter, job_id) is JobState.WAITING

        await until(is_requeued)
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_sweep_that_fails_is_told_and_tried_again(
    client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    swept, failed = asyncio.Event(), asyncio.Event()
    sweeper = Sweeper(client, interval_s=0.01, on_sweep=lambda report: swept.set(), on_defect=failed.set)
    counters = f"{client.shards[0].keys.root}:counters"
    await redis_client.set(counters, "no hash")
    sweeping = asyncio.create_task(sweeper.run())
    async with asyncio.timeout(10):
        await failed.wait()
        await redis_client.delete(counters)
        await swept.wait()
    sweeping.cancel()
    await asyncio.wait([sweeping])
