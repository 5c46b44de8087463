"""Requests that are submitted, watched from anywhere, looked at, and left."""

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest
from gateway_harness import (
    SECRET,
    Gateway,
    RuleWorker,
    ask,
    details_of,
    read_into,
    read_text,
    rule_text,
    start_gateway,
    state_of,
    timeout_ms_of,
)
from google.protobuf.duration_pb2 import Duration
from job_samples import make_job
from oasst.v1 import chat_pb2
from oasst_gateway.departures import Departures
from oasst_gateway.model import ServedModel
from oasst_gateway.watches import Watches
from oasst_jobs import Inbox, JobState, QueueClient, QueueLimits, Submitter
from sick_shards import FIRST_SHARD, PartlyAway
from valkey_server import ValkeyServer
from waiting import until


async def submit(gateway: Gateway, request_id: str = "r-1", **fields: object) -> chat_pb2.Accepted:
    return (await gateway.chat.SubmitChat(ask("Hello!", request_id=request_id, **fields))).accepted


def watch_request(accepted: chat_pb2.Accepted, *, after: int = 0) -> chat_pb2.WatchChatRequest:
    return chat_pb2.WatchChatRequest(request_id=accepted.request_id, resume_token=accepted.resume_token, after=after)


def get_request(accepted: chat_pb2.Accepted) -> chat_pb2.GetChatRequest:
    return chat_pb2.GetChatRequest(request_id=accepted.request_id, resume_token=accepted.resume_token)


async def test_a_submitted_request_runs_with_nobody_watching(gateway: Gateway, worker: RuleWorker) -> None:
    accepted = await submit(gateway)

    async def has_finished() -> bool:
        return (await gateway.chat.GetChat(get_request(accepted))).state == chat_pb2.CHAT_STATE_FINISHED

    await until(has_finished)
    response = (await gateway.chat.GetChat(get_request(accepted))).response
    assert response == await gateway.chat.Chat(ask("Hello!", request_id="r-1"))
    assert response.choices[0].text == rule_text(4)


async def test_the_rpcs_own_deadline_is_not_the_submitted_requests(gateway: Gateway, queue: QueueClient) -> None:
    await gateway.chat.SubmitChat(ask("Hello!", request_id="r-1"), timeout=30)
    assert await state_of(queue, "r-1") is not None
    assert await timeout_ms_of(queue, "r-1") is None


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_watch_goes_on_from_every_position(gateway: Gateway, worker: RuleWorker, num_choices: int) -> None:
    accepted = await submit(gateway, n=num_choices)
    whole = [event async for event in gateway.chat.WatchChat(watch_request(accepted)) if event.HasField("delta")]
    tokens = [(choice, index) for index in range(4) for choice in range(num_choices)]
    assert sum(len(event.delta.token_ids) for event in whole) == len(tokens)
    for after in range(len(tokens) + 1):
        events = [event async for event in gateway.chat.WatchChat(watch_request(accepted, after=after))]
        assert events[0].accepted.seed == accepted.seed
        assert events[0].next_position == after
        told = {
            (event.delta.choice, event.delta.position + index)
            for event in events
            for index in range(len(event.delta.token_ids))
        }
        assert told == set(tokens[after:])
        assert events[-1].HasField("finished")
        assert events[-1].next_position == len(tokens)


