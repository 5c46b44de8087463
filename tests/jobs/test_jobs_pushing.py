"""How tokens get into a log, and what keeps them out."""

import pytest
import redis.asyncio
from job_samples import failed, finished, logged_text, make_entry, make_job
from oasst_jobs import (
    ClaimedJob,
    Claimer,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    Submitter,
    Sweeper,
)
from waiting import until


async def claim_one(submitter: Submitter, claimer: Claimer, *, timeout_ms: int | None = None) -> ClaimedJob:
    await submitter.submit(make_job("pushed", max_new_tokens=500), digest=b"digest", timeout_ms=timeout_ms)
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    return claimed


def item(claimed: ClaimedJob, start: int, stop: int, *, ends: bool = False) -> PushItem:
    return PushItem(claimed.job_id, claimed.fence, start, make_entry(start, stop), finished(stop) if ends else None)


async def test_pushed_entries_are_the_log(submitter: Submitter, claimer: Claimer, client: QueueClient) -> None:
    claimed = await claim_one(submitter, claimer)
    for start, stop in [(0, 1), (1, 4), (4, 5)]:
        assert await claimer.push([item(claimed, start, stop)]) == [PushStatus.OK]

    log = await client.read(claimed.job_id, 0)
    assert log is not None
    assert (log.state, log.end_position, log.outcome) == (JobState.RUNNING, 5, None)
    assert logged_text(list(log.entries)) == "0 1 2 3 4 "
    behind = await client.read(claimed.job_id, 4)
    assert behind is not None
    assert behind.entries == [make_entry(4, 5)]


async def test_an_outcome_comes_after_the_entry_it_is_pushed_with(submitter: Submitter, claimer: Claimer) -> None:
    claimed = await claim_one(submitter, claimer)
    assert await claimer.push([item(claimed, 0, 7, ends=True)]) == [PushStatus.OK]
    snapshot = await submitter.status(claimed.job_id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.end_position, snapshot.outcome) == (JobState.FINISHED, 7, finished(7))


async def test_a_push_applied_twice_is_applied_once(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    claimed = await claim_one(submitter, claimer)
    for push in (item(claimed, 0, 3), item(claimed, 3, 4), item(claimed, 4, 6, ends=True)):
        assert await claimer.push([push]) == [PushStatus.OK]
        assert await claimer.push([push]) == [PushStatus.OK]

    log = await client.read(claimed.job_id, 0)
    assert log is not None
    assert log.entries == [make_entry(0, 3), make_entry(3, 4), make_entry(4, 6)]
    assert await redis_client.xlen(client.shards[0].keys.updates("gateway-1")) == 3


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (0, 4), (2, 4), (4, 5)])
async def test_an_entry_that_does_not_join_the_log_is_refused(
    submitter: Submitter, claimer: Claimer, client: QueueClient, start: int, stop: int
) -> None:
    claimed = await claim_one(submitter, claimer)
    await claimer.push([item(claimed, 0, 3)])
    assert await claimer.push([item(claimed, start, stop)]) == [PushStatus.POSITION]
    assert await claimer.push([item(claimed, start, stop, ends=True)]) == [PushStatus.POSITION]

    log = await client.read(claimed.job_id, 0)
    assert log is not None
    assert (log.state, log.entries) == (JobState.RUNNING, [make_entry(0, 3)])


async def test_an_outcome_alone_must_know_where_the_log_ends(submitter: Submitter, claimer: Claimer) -> None:
    claimed = await claim_one(submitter, claimer)
    await claimer.push([item(claimed, 0, 3)])
    early = PushItem(claimed.job_id, claimed.fence, 2, outcome=finished(2))
    assert await claimer.push([early]) == [PushStatus.POSITION]
    right = PushItem(claimed.job_id, claimed.fence, 3, outcome=finished(3))
    assert await claimer.push([right]) == [PushStatus.OK]


