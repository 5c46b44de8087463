"""How this gateway is: serving only while it can serve, alive while its event loop turns."""

import time
from collections.abc import Callable

from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]  # without stubs
from oasst_telemetry import Check

from oasst_gateway.services import PLAIN_SERVICES, QUEUE_SERVICES

__all__ = ["Health"]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# The empty name is the server as a whole.
_WAITING_FOR_QUEUE = ("", *QUEUE_SERVICES)

# An event loop that has not turned for this long will not come back.
_SILENCE_LIMIT_S = 20.0


class Health:
    """The health of each service. Nothing serves before `start`, nothing after `leave`.

    Tells `grpc.health.v1` through its servicer, and HTTP probes by `liveness` and `readiness`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.servicer = health.aio.HealthServicer()
        self._unready: str | None = "starting"  # Chats are accepted if it is None; otherwise it says why not.
        self._has_left = False
        self._clock = clock
        self._turned_s = clock()

    def record_turn(self) -> None:
        """The event loop has turned."""
        self._turned_s = self._clock()

    def liveness(self) -> Check:
        """Whether the event loop turns. Any thread may ask."""
        silent_s = self._clock() - self._turned_s
        if silent_s > _SILENCE_LIMIT_S:
            return Check(False, f"the event loop has been silent for {silent_s:.1f} s")
        return Check(True, "in progress")

    def readiness(self) -> Check:
        """Whether chats are accepted. Any thread may ask."""
        return Check(True, "serving") if self._unready is None else Check(False, self._unready)

    async def start(self) -> None:
        """Services that need no queue serve; the others wait for `set_queue_available`."""
        await self._set(_WAITING_FOR_QUEUE, is_serving=False)
        await self._set(PLAIN_SERVICES, is_serving=True)

    async def set_queue_available(self, is_available: bool) -> None:
        """Services that need the queue serve while it is available."""
        if not self._has_left:
            self._unready = None if is_available else "the queue is away"
        await self._set(_WAITING_FOR_QUEUE, is_serving=is_available)

    async def leave(self) -> None:
        """No service serves any more, for good."""
        self._has_left = True
        self._unready = "leaving"
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, services: tuple[str, ...], *, is_serving: bool) -> None:
        for service in services:
            await self.servicer.set(service, _SERVING if is_serving else _NOT_SERVING)