async def test_a_snapshot_tells_what_there_is_so_far(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    worker.allow(2)
    accepted = await submit(gateway)

    async def has_two() -> bool:
        snapshot = await gateway.chat.GetChat(get_request(accepted))
        return snapshot.response.usage.completion_tokens == 2

    await until(has_two)
    snapshot = await gateway.chat.GetChat(get_request(accepted))
    assert snapshot.state == chat_pb2.CHAT_STATE_RUNNING
    assert snapshot.response.choices[0].text == rule_text(2)
    assert not snapshot.HasField("queue")


async def test_a_snapshot_tells_where_a_request_waits_and_how_it_failed(gateway: Gateway) -> None:
    await submit(gateway, "r-0")
    accepted = await submit(gateway, "r-1")
    waiting = await gateway.chat.GetChat(get_request(accepted))
    assert (waiting.state, waiting.queue.position) == (chat_pb2.CHAT_STATE_WAITING, 1)
    await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1"))
    cancelled = await gateway.chat.GetChat(get_request(accepted))
    assert (cancelled.state, cancelled.failed.reason) == (chat_pb2.CHAT_STATE_CANCELLED, "CANCELLED")


async def test_snapshots_count_as_open_while_they_are_made(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, max_open_chats=2) as gateway:
        accepted = await submit(gateway)
        streams = [gateway.chat.WatchChat(watch_request(accepted)) for _ in range(3)]
        for stream in streams:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.GetChat(get_request(accepted))
        assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        for stream in streams:
            stream.cancel()


async def test_another_gateway_with_the_secret_goes_on_where_the_first_stopped(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    worker.hold()
    worker.allow(2)
    async with (
        start_gateway(model, valkey_url, resume_secret=SECRET) as first,
        start_gateway(model, valkey_url, resume_secret=SECRET) as second,
    ):
        stream = first.chat.ChatStream(ask("Hello!", request_id="r-1", detach_grace=Duration(seconds=60)))
        accepted = (await stream.read()).accepted
        position = [(await stream.read()).next_position for _ in range(2)][-1]
        stream.cancel()
        worker.free()
        rest = await read_text(second.chat.WatchChat(watch_request(accepted, after=position)))
        assert rest == rule_text(4).removeprefix(rule_text(2))


@pytest.mark.parametrize("wrong", ["", "ü", "0" * 32])
async def test_a_wrong_resume_token_finds_nothing(gateway: Gateway, wrong: str) -> None:
    accepted = await submit(gateway)
    watch = chat_pb2.WatchChatRequest(request_id="r-1", resume_token=wrong)
    get = chat_pb2.GetChatRequest(request_id="r-1", resume_token=wrong)
    for call in (gateway.chat.WatchChat(watch).read(), gateway.chat.GetChat(get)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert details_of(refused.value).reason == "CHAT_NOT_FOUND"
    # What is not there at all looks the same.
    unknown = chat_pb2.GetChatRequest(request_id="r-2", resume_token=accepted.resume_token)
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await gateway.chat.GetChat(unknown)
    assert (missing.value.code(), missing.value.details()) == (refused.value.code(), refused.value.details())


async def test_a_position_no_request_can_have_is_refused(gateway: Gateway) -> None:
    accepted = await submit(gateway)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.WatchChat(watch_request(accepted, after=10**6)).read()
    assert "after" in details_of(refused.value).violations


async def test_whoever_has_seen_more_than_is_stored_is_told_so(gateway: Gateway, worker: RuleWorker) -> None:
    accepted = await submit(gateway)
    events: list[chat_pb2.ChatEvent] = []
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await read_into(events, gateway.chat.WatchChat(watch_request(accepted, after=20)))
    assert events[-1].failed.reason == "STREAM_DIVERGED"
    assert ended.value.code() is grpc.StatusCode.ABORTED


async def test_leaving_a_watch_does_not_end_a_submitted_request(
    gateway: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    accepted = await submit(gateway)
    stream = gateway.chat.WatchChat(watch_request(accepted))
    await stream.read()
    stream.cancel()
    await until(lambda: gateway.sample("requests_in_flight", rpc="ChatService/WatchChat") == 0)
    worker.free()

    async def has_finished() -> bool:
        return await state_of(queue, "r-1") is JobState.FINISHED

    await until(has_finished)


async def test_a_request_runs_on_while_another_gateway_watches_it(
    model: ServedModel, valkey_url: str, worker: RuleWorker, queue: QueueClient
) -> None:
    """No grace at all, and the gateway that took the request in is left first."""
    worker.hold()
    async with (
        start_gateway(model, valkey_url, resume_secret=SECRET) as first,
        start_gateway(model, valkey_url, resume_secret=SECRET) as second,
    ):
        stream = first.chat.ChatStream(ask("Hello!", request_id="r-1"))
        accepted = (await stream.read()).accepted
        watch = second.chat.WatchChat(watch_request(accepted))
        await watch.read()
        stream.cancel()
        await until(lambda: first.sample("requests_in_flight", rpc="ChatService/ChatStream") == 0)
        worker.free()
        assert await read_text(watch) == rule_text(4)


async def test_coming_back_at_once_is_not_overtaken_by_having_left(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    worker.hold()
    # News comes by itself, not by a silent reader's look.
    async with start_gateway(model, valkey_url, recheck_s=3600) as gateway, asyncio.timeout(20):
        stream = gateway.chat.ChatStream(ask("Hello!", request_id="r-1", detach_grace=Duration(seconds=60)))
        accepted = (await stream.read()).accepted
        for _ in range(20):
            stream.cancel()
            stream = gateway.chat.WatchChat(watch_request(accepted))
            await stream.read()
        worker.free()
        assert await read_text(stream) == rule_text(4)


async def test_a_reader_who_cannot_go_on_no_longer_keeps_the_request_running(
    model: ServedModel, valkey_url: str, worker: RuleWorker, queue: QueueClient
) -> None:
    """What was told to one reader is not how the request ended."""
    worker.hold()
    async with (
        start_gateway(model, valkey_url, resume_secret=SECRET) as first,
        start_gateway(model, valkey_url, resume_secret=SECRET) as second,
    ):
        stream = first.chat.ChatStream(ask("Hello!", request_id="r-1"))
        accepted = (await stream.read()).accepted
        events: list[chat_pb2.ChatEvent] = []
        with pytest.raises(grpc.aio.AioRpcError):
            await read_into(events, second.chat.WatchChat(watch_request(accepted, after=20)))
        assert events[-1].failed.reason == "STREAM_DIVERGED"
        stream.cancel()

        async def is_cancelled() -> bool:
            return await state_of(queue, "r-1") is JobState.CANCELLED

        await until(is_cancelled)


async def test_the_last_to_leave_takes_back_what_another_began(queue: QueueClient) -> None:
    submitter = Submitter(queue, gateway_id="g", limits=QueueLimits())
    job = make_job("r-1")
    watches = Watches(submitter, Inbox(queue, gateway_id="g"))
    async with AsyncExitStack() as last, AsyncExitStack() as first:
        watch = await first.enter_async_context(watches.open(job.job_id))
        await submitter.submit(job, digest=b"", timeout_ms=None, grace_ms=0)
        watch.job.begin()
        await last.enter_async_context(watches.open(job.job_id))
    await until(lambda: _is_cancelled(submitter, job.job_id))


async def test_jobs_that_are_left_while_the_queue_is_away_share_few_tasks_until_it_hears_of_them(
    valkey: ValkeyServer, queue: QueueClient
) -> None:
    submitter = Submitter(queue, gateway_id="g", limits=QueueLimits())
    watches = Watches(submitter, Inbox(queue, gateway_id="g"))
    jobs = [make_job(f"r-{index}") for index in range(200)]
    async with AsyncExitStack() as opened:
        for job in jobs:
            watch = await opened.enter_async_context(watches.open(job.job_id))
            await submitter.submit(job, digest=b"", timeout_ms=None, grace_ms=0)
            watch.job.begin()
        valkey.kill()
    await until(lambda: len(asyncio.all_tasks()) > 2)
    assert len(asyncio.all_tasks()) < len(jobs) / 2
    valkey.restart()
    for job in jobs:
        await until(lambda job=job: _is_cancelled(submitter, job.job_id))


async def test_a_job_that_was_left_and_come_back_to_while_the_queue_is_away_is_left_once_more(
    valkey: ValkeyServer, queue: QueueClient
) -> None:
    submitter = Submitter(queue, gateway_id="g", limits=QueueLimits())
    watches = Watches(submitter, Inbox(queue, gateway_id="g"))
    job = make_job("r-1")
    async with watches.open(job.job_id) as watch:
        await submitter.submit(job, digest=b"", timeout_ms=None, grace_ms=0)
        watch.job.begin()
        valkey.kill()
    async with watches.open(job.job_id):
        valkey.restart()
    await until(lambda: _is_cancelled(submitter, job.job_id))


async def test_what_the_queue_has_not_heard_in_a_minute_it_is_not_told_any_more(queue: QueueClient) -> None:
    now_s = 0.0
    submitter = Submitter(queue, gateway_id="g", limits=QueueLimits())
    job = make_job("r-1")
    await submitter.submit(job, digest=b"", timeout_ms=None, grace_ms=0)
    departures = Departures(submitter, clock=lambda: now_s)
    departures.begin(job.job_id)
    now_s = 59.0
    assert await departures.take_back(job.job_id)
    departures.begin(job.job_id)
    now_s += 60.0
    await departures.aclose(grace_s=20)
    assert not await departures.take_back(job.job_id)
    assert not await _is_cancelled(submitter, job.job_id)


async def test_jobs_of_a_shard_that_hangs_keep_no_others_from_being_left(queue: QueueClient) -> None:
    redis = PartlyAway(connection_pool=queue.redis.connection_pool)
    submitter = Submitter(QueueClient(redis, num_shards=2), gateway_id="g", limits=QueueLimits())
    jobs = [make_job(f"r-{index}") for index in range(200)]
    of_first, of_second = ([job for job in jobs if submitter.shard_number(job.job_id) == shard] for shard in (0, 1))
    departures = Departures(submitter)
    for job in of_second:
        await submitter.submit(job, digest=b"", timeout_ms=None, grace_ms=0)
    redis.away, redis.hangs = FIRST_SHARD, True
    for job in (*of_first, *of_second):
        departures.begin(job.job_id)
    for job in of_second:
        await until(lambda job=job: _is_cancelled(submitter, job.job_id))
    redis.released.set()
    await departures.aclose(grace_s=0)


async def test_a_departure_that_fails_unforeseen_keeps_no_others_from_being_told(
    queue: QueueClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    submitter = Submitter(queue, gateway_id="g", limits=QueueLimits())
    broken, job = make_job("r-1"), make_job("r-2")
    await submitter.submit(job, digest=b"", timeout_ms=None, grace_ms=0)
    unwatch = submitter.unwatch

    async def unwatch_or_break(job_id: str) -> JobState | None:
        if job_id == broken.job_id:
            raise ValueError("a defect")
        return await unwatch(job_id)

    monkeypatch.setattr(submitter, "unwatch", unwatch_or_break)
    departures = Departures(submitter)
    for each in (broken, job):
        departures.begin(each.job_id)
    await departures.aclose(grace_s=20)
    assert await _is_cancelled(submitter, job.job_id)
    assert not await departures.take_back(broken.job_id)
    assert f"nobody watches job_id={broken.job_id}" in caplog.text


async def _is_cancelled(submitter: Submitter, job_id: str) -> bool:
    snapshot = await submitter.status(job_id)
    return snapshot is not None and snapshot.state is JobState.CANCELLED


async def test_what_the_queue_forgot_to_be_watched_is_told_again(queue: QueueClient) -> None:
    submitter = Submitter(queue, gateway_id="g", limits=QueueLimits())
    job, not_begun = make_job("r-1"), make_job("r-2")
    watches = Watches(submitter, Inbox(queue, gateway_id="g"))
    async with watches.open(job.job_id) as watch, watches.open(not_begun.job_id):
        for each in (job, not_begun):
            await submitter.submit(each, digest=b"", timeout_ms=None, grace_ms=1_000, is_watched=False)
        watch.job.begin()
        await watches.keep_alive()
        assert await submitter.keep_watching([job.job_id, not_begun.job_id]) == [not_begun.job_id]
