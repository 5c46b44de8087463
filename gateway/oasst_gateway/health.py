"""What grpc.health.v1 tells of this gateway: serving only while it can serve."""

from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]  # without stubs

__all__ = ["Health"]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# The empty name is the server as a whole. Reading text needs no queue, so ModelService serves without one.
_QUEUE_SERVICES = ("", "oasst.v1.ChatService")
_PLAIN_SERVICES = ("oasst.v1.ModelService",)


class Health:
    """The health of each service. Nothing serves before `start`, nothing after `leave`."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def start(self) -> None:
        """Services that need no queue serve; the others wait for `set_queue_available`."""
        await self._set(_QUEUE_SERVICES, is_serving=False)
        await self._set(_PLAIN_SERVICES, is_serving=True)

    async def set_queue_available(self, is_available: bool) -> None:
        """Services that need the queue serve while it is available."""
        await self._set(_QUEUE_SERVICES, is_serving=is_available)

    async def leave(self) -> None:
        """No service serves any more, for good."""
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, services: tuple[str, ...], *, is_serving: bool) -> None:
        for service in services:
            await self.servicer.set(service, _SERVING if is_serving else _NOT_SERVING)
