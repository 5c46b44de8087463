"""A job and the indexes disagree: which of them is right, and how it is put right."""

import pytest
import redis.asyncio
from job_samples import MODEL, finished, make_entry, make_job
from oasst_jobs import Claimer, JobState, PushItem, QueueClient, Reconciler, Submitter


@pytest.fixture
def reconciler(client: QueueClient) -> Reconciler:
    return Reconciler(client, interval_s=0.0, max_keys=1000)


@pytest.fixture
def root(client: QueueClient) -> str:
    return client.shards[0].keys.root


async def submit(
    submitter: Submitter,
    request_id: str,
    *,
    timeout_ms: int | None = None,
    grace_ms: int | None = None,
    tenant: str = "tenant",
) -> str:
    job = make_job(request_id, tenant=tenant)
    await submitter.submit(job, digest=b"digest", timeout_ms=timeout_ms, grace_ms=grace_ms)
    return job.job_id


async def claim_ids(claimer: Claimer) -> list[str]:
    return [claimed.job_id for claimed in await claimer.claim(max_jobs=100, max_tokens=100_000)]


async def test_a_sound_queue_needs_no_repair(submitter: Submitter, claimer: Claimer, reconciler: Reconciler) -> None:
    for number in range(10):
        timeout_ms, grace_ms = 60_000 if number % 2 else None, 1_000 if number % 3 else None
        await submit(submitter, str(number), timeout_ms=timeout_ms, grace_ms=grace_ms)
    claims = await claimer.claim(max_jobs=6, max_tokens=1000)
    await claimer.push([PushItem(claims[0].job_id, claims[0].fence, 0, make_entry(0, 1), finished(1))])
    await submitter.cancel(claims[1].job_id)
    await submitter.cancel(make_job("9").job_id)
    await claimer.release(claims[2:3])
    assert await reconciler.walk() == 0


async def test_a_waiting_job_in_no_index_is_queued_again(
    submitter: Submitter, claimer: Claimer, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "lost")
    await redis_client.delete(f"{root}:waiting:{MODEL}", f"{root}:waiting_tokens", f"{root}:tenant_jobs")
    assert await reconciler.walk() == 1
    assert await reconciler.walk() == 0
    assert (await submitter.load(MODEL)).waiting_tokens == 20
    assert await claim_ids(claimer) == [job_id]


async def test_a_running_job_without_a_lease_gets_one(
    submitter: Submitter, claimer: Claimer, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "lost")
    await claim_ids(claimer)
    await redis_client.delete(f"{root}:leases")
    assert await reconciler.walk() == 1
    assert await redis_client.zscore(f"{root}:leases", job_id) > 0


async def test_a_job_that_runs_is_not_left_waiting(
    submitter: Submitter, claimer: Claimer, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "runs")
    await submit(submitter, "other", tenant="other")
    assert len(await claim_ids(claimer)) == 2
    await submit(submitter, "waits")
    await redis_client.zadd(f"{root}:waiting:{MODEL}", {job_id: 0})
    assert await reconciler.walk() == 1
    assert await claim_ids(claimer) == [make_job("waits").job_id]


async def test_a_deadline_that_was_lost_is_watched_again(
    submitter: Submitter, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "due", timeout_ms=60_000)
    await redis_client.delete(f"{root}:deadlines")
    assert await reconciler.walk() == 1
    assert await redis_client.zscore(f"{root}:deadlines", job_id) > 0


async def test_a_job_that_should_be_watched_is_so_again(
    submitter: Submitter, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "watched", grace_ms=1_000)
    await redis_client.delete(f"{root}:watched")
    assert await reconciler.walk() == 1
    assert await reconciler.walk() == 0
    assert await redis_client.zscore(f"{root}:watched", job_id) > 0


