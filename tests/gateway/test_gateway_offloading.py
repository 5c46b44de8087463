"""Much work for one request holds up no stream, and much work for one tenant no other."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import grpc
import pytest
from gateway_harness import RuleWorker, ask, details_of, read_text, rule_text, start_gateway
from oasst.v1 import chat_pb2, model_pb2
from oasst_gateway import chats, service
from oasst_gateway.errors import InvalidRequestError, RefusedError
from oasst_gateway.model import ServedModel
from oasst_gateway.offloading import TenantThreads
from oasst_gateway.tenants import Tenant
from waiting import until

FLOOD, GUEST = Tenant(name="flood"), Tenant(name="guest")
TEXTS = model_pb2.TokenizeRequest(texts=["a" * 10_000])


class Flood:
    """Requests of a tenant whose work goes on until it is released."""

    def __init__(self, threads: TenantThreads) -> None:
        self._threads = threads
        self._released = threading.Event()
        self.num_at_work = 0
        self.requests: list[asyncio.Task[None]] = []

    def add(self, number: int, *, run: Callable[..., Coroutine[None, None, None]] | None = None) -> None:
        run = run or self._threads.run
        self.requests += [asyncio.create_task(run(FLOOD, self._work, off_loop=True)) for _ in range(number)]

    def release(self) -> None:
        self._released.set()

    def _work(self) -> None:
        self.num_at_work += 1
        self._released.wait()


@asynccontextmanager
async def flooded(num_requests: int) -> AsyncIterator[tuple[TenantThreads, Flood]]:
    threads = TenantThreads(most_per_tenant=8)
    flood = Flood(threads)
    try:
        flood.add(num_requests)
        await until(lambda: flood.num_at_work == 2)
        yield threads, flood
    finally:
        flood.release()
        await asyncio.wait(flood.requests)
        threads.close()


async def test_a_tenants_flood_of_texts_leaves_threads_for_others() -> None:
    async with flooded(8) as (threads, flood):
        main = threading.get_ident()
        assert await threads.run(GUEST, threading.get_ident, off_loop=True) != main
        assert flood.num_at_work == 2
    assert flood.num_at_work == 8


async def test_what_a_tenant_asks_for_beyond_its_line_is_refused_and_others_are_not() -> None:
    async with flooded(2) as (threads, flood):
        flood.add(8, run=threads.run_or_refuse)
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="already has 8 requests of this tenant with much text"):
            await threads.run_or_refuse(FLOOD, str, off_loop=True)
        assert await threads.run_or_refuse(GUEST, str, off_loop=True) == ""
        assert await threads.run_or_refuse(FLOOD, str, off_loop=False) == ""


async def test_what_is_counted_elsewhere_is_no_cause_to_refuse_a_tenant() -> None:
    async with flooded(8) as (threads, flood):
        counted_here = asyncio.create_task(threads.run_or_refuse(FLOOD, str, off_loop=True))
        await asyncio.sleep(0)
        flood.release()
        assert await counted_here == ""


async def test_no_answer_stands_in_line_behind_prompts(
    model: ServedModel, valkey_url: str, worker: RuleWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_preparing, released = 0, threading.Event()

    def prepare_slowly(*_: object, **__: object) -> None:
        nonlocal num_preparing
        num_preparing += 1
        released.wait(60)
        raise InvalidRequestError([])

    async with start_gateway(model, valkey_url) as gateway:
        accepted = (await gateway.chat.SubmitChat(ask("Hello!", max_new_tokens=100))).accepted
        named = {"request_id": accepted.request_id, "resume_token": accepted.resume_token}
        watched = chat_pb2.WatchChatRequest(**named)
        await read_text(gateway.chat.WatchChat(watched))
        monkeypatch.setattr(chats, "prepare_chat", prepare_slowly)
        prompts = [asyncio.ensure_future(gateway.chat.SubmitChat(ask("long " * 2_000))) for _ in range(3)]
        await until(lambda: num_preparing == 2)
        assert await read_text(gateway.chat.WatchChat(watched, timeout=20)) == rule_text(100)
        told = await gateway.chat.GetChat(chat_pb2.GetChatRequest(**named), timeout=20)
        assert told.response.choices[0].text == rule_text(100)
        released.set()
        await asyncio.wait(prompts)


async def test_whoever_asks_and_leaves_again_and_again_has_no_more_threads_than_others() -> None:
    async with flooded(2) as (threads, flood):
        for request in flood.requests:
            request.cancel()
        flood.add(2)
        await threads.run(GUEST, str, off_loop=True)
        assert flood.num_at_work == 2


async def test_work_that_fails_once_its_caller_has_left_is_nobodys_error() -> None:
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    threads = TenantThreads(most_per_tenant=8)
    at_work: list[threading.Thread] = []
    released = threading.Event()

    def fail() -> None:
        at_work.append(threading.current_thread())
        released.wait()
        raise InvalidRequestError([])

    request = asyncio.create_task(threads.run(GUEST, fail, off_loop=True))
    await until(lambda: at_work)
    request.cancel()
    released.set()
    await asyncio.wait([request])
    assert request.cancelled()
    threads.close()
    await until(lambda: not at_work[0].is_alive())
    await asyncio.sleep(0)  # What the thread left to the event loop is done.
    del request
    gc.collect()
    assert not unseen


async def test_texts_of_a_tenant_that_are_too_many_are_refused_by_the_gateway(
    model: ServedModel, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    check: Callable[..., None] = service.check_tokenize
    async with start_gateway(model, valkey_url, max_open_chats=16) as gateway:
        has_begun = threading.Event()

        def check_slowly(request: model_pb2.TokenizeRequest, **about: object) -> None:
            has_begun.set()
            released.wait()
            check(request, **about)

        monkeypatch.setattr(service, "check_tokenize", check_slowly)
        first = gateway.model.Tokenize(TEXTS)
        await until(has_begun.is_set)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.model.Tokenize(TEXTS)
        details = details_of(refused.value)
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MUCH_TEXT")
        released.set()
        assert len((await first).sequences) == 1
