"""How news of jobs reach those who wait for them, whatever gets lost on the way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio
from job_samples import MODEL, failed, finished, logged_text, make_entry, make_job, news_of
from oasst.jobs.v1 import job_pb2
from oasst_jobs import (
    ClaimedJob,
    Claimer,
    Inbox,
    PushItem,
    PushStatus,
    QueueClient,
    QueueLimits,
    Submitter,
    Subscription,
    Sweeper,
    is_end_of_job,
    job_id_for,
)
from oasst_jobs import inbox as inbox_module
from waiting import until

News = list[job_pb2.LogEntry | job_pb2.Outcome]


@asynccontextmanager
async def running_inbox(
    client: QueueClient, gateway_id: str = "gateway-1", *, recheck_s: float = 60.0
) -> AsyncIterator[Inbox]:
    """An inbox that is read from. By default silence is never looked into, so that nothing is healed by chance."""
    inbox = Inbox(client, gateway_id=gateway_id, recheck_s=recheck_s)
    task = asyncio.create_task(inbox.run())
    try:
        yield inbox
    finally:
        assert not task.done(), task
        task.cancel()
        await asyncio.wait([task])


async def collect(subscription: Subscription) -> News:
    async with asyncio.timeout(10):
        return [news async for news in news_of(subscription)]


async def submit(submitter: Submitter, request_id: str = "watched", *, timeout_ms: int | None = None) -> str:
    job = make_job(request_id, max_new_tokens=1000)
    await submitter.submit(job, digest=b"digest", timeout_ms=timeout_ms)
    return job.job_id


async def claim_one(claimer: Claimer) -> ClaimedJob:
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=10_000)
    return claimed


async def push(claimer: Claimer, claimed: ClaimedJob, start: int, stop: int, *, ends: bool = False) -> None:
    outcome = finished(stop) if ends else None
    item = PushItem(claimed.job_id, claimed.fence, start, make_entry(start, stop), outcome)
    assert await claimer.push([item]) == [PushStatus.OK]


JOB_ID = job_id_for("tenant", "watched")


async def damage_log(redis_client: redis.asyncio.Redis, client: QueueClient, job_id: str) -> None:
    """The log holds what no reader understands, as one of another release may."""
    root = client.shards[0].keys.root
    await redis_client.xadd(f"{root}:log:{job_id}", {"entry": b"\xff\xff"}, id="9-0")
    await redis_client.hset(f"{root}:job:{job_id}", "end_position", 9)


async def test_a_subscription_sees_every_entry_then_the_outcome_then_ends(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter)
        reading = asyncio.create_task(collect(subscription))
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 1)
        await push(claimer, claimed, 1, 3)
        await push(claimer, claimed, 3, 4, ends=True)
        assert await reading == [make_entry(0, 1), make_entry(1, 3), make_entry(3, 4), finished(4)]


async def test_each_entry_is_seen_as_soon_as_it_is_pushed(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription, asyncio.timeout(10):
        news = news_of(subscription)
        await submit(submitter)
        claimed = await claim_one(claimer)
        for position in range(20):
            await push(claimer, claimed, position, position + 1)
            assert await anext(news) == make_entry(position, position + 1)


async def test_many_jobs_pushed_at_once_each_reach_their_own_reader(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client) as inbox:

        async def watch(number: int) -> str:
            async with inbox.subscribe(job_id_for("tenant", str(number))) as subscription:
                await submit(submitter, str(number))
                *entries, outcome = await collect(subscription)
                assert outcome.HasField("finished")
                return logged_text(entries)

        readers = [asyncio.create_task(watch(number)) for number in range(50)]
        claims: list[ClaimedJob] = []
        while len(claims) < 50:
            claims += await claimer.claim(max_jobs=50, max_tokens=100_000)
        for step in range(5):
            items = [
                PushItem(
                    claimed.job_id,
                    claimed.fence,
                    step * (number + 1),
                    make_entry(step * (number + 1), (step + 1) * (number + 1)),
                    finished() if step == 4 else None,
                )
                for number, claimed in enumerate(claims)
            ]
            assert set(await claimer.push(items)) == {PushStatus.OK}
        texts = await asyncio.gather(*readers)
        assert sorted(len(text.split()) for text in texts) == [5 * (number + 1) for number in range(50)]


async def test_a_job_that_ended_before_anybody_watched_is_told_whole(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    await submit(submitter)
    claimed = await claim_one(claimer)
    await push(claimer, claimed, 0, 5)
    await push(claimer, claimed, 5, 6, ends=True)
    async with running_inbox(client, "gateway-2") as inbox, inbox.subscribe(JOB_ID) as subscription:
        assert await collect(subscription) == [make_entry(0, 5), make_entry(5, 6), finished(6)]


async def test_a_subscription_goes_on_from_the_position_it_is_given(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    await submit(submitter)
    claimed = await claim_one(claimer)
    await push(claimer, claimed, 0, 5)
    await push(claimer, claimed, 5, 6)
    second = Submitter(client, gateway_id="gateway-2", limits=QueueLimits())
    async with running_inbox(client, "gateway-2") as inbox, inbox.subscribe(JOB_ID, after=5) as subscription:
        snapshot = await second.attach(JOB_ID)
        assert snapshot is not None
        assert snapshot.end_position == 6
        reading = asyncio.create_task(collect(subscription))
        await push(claimer, claimed, 6, 9, ends=True)
        assert await reading == [make_entry(5, 6), make_entry(6, 9), finished(9)]


async def test_several_gateways_and_several_readers_see_the_same(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    second = Submitter(client, gateway_id="gateway-2", limits=QueueLimits())
    async with (
        running_inbox(client, "gateway-1") as inbox_1,
        running_inbox(client, "gateway-2") as inbox_2,
        inbox_1.subscribe(JOB_ID) as reader_1,
        inbox_1.subscribe(JOB_ID) as reader_2,
        inbox_2.subscribe(JOB_ID) as reader_3,
    ):
        await submit(submitter)
        await second.attach(JOB_ID)
        await second.attach(JOB_ID)
        readings = [asyncio.create_task(collect(reader)) for reader in (reader_1, reader_2, reader_3)]
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 2)
        await push(claimer, claimed, 2, 3, ends=True)
        for news in await asyncio.gather(*readings):
            assert news == [make_entry(0, 2), make_entry(2, 3), finished(3)]


async def test_a_gateway_that_attaches_twice_hears_everything_once(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    await submit(submitter)
    await submitter.attach(JOB_ID)
    await submitter.attach(JOB_ID)
    await push(claimer, await claim_one(claimer), 0, 1)
    [(_, fields)] = await redis_client.xrange(client.shards[0].keys.updates("gateway-1"))
    assert len(job_pb2.UpdateBatch.FromString(fields[b"batch"]).updates) == 1


async def test_a_gap_in_the_stream_is_filled_from_the_log(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    updates = client.shards[0].keys.updates("gateway-1")
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription, asyncio.timeout(10):
        news = news_of(subscription)
        await submit(submitter)
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 1)
        assert await anext(news) == make_entry(0, 1)

        # These two never reach the stream's reader: written and dropped in one transaction.
        await redis_client.rename(updates, "elsewhere")
        async with redis_client.pipeline(transaction=True) as lost:
            for start, stop in [(1, 4), (4, 5)]:
                item = PushItem(claimed.job_id, claimed.fence, start, make_entry(start, stop))
                await _push_within(client, lost, item)
            lost.delete(updates)
            lost.rename("elsewhere", updates)
            await lost.execute()

        await push(claimer, claimed, 5, 6, ends=True)
        assert [each async for each in news] == [make_entry(1, 4), make_entry(4, 5), make_entry(5, 6), finished(6)]


async def _push_within(client: QueueClient, pipeline: redis.asyncio.client.Pipeline, item: PushItem) -> None:
    """Queues a push in a transaction."""

    class Queueing(redis.asyncio.Redis):
        async def execute_command(self, *command: object, **options: object) -> object:
            pipeline.execute_command(*command)
            return [b"ok"]

    await QueueClient(Queueing()).push("worker-1", [item], lease_ms=10_000)


async def test_a_lost_outcome_is_found_after_a_silence(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client, "gateway-2", recheck_s=0.02) as inbox, inbox.subscribe(JOB_ID) as subscription:
        # gateway-2 is none of the job's watchers: nothing ever reaches it by its stream.
        await submit(submitter)
        reading = asyncio.create_task(collect(subscription))
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 2)
        await push(claimer, claimed, 2, 3, ends=True)
        assert await reading == [make_entry(0, 2), make_entry(2, 3), finished(3)]


@pytest.mark.parametrize("is_running", [False, True])
async def test_a_cancellation_reaches_the_reader(
    client: QueueClient, submitter: Submitter, claimer: Claimer, is_running: bool
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter)
        reading = asyncio.create_task(collect(subscription))
        if is_running:
            await push(claimer, await claim_one(claimer), 0, 2)
        await submitter.cancel(JOB_ID)
        *entries, outcome = await reading
        assert entries == [make_entry(0, 2)] * is_running
        assert outcome.failed.reason == "CANCELLED"
        assert outcome.failed.usage.completion_tokens == 2 * is_running


async def test_a_deadline_reaches_the_reader(client: QueueClient, submitter: Submitter, sweeper: Sweeper) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter, timeout_ms=0)
        reading = asyncio.create_task(collect(subscription))
        await sweeper.sweep()
        [outcome] = await reading
        assert outcome.failed.reason == "DEADLINE_EXCEEDED"


async def test_a_job_that_killed_its_workers_reaches_the_reader(
    client: QueueClient, submitter: Submitter, claimer: Claimer, sweeper: Sweeper, redis_client: redis.asyncio.Redis
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter)
        reading = asyncio.create_task(collect(subscription))
        for _ in range(3):
            assert len(await claimer.claim(max_jobs=1, max_tokens=10_000, is_idle=True)) == 1
            await redis_client.zadd(f"{client.shards[0].keys.root}:leases", {JOB_ID: 1})
            await sweeper.sweep()
        [outcome] = await reading
        assert outcome.failed.reason == "POISON"


async def test_a_workers_own_failure_reaches_the_reader_as_it_was_written(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter)
        reading = asyncio.create_task(collect(subscription))
        claimed = await claim_one(claimer)
        await claimer.push([PushItem(claimed.job_id, claimed.fence, 0, outcome=failed("NUMERIC"))])
        assert await reading == [failed("NUMERIC")]


async def test_a_stream_goes_on_after_the_server_was_killed_and_restarted(
    valkey, client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription, asyncio.timeout(20):
        news = news_of(subscription)
        await submit(submitter)
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 2)
        assert await anext(news) == make_entry(0, 2)
        valkey.restart()
        # Pushed before the inbox has found its way back.
        await push(claimer, claimed, 2, 5)
        assert await anext(news) == make_entry(2, 5)
        await push(claimer, claimed, 5, 6, ends=True)
        assert [each async for each in news] == [make_entry(5, 6), finished(6)]


async def test_what_was_pushed_while_the_stream_could_not_be_read_is_read_from_the_log(
    valkey,
    client: QueueClient,
    submitter: Submitter,
    claimer: Claimer,
    redis_client: redis.asyncio.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def has_noticed() -> bool:
        return "inbox lost its connection" in caplog.text

    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription, asyncio.timeout(20):
        news = news_of(subscription)
        await submit(submitter)
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 2)
        assert await anext(news) == make_entry(0, 2)
        valkey.kill()
        await until(has_noticed)
        valkey.start()
        # The batch is gone before the inbox is back, and nothing more will come.
        await push(claimer, claimed, 2, 5, ends=True)
        await redis_client.delete(client.shards[0].keys.updates("gateway-1"))
        assert [each async for each in news] == [make_entry(2, 5), finished(5)]


async def test_news_are_heard_after_the_ids_of_the_stream_went_back(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    """As after the server's clock was set back: a stream that was gone begins again before where it was."""
    stream = client.shards[0].keys.updates("gateway-1")
    await redis_client.xadd(stream, {"batch": b""}, id="9999999999999-0")
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription, asyncio.timeout(10):
        news = news_of(subscription)
        await submit(submitter)
        claimed = await claim_one(claimer)
        for position in range(2):
            await push(claimer, claimed, position, position + 1)
            assert await anext(news) == make_entry(position, position + 1)
        await redis_client.delete(stream)
        await push(claimer, claimed, 2, 3)
        assert await anext(news) == make_entry(2, 3)


