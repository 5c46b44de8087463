"""What keeps one request's work from holding up all streams, and one tenant's from holding up all others'."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message
from oasst.jobs.v1 import job_pb2

from oasst_gateway.errors import TOO_MANY_RETRY_S, RefusedError
from oasst_gateway.tenants import Tenant

__all__ = ["TenantThreads", "is_big", "is_long"]

T = TypeVar("T")

# Work on larger requests, and on longer parts of a log, is done in a thread.
_BIG_REQUEST_BYTES = 8 * 1024
_LONG_LOG_ENTRIES = 64

_NUM_THREADS = 4
_THREADS_PER_TENANT = 2


def is_big(request: Message) -> bool:
    """Work on it takes too long for the event loop."""
    return request.ByteSize() > _BIG_REQUEST_BYTES


def is_long(entries: Sequence[job_pb2.LogEntry]) -> bool:
    """Putting them together takes too long for the event loop."""
    return len(entries) > _LONG_LOG_ENTRIES


class TenantThreads:
    """Threads for what would hold up the event loop. However much a tenant asks for, others have some of them."""

    def __init__(self, *, most_per_tenant: int = 0) -> None:
        """`most_per_tenant` is how many requests `run_or_refuse` takes of a tenant at once."""
        self._most_per_tenant = most_per_tenant
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tenants")
        self._lines: dict[str, _Line] = {}  # By tenant; of those with requests here.
        self._num_refusable: Counter[str] = Counter()  # By tenant: those in `run_or_refuse`.

    async def run(self, tenant: Tenant, work: Callable[[], T], *, off_loop: bool) -> T:
        """What `work` returns or raises; at once, or `off_loop` in a thread, when it is the tenant's turn."""
        if not off_loop:
            return work()
        line = self._lines.setdefault(tenant.name, _Line())
        with ExitStack() as place:
            line.num_requests += 1
            place.callback(self._leave, tenant, line)
            await line.turn.acquire()
            place.callback(line.turn.release)
            future = self._executor.submit(work)
            # Given up with the thread, not when its caller leaves: work cannot be stopped.
            future.add_done_callback(_in_this_loop(place.pop_all().close))
            return await asyncio.wrap_future(future)

    async def run_or_refuse(self, tenant: Tenant, work: Callable[[], T], *, off_loop: bool) -> T:
        """As `run`, for requests that nothing else counts.

        Raises:
            RefusedError: if too many such requests of the tenant are here.
        """
        num_here = self._num_refusable[tenant.name]
        if off_loop and num_here >= self._most_per_tenant:
            message = (
                f"this gateway already has {num_here} requests of this tenant with much text;"
                " its --max-open-chats says how many it takes"
            )
            raise RefusedError("TOO_MUCH_TEXT", message, retry_after_s=TOO_MANY_RETRY_S)
        self._num_refusable[tenant.name] += 1
        try:
            return await self.run(tenant, work, off_loop=off_loop)
        finally:
            self._num_refusable[tenant.name] -= 1
            if not self._num_refusable[tenant.name]:
                del self._num_refusable[tenant.name]

    def close(self) -> None:
        """Nothing begins any more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _leave(self, tenant: Tenant, line: "_Line") -> None:
        line.num_requests -= 1
        if not line.num_requests:
            del self._lines[tenant.name]


@dataclass(slots=True)
class _Line:
    """A tenant's requests."""

    num_requests: int = 0
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_THREADS_PER_TENANT))


def _in_this_loop(function: Callable[[], None]) -> Callable[[object], None]:
    """Calls the function in the event loop that runs now, whichever thread it is called in."""
    loop = asyncio.get_running_loop()

    def call(_: object) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(function)

    return call
