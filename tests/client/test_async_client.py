"""The asyncio client against a real server: what differs from the synchronous one, and that the rest is the same."""

import asyncio
import inspect
import threading

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2
from oasst.v1 import chat_pb2
from oasst_client import (
    AsyncClient,
    AsyncCompletionStream,
    AsyncConversation,
    Client,
    CompletionStream,
    Conversation,
    DeadlineExceededError,
    InternalError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
)
from waiting import until

TEXT = "An idea that spreads."


@pytest.fixture
async def async_client(server):
    async with AsyncClient(server.address) as client:
        yield client


def waits_for_its_caller(server):
    def script(request, context):
        yield server.accepted(request)
        yield server.delta(0, "Well, ")
        server.ended.wait(timeout=30)
        # The server may see a deadline before the client does; ending well would be another answer.
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")

    return script


async def server_saw_the_end(server) -> bool:
    return await asyncio.to_thread(server.ended.wait, 5)


@pytest.mark.parametrize(
    ("sync_class", "async_class"),
    [(Client, AsyncClient), (CompletionStream, AsyncCompletionStream), (Conversation, AsyncConversation)],
)
def test_both_shells_have_the_same_calls(sync_class, async_class):
    def calls(cls):
        return {
            name: list(inspect.signature(member).parameters.values())
            for name, member in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    def without_types(parameters):
        return [(each.name, each.kind, each.default) for each in parameters]

    sync_calls, async_calls = calls(sync_class), calls(async_class)
    assert sync_calls.keys() == async_calls.keys()
    for name in sync_calls:
        assert without_types(sync_calls[name]) == without_types(async_calls[name]), name


def test_a_client_made_outside_of_a_loop_says_so(server):
    with pytest.raises(RuntimeError, match="event loop"):
        AsyncClient(server.address)


async def test_chat_and_stream_give_the_same_completion(async_client):
    completion = await async_client.chat("What is a meme?", request_id="mine")
    assert completion.text == TEXT
    async with async_client.stream("What is a meme?", request_id="mine") as stream:
        assert [text async for text in stream] == ["An ", "idea ", "that ", "spreads."]
    assert await stream.completion() == completion


async def test_a_stream_gives_its_tokens_one_by_one(client, async_client):
    async with async_client.stream("What is a meme?") as stream:
        assert [token async for token in stream.tokens()] == list(client.stream("What is a meme?").tokens())


async def test_many_streams_run_at_once_on_one_connection(async_client):
    completions = await asyncio.gather(*(async_client.stream("Hi").completion() for _ in range(6)))
    assert {completion.text for completion in completions} == {TEXT}


async def test_leaving_a_stream_early_cancels_the_request(server, async_client):
    server.script = waits_for_its_caller(server)
    async with async_client.stream("Tell me everything.") as stream:
        async for text in stream:
            assert text == "Well, "
            break
    assert await server_saw_the_end(server)
    with pytest.raises(RequestCancelledError):
        await stream.completion()


async def begin_reading(stream) -> asyncio.Task[None]:
    """A task that reads, and has read something."""
    started = asyncio.Event()

    async def read():
        async for _ in stream:
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    return task


async def test_cancelling_the_task_cancels_the_request_and_stays_a_cancellation(server, async_client):
    server.script = waits_for_its_caller(server)
    started = asyncio.Event()

    async def read():
        async with async_client.stream("Tell me everything.") as stream:
            async for _ in stream:
                started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await server_saw_the_end(server)


@pytest.mark.parametrize(("options", "ends"), [({}, True), ({"detach_grace_s": 30}, False)], ids=["none", "grace"])
async def test_a_chat_ends_with_its_caller_unless_it_was_given_a_grace(server, async_client, options, ends):
    server.script = waits_for_its_caller(server)
    answer = asyncio.create_task(async_client.chat("Hi", request_id="mine", **options))
    assert await asyncio.to_thread(server.started.wait, 5)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert server.cancelled == ["mine"] * ends


async def test_closing_a_stream_under_its_reader_is_no_cancellation_of_the_reader(server, async_client):
    server.script = waits_for_its_caller(server)
    stream = async_client.stream("Tell me everything.")
    task = await begin_reading(stream)
    await stream.close()
    with pytest.raises(RequestCancelledError):
        await task


async def test_errors_are_the_same_as_the_synchronous_ones(server, async_client):
    def full(request, context):
        server.refuse(context, 8, "full", server.error_info("QUEUE_FULL"))
        yield

    server.script = full
    with pytest.raises(OverloadedError):
        await async_client.chat("Hi")
    with pytest.raises(OverloadedError):
        await async_client.stream("Hi").completion()

    server.script = waits_for_its_caller(server)
    server.ended.clear()
    with pytest.raises(DeadlineExceededError):
        await async_client.stream("Hi", timeout_s=0.2).completion()

    def broken(request, context):
        yield server.accepted(request)
        server.refuse(context, 13, "broken", server.error_info("NUMERIC"))

    server.script = broken
    with pytest.raises(InternalError):
        await async_client.stream("Hi").completion()


async def test_queries_answer_as_the_synchronous_ones_do(client, async_client):
    assert await async_client.models() == client.models()
    assert await async_client.model() == client.model()
    assert await async_client.tokenize("Hi") == client.tokenize("Hi")
    many = [str(number) for number in range(600)]
    assert await async_client.tokenize(*many) == client.tokenize(*many) == tuple(tuple(each.encode()) for each in many)
    ids = await async_client.tokenize(*many)
    assert await async_client.detokenize(*ids) == client.detokenize(*ids) == tuple(many)
    assert await async_client.load() == client.load()
    assert await async_client.cancel("known") == client.cancel("known")
    with pytest.raises(NotFoundError):
        await async_client.cancel("unknown")


async def test_a_conversation_remembers(server, async_client):
    conversation = AsyncConversation(async_client, system="Be brief.")
    await conversation.ask("What is a meme?")
    async with conversation.ask_stream("And who coined the word?") as stream:
        await stream.completion()
    asked = [message.content for message in server.requests[1].conversation.messages]
    assert asked == ["Be brief.", "What is a meme?", TEXT, "And who coined the word?"]
    assert len(conversation.messages) == 5


async def test_a_stream_may_be_closed_after_its_client(server):
    server.script = waits_for_its_caller(server)
    client = AsyncClient(server.address)
    stream = client.stream("Hi")
    await anext(aiter(stream.events()))
    await client.close()
    await stream.close()
    assert await server_saw_the_end(server)


async def test_closing_a_client_while_its_stream_closes_cancels_nobodys_task(server):
    is_asked, is_left = threading.Event(), threading.Event()

    def hold(context):
        context.add_callback(is_left.set)
        is_asked.set()
        is_left.wait(20)

    server.script, server.on_cancel = waits_for_its_caller(server), hold
    client = AsyncClient(server.address)
    closing = asyncio.create_task(client.stream("Hi").close())
    assert await asyncio.to_thread(is_asked.wait, 5)
    await client.close()
    await closing


@pytest.mark.parametrize(
    "call", [lambda client: client.chat("Hi"), lambda client: client.stream("Hi").completion()], ids=["chat", "stream"]
)
async def test_closing_a_client_under_a_call_is_told_as_a_cancellation(server, call):
    server.script = waits_for_its_caller(server)
    client = AsyncClient(server.address)
    answer = asyncio.create_task(call(client))
    assert await asyncio.to_thread(server.started.wait, 5)
    await client.close()
    with pytest.raises(RequestCancelledError, match="was closed"):
        await answer
    with pytest.raises(RequestCancelledError, match="the client was closed"):
        await call(client)


async def test_a_task_that_is_cancelled_while_its_client_closes_is_cancelled(server):
    server.script = waits_for_its_caller(server)
    client = AsyncClient(server.address)
    answer = asyncio.create_task(client.chat("Hi"))
    assert await asyncio.to_thread(server.started.wait, 5)
    answer.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await answer


async def test_a_reader_that_is_cancelled_while_its_stream_closes_is_cancelled(server, async_client):
    server.script = waits_for_its_caller(server)
    stream = async_client.stream("Tell me everything.")
    task = await begin_reading(stream)
    task.cancel()
    await stream.close()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_stream_that_failed_tells_the_same_when_asked_again(server, async_client):
    def script(request, context):
        yield server.accepted(request)
        server.refuse(context, 13, "broken", server.error_info("NUMERIC"))

    server.script = script
    stream = async_client.stream("Hi")
    for _ in range(2):
        with pytest.raises(InternalError):
            await stream.completion()


async def test_a_stream_is_read_on_after_a_read_that_was_cancelled(server, async_client):
    def script(request, context):
        if isinstance(request, chat_pb2.ChatRequest):
            yield from waits_for_its_caller(server)(request, context)
        yield server.delta(request.after, "that's that.")
        yield server.finished(2)

    server.script = script
    async with async_client.stream("Tell me everything.") as stream:
        task = await begin_reading(stream)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await stream.completion()).text == "Well, that's that."


