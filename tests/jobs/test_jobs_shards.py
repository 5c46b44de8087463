"""A queue of several shards is one queue to both sides, also while one of its shards is away."""

import asyncio
from contextlib import suppress
from itertools import chain
from typing import TypeVar

import pytest
import redis.asyncio
from job_samples import MODEL, finished, make_entry, make_job, make_scoring_job
from oasst.jobs.v1 import job_pb2
from oasst_jobs import (
    Claimer,
    Inbox,
    JobNotAcceptedError,
    JobState,
    OtherShardsError,
    PushItem,
    PushStatus,
    QueueClient,
    QueueFullError,
    QueueLimits,
    QueueUnavailableError,
    Reconciler,
    Submitter,
    Sweeper,
    SweepReport,
    TenantFullError,
    TenantPolicy,
    TooMuchAheadError,
    UnavailableReason,
)
from oasst_jobs.functions import Shard
from sick_shards import FIRST_SHARD, PartlyAway

T = TypeVar("T", bound=JobNotAcceptedError)

NUM_SHARDS = 3
UNLIMITED = QueueLimits(max_waiting_jobs=None)


@pytest.fixture
def client(redis_client: redis.asyncio.Redis) -> QueueClient:
    return QueueClient(redis_client, num_shards=NUM_SHARDS)


@pytest.fixture
def lame(redis_client: redis.asyncio.Redis) -> PartlyAway:
    """The first shard is away."""
    lame = PartlyAway(connection_pool=redis_client.connection_pool)
    lame.away = FIRST_SHARD
    return lame


@pytest.fixture
def lame_client(lame: PartlyAway) -> QueueClient:
    return QueueClient(lame, num_shards=NUM_SHARDS)


async def submit(submitter: Submitter, number: int) -> list[job_pb2.Job]:
    jobs = [make_job(str(index)) for index in range(number)]
    for job in jobs:
        await submitter.submit(job, digest=b"digest", timeout_ms=None)
    return jobs


async def claim_all(claimer: Claimer) -> list[str]:
    job_ids = []
    while claims := await claimer.claim(max_jobs=2, max_tokens=1000):
        job_ids += [claimed.job_id for claimed in claims]
    return job_ids


def test_a_queue_has_at_least_one_shard(redis_client: redis.asyncio.Redis) -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        QueueClient(redis_client, num_shards=0)


async def test_jobs_are_spread_and_claimed_from_all_shards_in_turn(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    jobs = await submit(submitter, 60)
    loads = await client.on_each_shard(lambda shard: shard.load(MODEL))
    assert all(load.waiting_jobs > 10 for load in loads)
    assert (await submitter.load(MODEL)).waiting_jobs == 60

    first_turn = [await claimer.claim(max_jobs=1, max_tokens=1000) for _ in range(NUM_SHARDS)]
    assert len({client.shard_of(claimed.job_id) for [claimed] in first_turn}) == NUM_SHARDS
    claimed_ids = [claimed.job_id for claimed in chain.from_iterable(first_turn)] + await claim_all(claimer)
    assert sorted(claimed_ids) == sorted(job.job_id for job in jobs)


async def test_a_worker_that_keeps_itself_stays_with_its_shard_whatever_it_scores_meanwhile(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    large, scored = make_job("large", max_new_tokens=500), make_scoring_job("scored")
    shard = client.shard_of(scored.job_id)
    while client.shard_of(large.job_id) is not shard:
        large = make_job(f"large {large.request_id}", max_new_tokens=500)
    await client.redis.hset(f"{shard.keys.root}:job:{large.job_id}", "passed_over_ms", 1)  # For long.
    for job in (large, scored):
        await submitter.submit(job, digest=b"", timeout_ms=None)
    await submit(submitter, 30)
    while await claimer.claim(max_jobs=1, max_tokens=100):
        pass
    waiting_jobs = (await client.load(MODEL)).waiting_jobs
    assert waiting_jobs > 1
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=100, is_scoring=True)
    assert claimed.job_id == scored.job_id
    assert await claimer.claim(max_jobs=1, max_tokens=100) == []
    assert (await client.load(MODEL)).waiting_jobs == waiting_jobs


async def test_statuses_of_a_push_keep_the_order_of_its_items(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, 30)
    claims = []
    while claimed := await claimer.claim(max_jobs=30, max_tokens=1000):
        claims += claimed
    for claimed in claims[::4]:
        await submitter.cancel(claimed.job_id)
    items = [PushItem(claimed.job_id, claimed.fence, 0, make_entry(0, 1), finished(1)) for claimed in claims]
    assert await claimer.push(items) == [PushStatus.OK if n % 4 else PushStatus.CANCELLED for n in range(30)]


async def test_places_and_limits_are_those_of_the_whole_queue(client: QueueClient) -> None:
    submitter = Submitter(client, gateway_id="gateway", limits=QueueLimits())
    policy = TenantPolicy(max_waiting_jobs=60)
    positions, num_refused = [], 0
    for number in range(90):
        try:
            submitted = await submitter.submit(make_job(str(number)), digest=b"", timeout_ms=None, policy=policy)
            positions.append(submitted.queue_position)
        except TenantFullError:
            num_refused += 1
    assert (await submitter.load(MODEL)).waiting_jobs == 90 - num_refused <= 60
    assert len(positions) > 45
    assert positions[-1] > 40


async def test_refusals_are_told_as_those_of_the_whole_queue(client: QueueClient) -> None:
    async def refusal(name: str, error: type[T], *, limits: QueueLimits = UNLIMITED, **about: object) -> T:
        submitter = Submitter(client, gateway_id="gateway", limits=limits)
        jobs = [make_job(f"{name} {number}") for number in range(200)]
        submits = [submitter.submit(job, digest=b"", timeout_ms=None, **about) for job in jobs]
        results = await asyncio.gather(*submits, return_exceptions=True)
        return next(result for result in results if isinstance(result, error))

    full = await refusal("full", QueueFullError, limits=QueueLimits(max_waiting_jobs=60))
    assert (full.waiting_jobs, full.waiting_tokens) == (60, 60 * 20)
    tenant = await refusal("tenant", TenantFullError, policy=TenantPolicy(max_waiting_jobs=90))
    assert (tenant.waiting_jobs, tenant.waiting_tokens) == (90, 90 * 20)
    ahead = await refusal("ahead", TooMuchAheadError, max_tokens_ahead=120 * 20)
    assert ahead.jobs_ahead > 120
    assert ahead.tokens_ahead == ahead.jobs_ahead * 20


async def test_a_worker_is_counted_once(client: QueueClient, claimer: Claimer) -> None:
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="worker-1", model=MODEL, tokens_per_second=5.0))
    [(status, _)] = (await client.load(MODEL)).workers
    assert status.tokens_per_second == 5.0


