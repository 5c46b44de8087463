"""Who is let in, and what those are told who are not."""

import asyncio
from contextlib import suppress

import grpc
import pytest
from gateway_harness import Gateway, RuleWorker, ask, details_of, read_text, start_gateway
from google.protobuf.duration_pb2 import Duration
from job_samples import make_job
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, model_pb2
from oasst_gateway.admission import Admission, Outlook, SpeedEstimate
from oasst_gateway.authentication import DEFAULT_TENANT
from oasst_gateway.errors import NoWorkerError, RefusedError
from oasst_gateway.metrics import GatewayMetrics
from oasst_gateway.model import ServedModel
from oasst_gateway.monitor import QueueMonitor
from oasst_gateway.preparation import PreparedJob
from oasst_jobs import Claimer, QueueClient, QueueLimits, Submitter
from prometheus_client import CollectorRegistry
from waiting import until


def test_a_wait_follows_from_the_tokens_ahead_and_the_speed() -> None:
    outlook = Outlook(has_workers=True, tokens_per_s=50.0)
    assert outlook.wait_s(100) == 2.0
    assert outlook.max_tokens_ahead(4.0) == 200
    assert outlook.max_tokens_ahead(None) is None


def test_without_a_known_speed_nothing_is_foretold_and_nobody_refused() -> None:
    outlook = Outlook(has_workers=True, tokens_per_s=None)
    assert outlook.wait_s(100) is None
    assert outlook.max_tokens_ahead(0.1) is None
    assert outlook.retry_after_s(100, spread=1.0) == 1.0


@pytest.mark.parametrize(("waiting_tokens", "retry_after_s"), [(0, 0.2), (200, 4.0), (10**9, 30.0)])
def test_the_time_to_come_back_is_the_wait_within_bounds(waiting_tokens: int, retry_after_s: float) -> None:
    outlook = Outlook(has_workers=True, tokens_per_s=50.0)
    assert outlook.retry_after_s(waiting_tokens, spread=1.0) == retry_after_s
    assert outlook.retry_after_s(waiting_tokens, spread=1.2) == pytest.approx(1.2 * retry_after_s)


def test_the_speed_is_the_recent_peak_of_what_is_generated() -> None:
    speed = SpeedEstimate()
    assert speed.asked_per_s is None
    for generated_per_s in (0.0, 80.0, 20.0):
        speed.saw_speed(generated_per_s)
    assert speed.asked_per_s == 80.0
    speed.saw_speed(20.0, num_waiting=1)
    assert speed.asked_per_s == pytest.approx(80 * 0.98)
    for _ in range(200):
        speed.saw_speed(20.0, num_waiting=1)
    assert speed.asked_per_s == pytest.approx(20.0)


def test_workers_for_whom_nothing_waits_are_as_fast_as_before() -> None:
    speed = SpeedEstimate()
    speed.saw_speed(80.0)
    for _ in range(40_000):  # A night.
        speed.saw_speed(0.0)
    assert speed.asked_per_s == 80.0


def test_fewer_workers_are_slower_though_nothing_waits_for_them() -> None:
    speed = SpeedEstimate()
    speed.saw_speed(800.0, num_workers=8, num_running=64)
    speed.saw_speed(0.0, num_workers=2)
    assert speed.asked_per_s == 200.0
    speed.saw_speed(0.0, num_workers=8)
    assert speed.asked_per_s == 800.0


def test_requests_that_use_a_quarter_of_what_they_ask_for_make_the_queue_four_times_as_fast() -> None:
    speed = SpeedEstimate()
    speed.saw_speed(100.0)
    for _ in range(200):
        speed.saw_finished(asked=400, generated=100)
    assert speed.asked_per_s == pytest.approx(400.0, rel=0.01)