async def test_a_stream_whose_read_was_cancelled_can_still_be_closed(server, async_client):
    server.script = waits_for_its_caller(server)
    stream = async_client.stream("Tell me everything.", request_id="mine")
    task = await begin_reading(stream)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stream.close()
    assert server.cancelled == ["mine"]
    with pytest.raises(RequestCancelledError):
        await stream.completion()


async def test_a_stream_is_read_on_whose_wait_for_the_next_call_was_cancelled(server, async_client):
    def lost_once(request, context):
        yield server.accepted(request)
        if isinstance(request, chat_pb2.ChatRequest):
            retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=20))
            server.refuse(context, code_pb2.UNAVAILABLE, "away", retry)
        yield server.delta(0, TEXT)
        yield server.finished(1)

    server.script = lost_once
    stream = async_client.stream("Hi")
    answer = asyncio.create_task(stream.completion())
    await until(lambda: stream.num_resumes == 1)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert (await stream.completion()).text == TEXT


async def test_closing_a_client_ends_the_wait_of_its_streams_for_the_next_call(server):
    def lost(request, context):
        yield server.accepted(request)
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=20))
        server.refuse(context, code_pb2.UNAVAILABLE, "away", retry)

    server.script = lost
    client = AsyncClient(server.address)
    stream = client.stream("Hi")
    answer = asyncio.create_task(stream.completion())
    await until(lambda: stream.num_resumes == 1)
    await client.close()
    with pytest.raises(RequestCancelledError, match="was closed"):
        await asyncio.wait_for(answer, 10)
