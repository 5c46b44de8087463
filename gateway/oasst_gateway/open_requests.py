"""How many requests are open in this gateway: no more than it can serve, and none begins once it leaves."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from oasst_gateway.errors import GatewayLeavingError, RefusedError

__all__ = ["OpenRequests"]

_TOO_MANY_RETRY_S = 1.0


class OpenRequests:
    """Counts RPCs that follow a job, or are about to."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_leaving = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """One more is open as long as the context is.

        Raises:
            GatewayLeavingError, RefusedError: if none may be.
        """
        if self._is_leaving:
            raise GatewayLeavingError
        if self._num_open >= self._most:
            message = f"this gateway already has its {self._most} open chats"
            raise RefusedError("TOO_MANY_CHATS", message, retry_after_s=_TOO_MANY_RETRY_S)
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if self._num_open == 0:
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