def test_a_request_that_generates_next_to_nothing_hardly_changes_the_speed() -> None:
    """A long prompt for one token, among others that use a quarter of what they ask for."""
    speed = SpeedEstimate()
    speed.saw_speed(100.0)
    for asked, generated in [(100, 25), (1600, 400), (400, 100)] * 70:
        speed.saw_finished(asked=asked, generated=generated)
    assert speed.asked_per_s == pytest.approx(400.0, rel=0.01)
    speed.saw_finished(asked=2001, generated=1)
    assert speed.asked_per_s == pytest.approx(400.0, rel=0.25)


def test_the_first_request_to_finish_does_not_decide_alone() -> None:
    speed = SpeedEstimate()
    speed.saw_speed(100.0)
    speed.saw_finished(asked=2001, generated=1)
    assert 100 < (speed.asked_per_s or 0) < 200


@pytest.mark.parametrize("num_watching", [0, 3])
async def test_a_finished_request_is_counted_once_however_many_read_it(
    gateway: Gateway, worker: RuleWorker, monkeypatch: pytest.MonkeyPatch, num_watching: int
) -> None:
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(
        SpeedEstimate, "saw_finished", lambda _, *, asked, generated: counted.append((asked, generated))
    )
    worker.hold()
    first = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    accepted = (await first.read()).accepted
    watch = chat_pb2.WatchChatRequest(request_id="r-1", resume_token=accepted.resume_token)
    others = [gateway.chat.WatchChat(watch) for _ in range(num_watching)]
    for other in others:
        await other.read()
    worker.free()
    for call in (first, *others):
        await read_text(call)
    await gateway.chat.Chat(ask("Hello!", request_id="r-1"))
    assert counted == [(accepted.prompt_tokens + 4, 4)]


async def test_a_deadline_that_passes_before_a_worker_comes_is_refused(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, worker_wait_s=30) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.Chat(ask("Hello!"), timeout=5)
        details = details_of(refused.value)
        assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
        assert details.retry_after_s is not None
        # Whoever has time is let in.
        accepted = await gateway.chat.SubmitChat(ask("Hello!"))
        assert accepted.accepted.queue.position == 0


async def test_when_to_look_for_a_worker_again_does_not_follow_from_how_fast_the_last_one_was(
    queue: QueueClient,
) -> None:
    admission = Admission(
        Submitter(queue, gateway_id="g", limits=QueueLimits()),
        look_out=lambda: Outlook(has_workers=False, tokens_per_s=50.0),
        worker_wait_s=30,
        max_waiting_jobs=10,
        draw_spread=lambda: 1.0,
    )
    prepared = PreparedJob(make_job("r-1"), digest=b"", timeout_ms=5_000, grace_ms=None)
    with pytest.raises(NoWorkerError) as refused:
        await admission.submit(prepared, DEFAULT_TENANT, admission.arrival_of(DEFAULT_TENANT, ""))
    assert refused.value.retry_after_s == 1.0


async def test_a_deadline_that_what_is_ahead_outlasts_is_refused(gateway: Gateway, queue: QueueClient) -> None:
    busy = Claimer(queue, worker_id="busy", model="tiny")
    await busy.heartbeat(job_pb2.WorkerStatus(worker_id="busy", model="tiny", tokens_per_second=10.0))
    await until(lambda: gateway.sample("workers") == 1)
    for _ in range(2):
        await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=100))
    soon = Duration(seconds=5)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.Chat(ask("Hello!", timeout=soon))
    details = details_of(refused.value)
    assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE")
    assert details.retry_after_s is not None
    assert details.pushback_ms == round(details.retry_after_s * 1000)
    late = await gateway.chat.SubmitChat(ask("Hello!", timeout=Duration(seconds=500)))
    assert late.accepted.queue.position == 2
    assert 10 < late.accepted.queue.estimated_wait.ToSeconds() < 40


