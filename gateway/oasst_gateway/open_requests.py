"""How many requests are open in this gateway: no more than it can serve, and none begins once it leaves."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from oasst_gateway.arrival import Arrival
from oasst_gateway.errors import TOO_MANY_RETRY_S, GatewayLeavingError, RefusedError
from oasst_gateway.tenants import Tenant

__all__ = ["OpenRequests"]

# For each so many, one more may be open of a request that was accepted before: refused, its job would be given up.
_REQUESTS_PER_RETURN = 4
# For each so many, one more may be open of a tenant that has less than its share of them: no other keeps it out.
_REQUESTS_PER_OTHER = 8


@dataclass(slots=True)
class _Places:
    """Places of one kind. Each kind is counted by itself: those who fill one leave the others free."""

    num_free: int


class OpenRequests:
    """Counts RPCs that bring a job or follow one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._for_all = _Places(most)
        # Beyond those, for some.
        self._for_returns = _Places(-(-most // _REQUESTS_PER_RETURN))
        self._for_others = _Places(-(-most // _REQUESTS_PER_OTHER))
        # Of the tenants that have some open.
        self._num_open: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._scopes: set[asyncio.Timeout] = set()  # One for each that is open.
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_leaving = False

    @asynccontextmanager
    async def opened(self, arrival: Arrival) -> AsyncIterator[None]:
        """One more is open as long as the context is.

        Raises:
            GatewayLeavingError: if none may begin any more, or those that are open must end.
            RefusedError: if there are too many.
            QueueUnavailableError
        """
        tenant, places = arrival.tenant, await self._places_for(arrival)
        if places is None:
            message = f"this gateway already has its {self._most} open chats"
            raise RefusedError("TOO_MANY_CHATS", message, retry_after_s=TOO_MANY_RETRY_S)
        if self._is_leaving:
            raise GatewayLeavingError
        scope = asyncio.timeout(None)
        places.num_free -= 1
        self._scopes.add(scope)
        self._num_open[tenant.name] += 1
        self._weights[tenant.name] = tenant.weight
        self._idle.clear()
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if scope.expired():
                raise GatewayLeavingError from error
            raise
        finally:
            places.num_free += 1
            self._scopes.discard(scope)
            self._num_open[tenant.name] -= 1
            if not self._num_open[tenant.name]:
                del self._num_open[tenant.name], self._weights[tenant.name]
            if not self._scopes:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether none is open any more, after at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def leave(self) -> None:
        """None begins any more."""
        self._is_leaving = True

    def end(self) -> None:
        """Those that are open end now, wherever they are, and their callers are sent elsewhere."""
        for scope in self._scopes:
            scope.reschedule(0)

    async def _places_for(self, arrival: Arrival) -> _Places | None:
        """Those of which the request may take one; None if there is none for it."""
        if self._for_all.num_free:
            return self._for_all
        if self._for_others.num_free and self._is_below_share(arrival.tenant):
            return self._for_others
        # Looked at again behind the question: others came meanwhile.
        if self._for_returns.num_free and await arrival.has_place() and self._for_returns.num_free:
            return self._for_returns
        return None

    def _is_below_share(self, tenant: Tenant) -> bool:
        """Its part by weight, among all that have some open, is more than it has."""
        weights = self._weights | {tenant.name: tenant.weight}
        share = self._most * tenant.weight / sum(weights.values())
        return self._num_open[tenant.name] < max(1, int(share))