async def test_a_log_that_was_set_back_is_noticed_by_the_next_news(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        news = news_of(subscription)
        await submit(submitter)
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 2)
        await push(claimer, claimed, 2, 9)
        assert [await anext(news) for _ in range(2)] == [make_entry(0, 2), make_entry(2, 9)]

        # As after a failover to a replica that had not seen the second push.
        log = f"{client.shards[0].keys.root}:log:{JOB_ID}"
        [(first_id, first), _] = await redis_client.xrange(log)
        await redis_client.delete(log)
        await redis_client.xadd(log, first, first_id)
        await redis_client.hset(f"{client.shards[0].keys.root}:job:{JOB_ID}", "end_position", 2)

        await push(claimer, claimed, 2, 3)
        [outcome] = [each async for each in news]
        assert outcome.failed.reason == "STREAM_DIVERGED"


async def test_a_job_that_redis_lost_ends_as_aborted(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    async with running_inbox(client, recheck_s=0.02) as inbox, inbox.subscribe(JOB_ID) as subscription:
        news = news_of(subscription)
        await submit(submitter)
        await push(claimer, await claim_one(claimer), 0, 2)
        assert await anext(news) == make_entry(0, 2)
        await redis_client.flushall()
        [outcome] = [each async for each in news]
        assert outcome.failed.reason == "JOB_LOST"


async def test_a_log_shorter_than_what_was_seen_ends_as_diverged(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    await submit(submitter)
    await push(claimer, await claim_one(claimer), 0, 2)
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID, after=7) as subscription:
        [outcome] = await collect(subscription)
        assert outcome.failed.reason == "STREAM_DIVERGED"


async def test_a_job_may_be_submitted_long_after_it_was_subscribed_to(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client, recheck_s=0.01) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await asyncio.sleep(0.1)
        await submit(submitter)
        await push(claimer, await claim_one(claimer), 0, 1, ends=True)
        assert await collect(subscription) == [make_entry(0, 1), finished(1)]


async def test_a_cancelled_reader_leaves_nothing_behind_and_disturbs_no_other(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    async with running_inbox(client) as inbox:

        async def watch() -> News:
            async with inbox.subscribe(JOB_ID) as subscription:
                return await collect(subscription)

        await submit(submitter)
        readers = [asyncio.create_task(watch()) for _ in range(20)]
        await asyncio.sleep(0)
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 1)
        for reader in readers[1:]:
            reader.cancel()
        await push(claimer, claimed, 1, 2, ends=True)
        assert await readers[0] == [make_entry(0, 1), make_entry(1, 2), finished(2)]
        await asyncio.wait(readers)
        assert inbox._subscriptions == {}


async def test_an_inbox_stops_at_once_whenever_it_is_cancelled(client: QueueClient) -> None:
    await client.check_server()
    started_s = time.monotonic()
    for num_turns in range(40):
        task = asyncio.create_task(Inbox(client, gateway_id="gateway-1").run())
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait([task])
        assert task.cancelled()
    assert time.monotonic() - started_s < 10


async def test_a_gateway_started_anew_does_not_read_its_predecessors_news(
    client: QueueClient, submitter: Submitter, claimer: Claimer
) -> None:
    await submit(submitter)
    claimed = await claim_one(claimer)
    await push(claimer, claimed, 0, 1)
    last_id = await client.shards[0].last_update_id("gateway-1")
    assert last_id != "0-0"
    await push(claimer, claimed, 1, 2)
    [(_, batch)] = await client.shards[0].read_updates("gateway-1", last_id)
    assert [update.entry for update in batch.updates] == [make_entry(1, 2)]


async def test_what_was_read_is_cut_from_the_stream(
    client: QueueClient,
    submitter: Submitter,
    claimer: Claimer,
    redis_client: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox_module, "_BATCHES_PER_TRIM", 100)
    updates = client.shards[0].keys.updates("gateway-1")
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter)
        claimed = await claim_one(claimer)
        reading = asyncio.create_task(collect(subscription))
        for position in range(310):  # Cut in pieces of a hundred.
            await push(claimer, claimed, position, position + 1, ends=position == 309)
        assert len(await reading) == 311

        async def is_cut() -> bool:
            return await redis_client.xlen(updates) < 200

        await until(is_cut)


