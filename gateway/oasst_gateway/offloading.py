"""What keeps one request's work from holding up all streams, and one tenant's from holding up all others'."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from oasst_gateway.errors import TOO_MANY_RETRY_S, RefusedError
from oasst_gateway.tenants import Tenant

__all__ = ["TenantThreads", "run_off_loop"]

T = TypeVar("T")

# Work on larger requests is done in a thread.
_BIG_REQUEST_BYTES = 8 * 1024

_NUM_THREADS = 4
_THREADS_PER_TENANT = 2


async def run_off_loop(request: Message, work: Callable[[], T]) -> T:
    """What `work`, which takes time by the request's size, returns or raises."""
    return await asyncio.to_thread(work) if _is_big(request) else work()


class TenantThreads:
    """Threads for work that needs no place in the queue. However much a tenant asks for, others have some of them."""

    def __init__(self, *, most_per_tenant: int) -> None:
        """A tenant with `most_per_tenant` requests at work or waiting is refused more."""
        self._most_per_tenant = most_per_tenant
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tenants")
        self._lines: dict[str, _Line] = {}  # By tenant; of those with requests here.

    async def run(self, tenant: Tenant, request: Message, work: Callable[[], T]) -> T:
        """What `work`, which takes time by the request's size, returns or raises.

        Raises:
            RefusedError: if too many of the tenant's requests are here.
        """
        if not _is_big(request):
            return work()
        line = self._lines.setdefault(tenant.name, _Line())
        if line.num_requests >= self._most_per_tenant:
            message = f"this gateway already has {line.num_requests} such requests of this tenant"
            raise RefusedError("TOO_MANY_RPCS", message, retry_after_s=TOO_MANY_RETRY_S)
        line.num_requests += 1
        try:
            async with line.turn:
                return await self._run(work)
        finally:
            line.num_requests -= 1
            if not line.num_requests:
                del self._lines[tenant.name]

    def close(self) -> None:
        """Nothing begins any more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        """As `work`. A caller that leaves frees its thread only when that is free: work cannot be stopped."""
        future = self._executor.submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([asyncio.wrap_future(future)])
            raise


@dataclass(slots=True)
class _Line:
    """A tenant's requests."""

    num_requests: int = 0
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_THREADS_PER_TENANT))


def _is_big(request: Message) -> bool:
    return request.ByteSize() > _BIG_REQUEST_BYTES