async def test_while_a_shard_is_away_jobs_of_the_others_are_claimed(
    client: QueueClient, lame_client: QueueClient, submitter: Submitter
) -> None:
    jobs = await submit(submitter, 30)
    reachable = [job.job_id for job in jobs if client.shard_of(job.job_id) is not client.shards[0]]
    claimed_ids = await claim_all(Claimer(lame_client, worker_id="worker-1", model=MODEL))
    assert sorted(claimed_ids) == sorted(reachable)


async def test_a_shard_that_hangs_is_not_asked_for_jobs_all_the_time(
    client: QueueClient, lame_client: QueueClient, submitter: Submitter
) -> None:
    now_s, asked = 0.0, 0

    async def hang(*arguments: object, **room: object) -> None:
        nonlocal now_s, asked
        now_s += 3.0
        asked += 1
        raise QueueUnavailableError(UnavailableReason.TIMEOUT, "no answer")

    lame_client.shards[0].claim = hang  # type: ignore[method-assign, assignment]
    await submit(submitter, 30)
    claimer = Claimer(lame_client, worker_id="worker-1", model=MODEL, clock=lambda: now_s)
    await claim_all(claimer)
    assert asked == 2  # And once more, in case it had given jobs.
    now_s += 15.0
    assert await claim_all(claimer) == []
    assert asked == 3


async def test_a_shard_that_answers_a_heartbeat_is_asked_for_jobs_again_at_once(
    lame_client: QueueClient, lame: PartlyAway, submitter: Submitter
) -> None:
    now_s = 0.0

    async def hang(*arguments: object, **room: object) -> None:
        nonlocal now_s
        now_s += 3.0
        raise QueueUnavailableError(UnavailableReason.TIMEOUT, "no answer")

    claim = lame_client.shards[0].claim
    lame_client.shards[0].claim = hang  # type: ignore[method-assign, assignment]
    claimer = Claimer(lame_client, worker_id="worker-1", model=MODEL, clock=lambda: now_s)
    for _ in range(2):
        await claim_all(claimer)
    lame_client.shards[0].claim = claim  # type: ignore[method-assign]
    status = job_pb2.WorkerStatus(worker_id="worker-1", model=MODEL)
    with pytest.raises(QueueUnavailableError):
        await claimer.heartbeat(status)
    jobs = await submit(submitter, 30)
    assert len(await claim_all(claimer)) < 30
    lame.away = None
    await claimer.heartbeat(status)
    assert await claim_all(claimer) == [job.job_id for job in jobs if lame_client.shard_number(job.job_id) == 0]


