"""The SDK and real gateways: streams go on over cut connections, restarts and the queue's loss of memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import redis.asyncio
from gateway_harness import SECRET, Gateway, RuleWorker, rule_text, start_gateway, state_of, timeout_ms_of
from link import Link, linked
from oasst_client import (
    Accepted,
    AsyncClient,
    AsyncCompletionStream,
    Client,
    Completion,
    RequestCancelledError,
    RetryPolicy,
)
from oasst_gateway.model import ServedModel
from oasst_jobs import JobState, QueueClient
from valkey_server import free_port
from waiting import until

NUM_TOKENS = 12


@pytest.fixture
async def resumable(model: ServedModel, valkey_url: str) -> AsyncIterator[Gateway]:
    async with start_gateway(model, valkey_url, resume_secret=SECRET, detach_grace_s=30) as gateway:
        yield gateway


@pytest.fixture
async def link(resumable: Gateway) -> AsyncIterator[Link]:
    """Between callers and the gateway."""
    async with linked(resumable.listen) as link:
        yield link


@asynccontextmanager
async def dripping(worker: RuleWorker, *, per_s: float) -> AsyncIterator[None]:
    """The worker pushes so many entries in a second."""
    worker.hold()

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.01)
            worker.allow(max(1, round(per_s * 0.01)))

    task = asyncio.create_task(drip())
    yield
    task.cancel()
    worker.free()


async def test_a_stream_goes_on_over_broken_connections(link: Link, worker: RuleWorker) -> None:
    worker.hold()
    async with AsyncClient(link.address) as client:
        stream = client.stream("Hello!", max_new_tokens=NUM_TOKENS)
        texts = aiter(stream)
        text = ""
        for num_tokens in (2, 4, 6):
            worker.allow(2)
            while text != rule_text(num_tokens):
                text += await anext(texts)
            link.reset()
        worker.free()
        text += "".join([rest async for rest in texts])
    assert text == rule_text(NUM_TOKENS)
    assert stream.num_resumes == 3
    assert len(worker.claimed) == 1


async def test_the_synchronous_stream_does_as_well(link: Link, worker: RuleWorker) -> None:
    worker.hold()
    worker.allow(2)
    loop = asyncio.get_running_loop()

    def read() -> tuple[str, int]:
        with Client(link.address) as client, client.stream("Hello!", max_new_tokens=NUM_TOKENS) as stream:
            texts = iter(stream)
            begun = next(texts)
            loop.call_soon_threadsafe(link.reset)
            loop.call_soon_threadsafe(worker.free)
            return begun + "".join(texts), stream.num_resumes

    assert await asyncio.to_thread(read) == (rule_text(NUM_TOKENS), 1)


async def test_a_unary_chat_is_asked_again_and_attaches_to_what_runs(link: Link, worker: RuleWorker) -> None:
    worker.hold()
    async with AsyncClient(link.address) as client:
        answer = asyncio.create_task(client.chat("Hello!", max_new_tokens=NUM_TOKENS))
        await until(lambda: len(worker.claimed) == 1)
        link.reset()
        await until(lambda: link.num_connections == 2)
        worker.free()
        assert (await answer).text == rule_text(NUM_TOKENS)
    assert len(worker.claimed) == 1


async def test_a_connection_that_fell_silent_is_noticed_and_left(link: Link, worker: RuleWorker) -> None:
    worker.hold()
    worker.allow(1)
    options = [
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_timeout_ms", 300),
        ("grpc.http2.ping_timeout_ms", 300),
    ]
    async with AsyncClient(link.address, options=options) as client:
        stream = client.stream("Hello!", max_new_tokens=NUM_TOKENS)
        first = await anext(aiter(stream))
        link.silence()
        worker.free()
        async with asyncio.timeout(10):
            assert first + "".join([text async for text in stream]) == rule_text(NUM_TOKENS)
    assert stream.num_resumes == 1


async def test_a_request_that_the_queue_forgot_is_generated_anew_and_goes_on(
    model: ServedModel, worker: RuleWorker, valkey_url: str
) -> None:
    """Everything in the queue is gone in the middle of an answer. Its reader sees the answer, once and whole."""
    worker.hold()
    worker.allow(5)
    async with (
        start_gateway(model, valkey_url, resume_secret=SECRET, recheck_s=0.2) as gateway,
        AsyncClient(gateway.listen) as client,
    ):
        stream = client.stream("Hello!", max_new_tokens=NUM_TOKENS, temperature=1.0)
        texts = [await anext(aiter(stream))]
        async with redis.asyncio.Redis.from_url(valkey_url) as connection:
            await connection.flushall()
        worker.free()
        texts += [text async for text in stream]
        seeds = {claimed.job.sampling.seed for claimed in worker.claimed}
    assert "".join(texts) == rule_text(NUM_TOKENS)
    assert stream.num_resumes >= 1
    assert len(worker.claimed) == 2
    assert seeds == {(await stream.completion()).seed}


async def test_leaving_a_stream_frees_the_device_at_once_whatever_the_grace(
    resumable: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    worker.allow(1)
    async with AsyncClient(resumable.listen) as client:
        async with client.stream("Hello!", request_id="r-1") as stream:
            await anext(aiter(stream))
        assert await state_of(queue, "r-1") is JobState.CANCELLED
        with pytest.raises(RequestCancelledError):
            await stream.completion()


async def test_leaving_with_a_grace_of_ones_own_leaves_it_running(
    resumable: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    worker.allow(1)
    async with AsyncClient(resumable.listen) as client:
        async with client.stream("Hello!", request_id="r-1", detach_grace_s=60) as stream:
            await anext(aiter(stream))
        worker.free()

        async def has_finished() -> bool:
            return await state_of(queue, "r-1") is JobState.FINISHED

        await until(has_finished)


async def test_a_submitted_request_is_watched_and_looked_at_from_elsewhere(
    resumable: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    async with AsyncClient(resumable.listen) as client:
        accepted = await client.submit("Hello!", max_new_tokens=NUM_TOKENS, timeout_s=60)
        assert await timeout_ms_of(queue, accepted.request_id) == 60_000
    async with AsyncClient(resumable.listen) as elsewhere:
        watch = elsewhere.watch(accepted.request_id, accepted.resume_token)
        assert (await elsewhere.get(accepted.request_id, accepted.resume_token)).state == "running"
        worker.free()
        completion = await watch.completion()
        snapshot = await elsewhere.get(accepted.request_id, accepted.resume_token)
    assert completion.text == rule_text(NUM_TOKENS)
    assert (snapshot.completion, snapshot.error) == (completion, None)


async def test_a_stopping_gateway_hands_its_streams_to_another(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    worker.hold()
    options = {"resume_secret": SECRET, "drain_grace_s": 0.0}
    async with AsyncExitStack() as second, AsyncExitStack() as first:
        leaving = await first.enter_async_context(start_gateway(model, valkey_url, **options))
        # Its own grace is nothing: being handed over must not look like being left.
        other = await second.enter_async_context(start_gateway(model, valkey_url, **options))
        async with AsyncClient(f"{leaving.listen},{other.listen}") as client:
            streams: list[AsyncCompletionStream] = []
            # The client takes the two in turn, but only once it is connected to both.
            while not leaving.sample("requests_in_flight", rpc="ChatService/ChatStream"):
                streams.append(client.stream("Hello!", max_new_tokens=NUM_TOKENS))
                assert isinstance(await anext(streams[-1].events()), Accepted)
            worker.allow(5)
            await first.aclose()
            worker.free()
            for stream in streams:
                assert (await stream.completion()).text == rule_text(NUM_TOKENS)
            assert sum(stream.num_resumes for stream in streams) == 1
    assert len(worker.claimed) == len(streams)


async def test_a_rolling_restart_of_two_gateways_under_load_fails_no_request(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    ports = [free_port(), free_port()]
    options = {"resume_secret": SECRET, "drain_grace_s": 0.1, "detach_grace_s": 30}
    stop = asyncio.Event()
    completions: list[Completion] = []
    num_resumes = 0

    async def ask_on(client: AsyncClient, *, streamed: bool) -> None:
        nonlocal num_resumes
        while not stop.is_set():
            if streamed:
                stream = client.stream("Hello!", max_new_tokens=NUM_TOKENS)
                completions.append(await stream.completion())
                num_resumes += stream.num_resumes
            else:
                completions.append(await client.chat("Hello!", max_new_tokens=NUM_TOKENS))

    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(AsyncExitStack()) for _ in ports]

        async def start(index: int) -> None:
            gateway = start_gateway(model, valkey_url, listen=f"127.0.0.1:{ports[index]}", **options)
            await gateways[index].enter_async_context(gateway)

        for index in range(2):
            await start(index)
        client = await stack.enter_async_context(
            AsyncClient(",".join(f"127.0.0.1:{port}" for port in ports), retry=RetryPolicy(max_backoff_s=0.5))
        )
        async with dripping(worker, per_s=300), asyncio.TaskGroup() as load:
            for index in range(16):
                load.create_task(ask_on(client, streamed=index % 4 > 0))
            for _ in range(2):
                for index in range(2):
                    enough = len(completions) + 8
                    await until(lambda enough=enough: len(completions) >= enough)
                    await gateways[index].aclose()
                    await start(index)
            stop.set()
    assert {completion.text for completion in completions} == {rule_text(NUM_TOKENS)}
    assert num_resumes > 0
    assert len({completion.request_id for completion in completions}) == len(completions) >= 32