async def test_a_wait_that_is_more_than_a_day_is_not_told(gateway: Gateway, queue: QueueClient) -> None:
    idle = Claimer(queue, worker_id="idle", model="tiny")
    await idle.heartbeat(job_pb2.WorkerStatus(worker_id="idle", model="tiny", tokens_per_second=1e-300))
    await until(lambda: gateway.sample("workers") == 1)
    for position in range(2):
        accepted = (await gateway.chat.SubmitChat(ask("Hello!"))).accepted
        assert accepted.queue.position == position
    assert not accepted.queue.HasField("estimated_wait")
    assert not (await gateway.model.GetLoad(model_pb2.GetLoadRequest())).HasField("estimated_wait")


async def test_too_many_waiting_tokens_are_a_full_queue(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, max_waiting_tokens=100) as gateway:
        await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=80))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=80))
        assert details_of(refused.value).reason == "QUEUE_FULL"


async def test_a_request_too_large_for_the_queue_leaves_it_open_for_smaller_ones(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, max_waiting_tokens=100) as gateway:
        await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=40))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=80))
        assert details_of(refused.value).reason == "QUEUE_FULL"
        await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=4))


async def test_a_hundred_at_once_fill_the_queue_to_its_limit_and_no_further(
    model: ServedModel, valkey_url: str, queue: QueueClient
) -> None:
    async with start_gateway(model, valkey_url, max_waiting_jobs=10) as gateway:
        calls = [gateway.chat.SubmitChat(ask("Hello!")) for _ in range(100)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refusals = [details_of(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert len(answers) - len(refusals) == 10 == (await queue.load("tiny")).waiting_jobs
        assert {refusal.reason for refusal in refusals} == {"QUEUE_FULL"}
        assert all(refusal.retry_after_s is not None for refusal in refusals)


async def test_whoever_comes_just_after_the_queue_was_full_is_not_even_read(
    model: ServedModel, valkey_url: str, queue: QueueClient
) -> None:
    """A request that is wrong as well: what is told shows what was looked at first."""
    async with start_gateway(model, valkey_url, max_waiting_jobs=1) as gateway:
        await gateway.chat.SubmitChat(ask("Hello!", request_id="r-1"))
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.chat.SubmitChat(ask("Hello!"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.SubmitChat(chat_pb2.ChatRequest())
        assert details_of(refused.value).reason == "QUEUE_FULL"
        await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1"))

        async def is_let_in() -> bool:
            with suppress(grpc.aio.AioRpcError):
                return bool(await gateway.chat.SubmitChat(ask("Hello!", request_id="r-2")))
            return False

        await until(is_let_in)


async def test_a_full_shard_is_not_taken_for_a_full_queue(queue: QueueClient) -> None:
    shards = QueueClient(queue.redis, num_shards=2)
    admission = Admission(
        Submitter(shards, gateway_id="g", limits=QueueLimits(max_waiting_jobs=2)),
        look_out=lambda: Outlook(has_workers=True, tokens_per_s=None),
        worker_wait_s=30,
        max_waiting_jobs=2,
        clock=lambda: 0.0,
    )
    arrivals = {name: admission.arrival_of(DEFAULT_TENANT, name) for name in map(str, range(20))}

    async def submit(name: str) -> None:
        job = make_job(name, tenant=DEFAULT_TENANT.name)
        prepared = PreparedJob(job, digest=b"", timeout_ms=None, grace_ms=None)
        await admission.submit(prepared, DEFAULT_TENANT, arrivals[name])

    first, second, third, *_ = (name for name, arrival in arrivals.items() if arrival.shard_number == 0)
    elsewhere = next(name for name, arrival in arrivals.items() if arrival.shard_number == 1)
    await submit(first)
    with pytest.raises(RefusedError):
        await submit(second)
    with pytest.raises(RefusedError):
        await admission.check_open(arrivals[third])
    await admission.check_open(admission.arrival_of(DEFAULT_TENANT, ""))
    await submit(elsewhere)


async def test_a_request_that_has_its_place_is_not_refused_for_a_full_queue(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, max_waiting_jobs=1) as gateway:
        await gateway.chat.SubmitChat(ask("Hello!", request_id="r-1"))
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.chat.SubmitChat(ask("Me too!"))
        stream = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
        assert (await stream.read()).accepted.queue.position == 0
        for stranger in (ask("Hello!", request_id="r-2"), ask("Hello!")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await gateway.chat.SubmitChat(stranger)
            assert details_of(refused.value).reason == "QUEUE_FULL"
        stream.cancel()


async def test_a_request_that_has_its_place_is_not_refused_for_want_of_a_worker(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, worker_wait_s=30) as gateway:
        await gateway.chat.SubmitChat(ask("Hello!", request_id="r-1"))
        stream = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"), timeout=5)
        assert (await stream.read()).accepted.request_id == "r-1"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.Chat(ask("Hello!", request_id="r-2"), timeout=5)
        assert details_of(refused.value).reason == "NO_WORKER"
        stream.cancel()


async def test_a_gateway_with_enough_open_chats_has_some_room_for_those_that_were_accepted(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, max_open_chats=4) as gateway:
        streams = [gateway.chat.ChatStream(ask("Hello!", request_id=f"r-{index}")) for index in range(4)]
        for stream in streams:
            await stream.read()
        again = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
        assert (await again.read()).accepted.request_id == "r-1"
        for request in (ask("Hello!", request_id="r-1"), ask("Hello!", request_id="r-4")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await gateway.chat.Chat(request)
            assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        for stream in (*streams, again):
            stream.cancel()


async def test_requests_that_nobody_watches_count_as_open_while_they_are_let_in(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, max_open_chats=1) as gateway:
        stream = gateway.chat.ChatStream(ask("Hello!"))
        await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.SubmitChat(ask("Hello!"))
        assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        stream.cancel()


async def test_a_worker_that_comes_is_known_long_before_the_next_look_is_due(queue: QueueClient) -> None:
    async def ignore(_: bool) -> None:
        pass

    monitor = QueueMonitor(
        Submitter(queue, gateway_id="g", limits=QueueLimits()),
        model_name="tiny",
        metrics=GatewayMetrics(CollectorRegistry()),
        on_change=ignore,
        interval_s=3600,
    )
    looking = asyncio.create_task(monitor.run())
    await asyncio.wait_for(monitor.wait_available(), 20)
    assert not monitor.look_out().has_workers
    worker = Claimer(queue, worker_id="w", model="tiny")
    await worker.heartbeat(job_pb2.WorkerStatus(worker_id="w", model="tiny", tokens_per_second=10.0))
    await until(lambda: monitor.look_out().has_workers)
    looking.cancel()


async def test_a_worker_of_another_model_is_no_worker(
    model: ServedModel, valkey_url: str, queue: QueueClient, worker: RuleWorker
) -> None:
    other = Claimer(queue, worker_id="other", model="other")
    await other.heartbeat(job_pb2.WorkerStatus(worker_id="other", model="other", tokens_per_second=10.0))
    async with start_gateway(model, valkey_url, worker_wait_s=30) as gateway:
        await until(lambda: gateway.sample("redis_up") == 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.Chat(chat_pb2.ChatRequest(conversation=ask("Hi").conversation), timeout=5)
        assert details_of(refused.value).reason == "NO_WORKER"
        assert gateway.sample("workers") == 0


def test_a_request_needs_its_own_time_before_the_deadline() -> None:
    outlook = Outlook(has_workers=True, tokens_per_s=100.0, token_s=0.02)
    assert outlook.max_tokens_ahead(3.0) == 300
    assert outlook.max_tokens_ahead(3.0, own_tokens=50) == 150  # 1 s, and half of it for those that run.
    assert outlook.max_tokens_ahead(3.0, own_tokens=500) == 0


def test_what_a_token_takes_follows_from_how_many_run_and_how_fast() -> None:
    speed = SpeedEstimate()
    assert speed.asked_token_s == 0
    speed.saw_speed(800.0, num_running=16)
    assert speed.asked_token_s == pytest.approx(0.02)
    speed.saw_speed(0.0, num_running=0)  # Nothing runs: what was known stays.
    assert speed.asked_token_s == pytest.approx(0.02)