async def test_repairs_are_counted_while_a_shard_is_away(
    lame_client: QueueClient, redis_client: redis.asyncio.Redis, submitter: Submitter
) -> None:
    jobs = await submit(submitter, 30)
    lost = next(job.job_id for job in jobs if lame_client.shard_number(job.job_id))
    await redis_client.zrem(f"{lame_client.shard_of(lost).keys.root}:waiting:{MODEL}", lost)
    reconciler = Reconciler(lame_client, interval_s=0.0)
    assert await reconciler.walk() == 1
    assert reconciler.num_repairs == 1


async def test_jobs_are_found_by_the_number_of_shards_that_they_came_by_and_no_other(
    redis_client: redis.asyncio.Redis, client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    jobs = await submit(submitter, 30)
    claims = [claimed for _ in range(NUM_SHARDS) for claimed in await claimer.claim(max_jobs=30, max_tokens=10_000)]
    # Only the last shard holds a job still, and it runs.
    last = next(claim for claim in claims if client.shard_number(claim.job_id) == NUM_SHARDS - 1)
    for job in jobs:
        if job.job_id != last.job_id:
            await submitter.cancel(job.job_id)

    for num_shards in (1, 8):
        other = QueueClient(redis_client, num_shards=num_shards)
        with pytest.raises(OtherShardsError, match=f"3 shards, not {num_shards}: name 3 of them"):
            await other.check_server(may_spread_anew=True)
        new = next(job for job in map(make_job, "abcdefghijkl") if other.shard_number(job.job_id) == 0)
        with pytest.raises(QueueUnavailableError) as refused:
            await Submitter(other, gateway_id="other", limits=UNLIMITED).submit(new, digest=b"", timeout_ms=None)
        assert refused.value.reason is UnavailableReason.SPREAD_OTHERWISE
    await client.check_server()
    assert await submitter.cancel(last.job_id) is JobState.CANCELLED


@pytest.mark.parametrize("num_shards", [1, 8])
async def test_an_empty_queue_takes_another_number_of_shards_and_jobs_by_no_other(
    redis_client: redis.asyncio.Redis, client: QueueClient, submitter: Submitter, claimer: Claimer, num_shards: int
) -> None:
    for job in await submit(submitter, 30):
        await submitter.cancel(job.job_id)
    other = QueueClient(redis_client, num_shards=num_shards)
    with pytest.raises(OtherShardsError):
        await other.check_server()  # Whoever brings no jobs changes nothing.
    await asyncio.gather(*(other.check_server(may_spread_anew=True) for _ in range(5)))
    await other.check_server()
    for number in range(10):
        with pytest.raises(QueueUnavailableError):
            await submitter.submit(make_job(f"by another {number}"), digest=b"", timeout_ms=None)
    for number in range(10):
        job, gateway = make_job(f"by this one {number}"), Submitter(other, gateway_id="gateway", limits=UNLIMITED)
        await gateway.submit(job, digest=b"", timeout_ms=None)
    assert len(await claim_all(Claimer(other, worker_id="worker", model=MODEL))) == 10


@pytest.mark.parametrize("num_shards", [1, 2, 8])
async def test_a_worker_by_another_number_takes_no_job(
    redis_client: redis.asyncio.Redis, submitter: Submitter, claimer: Claimer, num_shards: int
) -> None:
    jobs = await submit(submitter, 30)
    other = Claimer(QueueClient(redis_client, num_shards=num_shards), worker_id="other", model=MODEL)
    for is_idle in (False, True):
        with suppress(QueueUnavailableError):  # Shards beyond the queue's answer, and have nothing.
            assert await other.claim(max_jobs=30, max_tokens=10_000, is_idle=is_idle) == []
    assert len(await claim_all(claimer)) == len(jobs)


async def test_a_job_that_comes_in_while_the_number_changes_keeps_the_old_one_for_all_who_start(
    redis_client: redis.asyncio.Redis, client: QueueClient, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in await submit(submitter, 30):
        await submitter.cancel(job.job_id)
    late = next(job for job in map(make_job, "abcdefghij") if client.shard_number(job.job_id) == 1)
    spread = Shard.spread

    async def spread_late(shard: Shard) -> int:
        await submitter.submit(late, digest=b"", timeout_ms=None)
        return await spread(shard)

    monkeypatch.setattr(Shard, "spread", spread_late)
    for _ in range(2):
        with pytest.raises(OtherShardsError):
            await QueueClient(redis_client).check_server(may_spread_anew=True)
    assert await submitter.cancel(late.job_id) is JobState.CANCELLED


async def test_a_shard_that_is_away_keeps_the_queue_from_another_number(
    lame: PartlyAway, lame_client: QueueClient, submitter: Submitter
) -> None:
    await submit(submitter, 30)
    lame.away = "oasst:{2}"
    with pytest.raises(QueueUnavailableError):
        await QueueClient(lame, num_shards=2).check_server(may_spread_anew=True)
    await lame_client.check_server()


async def test_jobs_of_an_older_release_are_taken_to_be_spread_as_whoever_starts_first_has_it(
    redis_client: redis.asyncio.Redis, client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    jobs = await submit(submitter, 30)
    for shard in client.shards:
        await redis_client.hdel(f"{shard.keys.root}:counters", "num_shards")
    await client.check_server()
    assert len(await claim_all(claimer)) == len(jobs)


async def test_whoever_starts_while_a_shard_is_away_goes_on_with_the_others(
    lame_client: QueueClient, lame: PartlyAway
) -> None:
    await lame_client.check_server()
    lame.away = "oasst"
    with pytest.raises(QueueUnavailableError):
        await lame_client.check_server()


async def test_load_is_of_the_shards_that_answer(
    client: QueueClient, lame_client: QueueClient, lame: PartlyAway, submitter: Submitter
) -> None:
    jobs = await submit(submitter, 30)
    present = [job for job in jobs if client.shard_number(job.job_id)]
    assert (await lame_client.load(MODEL)).waiting_jobs == len(present) < 30
    lame.away = "oasst"
    with pytest.raises(QueueUnavailableError):
        await lame_client.load(MODEL)


async def test_while_a_shard_is_away_the_others_tell_what_they_do_not_know_to_be_watched(
    client: QueueClient, lame_client: QueueClient, lame: PartlyAway, submitter: Submitter
) -> None:
    jobs = await submit(submitter, 30)
    present = [job.job_id for job in jobs if client.shard_number(job.job_id)]
    other = Submitter(lame_client, gateway_id="gateway-2", limits=QueueLimits())  # Watches none of them.
    assert sorted(await other.keep_watching([job.job_id for job in jobs])) == sorted(present)
    with pytest.raises(QueueUnavailableError):
        await other.keep_watching([job.job_id for job in jobs if not client.shard_number(job.job_id)])


async def test_a_shard_that_hangs_keeps_the_others_from_no_sweep(lame_client: QueueClient, lame: PartlyAway) -> None:
    lame.hangs = True
    num_sweeps, enough = 0, asyncio.Event()

    def count(report: SweepReport) -> None:
        nonlocal num_sweeps
        num_sweeps += 1
        if num_sweeps == 10:
            enough.set()

    sweeping = asyncio.create_task(Sweeper(lame_client, interval_s=0.001, on_sweep=count).run())
    try:
        async with asyncio.timeout(10):
            await enough.wait()
    finally:
        lame.released.set()
        sweeping.cancel()
        await asyncio.wait([sweeping])


async def test_a_shard_that_hangs_keeps_nobody_from_the_logs_of_the_others(
    client: QueueClient, lame_client: QueueClient, lame: PartlyAway, submitter: Submitter, claimer: Claimer
) -> None:
    jobs = await submit(submitter, 30)
    hanging = next(job.job_id for job in jobs if client.shard_number(job.job_id) == 0)
    other = next(job.job_id for job in jobs if client.shard_number(job.job_id) != 0)
    await submitter.cancel(other)
    lame.hangs = True
    inbox = Inbox(lame_client, gateway_id="gateway-2")
    reading = asyncio.create_task(inbox.run())
    try:
        async with asyncio.timeout(10), inbox.subscribe(hanging) as stuck, inbox.subscribe(other) as told:
            waiting = asyncio.create_task(stuck.take())
            await asyncio.sleep(0)
            [outcome] = await told.take()
            assert outcome.failed.reason == "CANCELLED"
            waiting.cancel()
    finally:
        lame.released.set()
        reading.cancel()
        await asyncio.wait([reading])


async def test_while_a_shard_is_away_the_others_wake_workers_and_are_swept(
    client: QueueClient, lame_client: QueueClient, submitter: Submitter, redis_client: redis.asyncio.Redis
) -> None:
    await submit(submitter, 10)
    await Claimer(lame_client, worker_id="worker-1", model=MODEL).wait_for_work(1.0)
    with pytest.raises(QueueUnavailableError):
        await Sweeper(lame_client).sweep()
    swept = [await redis_client.hexists(f"{shard.keys.root}:counters", "swept_ms") for shard in client.shards]
    assert swept == [False, True, True]


async def test_when_all_shards_are_away_whoever_waits_is_told(valkey, claimer: Claimer) -> None:
    valkey.kill()
    with pytest.raises(QueueUnavailableError):
        await claimer.wait_for_work(1.0)