async def test_a_log_longer_than_its_hash_says_refuses_what_it_has(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    claimed = await claim_one(submitter, claimer)
    await claimer.push([item(claimed, 0, 3)])
    await redis_client.hset(f"{client.shards[0].keys.root}:job:{claimed.job_id}", "end_position", 0)
    assert await claimer.push([item(claimed, 0, 2)]) == [PushStatus.POSITION]


async def test_an_entry_without_a_token_is_a_defect_of_its_caller(submitter: Submitter, claimer: Claimer) -> None:
    claimed = await claim_one(submitter, claimer)
    with pytest.raises(ValueError, match="no token"):
        await claimer.push([item(claimed, 0, 0)])


async def test_nothing_is_pushed_without_the_fence(submitter: Submitter, claimer: Claimer, client: QueueClient) -> None:
    claimed = await claim_one(submitter, claimer)
    number = claimed.fence.partition("-")[0]
    for fence in ("", number, f"{number}-0123456789abcdef"):
        assert await claimer.push([PushItem(claimed.job_id, fence, 0, make_entry(0, 1))]) == [PushStatus.FENCED]
        assert await claimer.push([PushItem(claimed.job_id, fence, 0)]) == [PushStatus.FENCED]
    log = await client.read(claimed.job_id, 0)
    assert log is not None
    assert log.entries == []


async def test_a_push_for_an_unknown_job_is_fenced(claimer: Claimer, redis_client: redis.asyncio.Redis) -> None:
    assert await claimer.push([PushItem("unknown", "1-abc", 0, make_entry(0, 1), finished(1))]) == [PushStatus.FENCED]
    assert await claimer.push([PushItem("unknown", "", 0)]) == [PushStatus.FENCED]
    assert await redis_client.dbsize() == 0


async def test_a_zombie_is_refused_after_another_took_over(
    submitter: Submitter, claimer: Claimer, hasty_claimer: Claimer, sweeper: Sweeper, client: QueueClient
) -> None:
    zombie = await claim_one(submitter, hasty_claimer)
    await hasty_claimer.push([item(zombie, 0, 2)])

    async def is_requeued() -> bool:
        return (await sweeper.sweep()).requeued == 1

    await until(is_requeued)
    assert await hasty_claimer.push([item(zombie, 2, 3)]) == [PushStatus.FENCED]
    [heir] = await claimer.claim(max_jobs=1, max_tokens=1000)
    assert (heir.attempt, heir.end_position, heir.log) == (2, 2, [make_entry(0, 2)])

    assert await claimer.push([item(heir, 2, 3)]) == [PushStatus.OK]
    assert await hasty_claimer.push([item(zombie, 3, 4)]) == [PushStatus.FENCED]
    assert await hasty_claimer.push([item(zombie, 0, 2)]) == [PushStatus.FENCED]
    assert await claimer.push([item(heir, 3, 4, ends=True)]) == [PushStatus.OK]
    log = await client.read(heir.job_id, 0)
    assert log is not None
    assert logged_text(list(log.entries)) == "0 1 2 3 "


async def test_what_has_ended_takes_no_more(submitter: Submitter, claimer: Claimer, client: QueueClient) -> None:
    claimed = await claim_one(submitter, claimer)
    await claimer.push([item(claimed, 0, 3, ends=True)])
    assert await claimer.push([item(claimed, 3, 4)]) == [PushStatus.POSITION]
    assert await claimer.push([PushItem(claimed.job_id, claimed.fence, 2, outcome=failed("OTHER"))]) == [
        PushStatus.POSITION
    ]
    await claimer.release([claimed])
    log = await client.read(claimed.job_id, 0)
    assert log is not None
    assert (log.state, log.outcome, log.end_position) == (JobState.FINISHED, finished(3), 3)


async def test_a_push_after_the_deadline_expires_the_job(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    claimed = await claim_one(submitter, claimer, timeout_ms=60_000)
    await claimer.push([item(claimed, 0, 1)])
    await redis_client.hset(f"{client.shards[0].keys.root}:job:{claimed.job_id}", "deadline_ms", 1)
    assert await claimer.push([item(claimed, 1, 2)]) == [PushStatus.EXPIRED]
    assert await claimer.push([item(claimed, 1, 2)]) == [PushStatus.EXPIRED]
    log = await client.read(claimed.job_id, 0)
    assert log is not None
    assert (log.state, log.end_position) == (JobState.EXPIRED, 1)


async def test_every_push_renews_the_lease(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    claimed = await claim_one(submitter, claimer)
    leases = f"{client.shards[0].keys.root}:leases"
    for push in (PushItem(claimed.job_id, claimed.fence, 0), item(claimed, 0, 1), item(claimed, 0, 1)):
        await redis_client.zadd(leases, {claimed.job_id: 1})
        assert await claimer.push([push]) == [PushStatus.OK]
        assert await redis_client.zscore(leases, claimed.job_id) > 1


async def test_one_push_carries_many_jobs_and_each_has_its_own_answer(submitter: Submitter, claimer: Claimer) -> None:
    for number in range(300):
        await submitter.submit(make_job(str(number)), digest=b"digest", timeout_ms=None)
    claims = await claimer.claim(max_jobs=256, max_tokens=100_000)
    claims += await claimer.claim(max_jobs=256, max_tokens=100_000)
    assert len(claims) == 300
    for claimed in claims[::7]:
        await submitter.cancel(claimed.job_id)

    statuses = await claimer.push([item(claimed, 0, 1) for claimed in claims])
    assert statuses == [PushStatus.OK if number % 7 else PushStatus.CANCELLED for number in range(300)]
    assert await claimer.push([]) == []
