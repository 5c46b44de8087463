"""Much work for one request holds up no stream, and much work for one tenant no other."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from gateway_harness import details_of, start_gateway
from oasst.v1 import model_pb2
from oasst_gateway import service
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

    def add(self, number: int) -> None:
        self.requests += [
            asyncio.create_task(self._threads.run(FLOOD, self._work, off_loop=True)) for _ in range(number)
        ]

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
    async with flooded(8) as (threads, _):
        with pytest.raises(RefusedError, match="already has 8 requests of this tenant with much text"):
            await threads.run_or_refuse(FLOOD, str, off_loop=True)
        assert await threads.run_or_refuse(GUEST, str, off_loop=True) == ""
        assert await threads.run_or_refuse(FLOOD, str, off_loop=False) == ""


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
    has_begun, released = threading.Event(), threading.Event()

    def fail() -> None:
        has_begun.set()
        released.wait()
        raise InvalidRequestError([])

    request = asyncio.create_task(threads.run(GUEST, fail, off_loop=True))
    await until(has_begun.is_set)
    request.cancel()
    released.set()
    await asyncio.wait([request])
    assert request.cancelled()
    threads.close()
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
