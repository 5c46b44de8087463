"""One RPC as its handler sees it."""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from oasst_telemetry import NO_SPAN, Span

from oasst_gateway.tenants import Tenant

__all__ = ["Call", "Context"]

# Any: grpc's contexts are typed by messages that the generated code does not declare.
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC whose caller is known."""

    tenant: Tenant
    context: Context
    span: Span = NO_SPAN

    @property
    def remaining_s(self) -> float | None:
        """Until the RPC's deadline; None without one."""
        return self.context.time_remaining()

    async def send(self, message: Message) -> None:
        """The message is on its way, behind those sent before."""
        await self.context.write(message)