async def test_what_an_older_release_left_uncounted_is_counted_and_no_defect(
    submitter: Submitter, claimer: Claimer, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_ids = [await submit(submitter, request_id) for request_id in ("running", "ended")]
    assert await claim_ids(claimer) == job_ids
    await submitter.cancel(job_ids[1])
    running = f"{root}:running:{MODEL}"
    await redis_client.zrem(running, job_ids[0])
    await redis_client.zadd(running, {job_ids[1]: 1})
    assert await reconciler.walk() == 0
    assert await redis_client.zrange(running, 0, -1) == [job_ids[0].encode()]


async def test_what_has_ended_is_in_no_index_and_goes_in_time(
    submitter: Submitter, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "ended")
    await submitter.cancel(job_id)
    await redis_client.persist(f"{root}:job:{job_id}")
    for index in ("leases", "deadlines", "watched"):
        await redis_client.zadd(f"{root}:{index}", {job_id: 9e15})
    assert await reconciler.walk() == 1
    assert await redis_client.exists(f"{root}:leases", f"{root}:deadlines", f"{root}:watched") == 0
    assert await redis_client.pttl(f"{root}:job:{job_id}") > 0


async def test_a_job_that_has_not_ended_does_not_go(
    submitter: Submitter, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_id = await submit(submitter, "stays")
    await redis_client.expire(f"{root}:job:{job_id}", 100)
    assert await reconciler.walk() == 1
    assert await redis_client.pttl(f"{root}:job:{job_id}") == -1


@pytest.mark.parametrize("index", ["leases", "deadlines", "watched", f"waiting:{MODEL}"])
async def test_an_index_entry_without_a_job_is_dropped(
    submitter: Submitter, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str, index: str
) -> None:
    await submit(submitter, "sound")
    await redis_client.zadd(f"{root}:{index}", {"orphan": 9e15})
    assert await reconciler.walk() == 1
    assert await redis_client.zscore(f"{root}:{index}", "orphan") is None


@pytest.mark.parametrize("finder", ["reconciler", "claimer"])
async def test_what_a_lost_job_counted_for_is_given_back(
    submitter: Submitter,
    claimer: Claimer,
    reconciler: Reconciler,
    redis_client: redis.asyncio.Redis,
    root: str,
    finder: str,
) -> None:
    lost = await submit(submitter, "lost")
    kept = await submit(submitter, "kept")
    await submit(submitter, "other", tenant="other")
    await redis_client.delete(f"{root}:job:{lost}")
    if finder == "claimer":
        claimed = await claimer.claim(max_jobs=2, max_tokens=1000)
        assert kept in [claim.job_id for claim in claimed]
        await claimer.release(claimed)
    await reconciler.walk()
    load = await submitter.load(MODEL)
    assert (load.waiting_jobs, load.waiting_tokens) == (2, 40)
    assert await redis_client.hgetall(f"{root}:tenant_jobs") == {b"tenant": b"1", b"other": b"1"}
    assert await redis_client.hgetall(f"{root}:tenant_tokens") == {b"tenant": b"20", b"other": b"20"}


async def test_a_long_walk_comes_round_in_short_stretches(
    submitter: Submitter, client: QueueClient, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_ids = [await submit(submitter, str(number)) for number in range(300)]
    for job_id in job_ids[::3]:
        await redis_client.zrem(f"{root}:waiting:{MODEL}", job_id)
    reconciler = Reconciler(client, interval_s=0.0, max_keys=20)
    for _ in range(100):
        await reconciler.walk()
    assert reconciler.num_repairs == 100
    assert (await submitter.load(MODEL)).waiting_jobs == 300


async def test_many_processes_share_one_walk(submitter: Submitter, client: QueueClient) -> None:
    for number in range(10):
        await submit(submitter, str(number))
    shard = client.shards[0]
    looked_at = [(await shard.reconcile(max_keys=1000, pause_ms=60_000))[0] for _ in range(5)]
    assert looked_at == [10, 0, 0, 0, 0]


async def test_a_job_found_again_keeps_its_place(
    submitter: Submitter, claimer: Claimer, reconciler: Reconciler, redis_client: redis.asyncio.Redis, root: str
) -> None:
    job_ids = [await submit(submitter, str(number)) for number in range(5)]
    await redis_client.zrem(f"{root}:waiting:{MODEL}", job_ids[1])
    await reconciler.walk()
    assert await claim_ids(claimer) == job_ids
    snapshot = await submitter.status(job_ids[1])
    assert snapshot is not None
    assert snapshot.state is JobState.RUNNING