async def test_a_worker_of_another_model_is_not_involved(client: QueueClient) -> None:
    assert await Claimer(client, worker_id="w", model="not " + MODEL).claim(max_jobs=1, max_tokens=10_000) == []


async def test_a_log_that_cannot_be_read_ends_its_own_stream_alone(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    defects: list[str] = []
    damaged, sound = await submit(submitter, "damaged"), await submit(submitter)
    await damage_log(redis_client, client, damaged)
    await submitter.cancel(sound)
    inbox = Inbox(client, gateway_id="gateway-1", on_defect=lambda: defects.append("defect"))
    reading = asyncio.create_task(inbox.run())
    async with asyncio.timeout(10), inbox.subscribe(damaged) as first, inbox.subscribe(sound) as second:
        [outcome] = await first.take()
        assert outcome.failed.reason == "UNREADABLE_LOG"
        assert not is_end_of_job(outcome)
        [outcome] = await second.take()
        assert outcome.failed.reason == "CANCELLED"
    assert defects == ["defect"]
    reading.cancel()
    await asyncio.wait([reading])


async def test_news_that_cannot_be_read_are_passed_over(
    client: QueueClient, submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    async with running_inbox(client) as inbox, inbox.subscribe(JOB_ID) as subscription:
        await submit(submitter)
        reading = asyncio.create_task(collect(subscription))
        claimed = await claim_one(claimer)
        await push(claimer, claimed, 0, 1)
        await redis_client.xadd(client.shards[0].keys.updates("gateway-1"), {"batch": b"\xff\xff"})
        await push(claimer, claimed, 1, 3, ends=True)
        assert await reading == [make_entry(0, 1), make_entry(1, 3), finished(3)]
