"""What happens around every RPC of ours: its caller is known, its request is decoded, its errors are translated, its
outcome is counted, its trace goes on."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from oasst_telemetry import NO_TRACE, Span, SpanKind, TraceContext, Tracer

from oasst_gateway.call import Call, Context
from oasst_gateway.errors import (
    INVALID_UTF8,
    MALFORMED,
    TOO_MANY_RETRY_S,
    ChatFailedError,
    InvalidRequestError,
    RefusedError,
    Violation,
)
from oasst_gateway.metrics import GatewayMetrics
from oasst_gateway.status import UNFORESEEN, RpcStatus, status_of
from oasst_gateway.tenants import Authenticator
from oasst_gateway.wire import find_invalid_text

__all__ = ["RpcInterceptor"]

logger = logging.getLogger(__name__)

_OURS = "/oasst.v1."

# What OpenTelemetry's conventions call a server's own failures; other codes are its callers'.
_SERVER_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

# Any: grpc does not type the requests of handlers it has not generated.
_Behavior = Callable[[Any, Call], Awaitable[Any]]
_RawBehavior = Callable[[bytes, Context], Awaitable[Any]]


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every `oasst.v1` RPC. Its handlers take one request and its Call, and are coroutines."""

    def __init__(
        self, authenticator: Authenticator, metrics: GatewayMetrics, tracer: Tracer, *, max_open_rpcs: int
    ) -> None:
        """More RPCs than `max_open_rpcs` are refused. gRPC's own limit would refuse health checks as well."""
        self._authenticator = authenticator
        self._metrics = metrics
        self._tracer = tracer
        self._max_open_rpcs = max_open_rpcs
        self._num_open_rpcs = 0
        self._handlers: dict[str, Any] = {}  # Wrapped, by RPC: once for all its calls.

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        rpc = handler_call_details.method
        if rpc in self._handlers:
            return self._handlers[rpc]
        handler = await continuation(handler_call_details)
        if handler is None or not rpc.startswith(_OURS):
            return handler
        self._handlers[rpc] = handler = self._wrap_handler(rpc, handler)
        return handler

    def _wrap_handler(self, rpc: str, handler: Any) -> Any:
        # Without a deserializer the behavior is handed the bytes, and can tell what is wrong with them.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._wrap(rpc, handler.unary_stream, handler.request_deserializer),
                # Streams also send messages of another type whose bytes are the same.
                response_serializer=_serialize,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._wrap(rpc, handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrap(self, rpc: str, behavior: _Behavior, parse: Callable[[bytes], Message]) -> _RawBehavior:
        descriptor = descriptor_pool.Default().FindMethodByName(rpc[1:].replace("/", ".")).input_type

        async def wrapped(data: bytes, context: Context) -> Any:
            async with self._observed(rpc, context) as span, self._translated(rpc, context, span):
                if self._num_open_rpcs > self._max_open_rpcs:
                    message = f"this gateway already has its {self._max_open_rpcs} open RPCs"
                    raise RefusedError("TOO_MANY_RPCS", message, retry_after_s=TOO_MANY_RETRY_S)
                call = Call(self._authenticator.tenant_of(_header(context, "authorization")), context, span)
                return await behavior(_decode(data, parse, descriptor), call)

        return wrapped

    @asynccontextmanager
    async def _observed(self, rpc: str, context: Context) -> AsyncIterator[Span]:
        name = rpc.removeprefix(_OURS)
        started_s = time.perf_counter()
        code = grpc.StatusCode.OK
        span = self._tracer.start(rpc[1:], kind=SpanKind.SERVER, parent=_caller_of(context))
        self._num_open_rpcs += 1
        self._metrics.requests_in_flight.labels(name).inc()
        try:
            yield span
        except asyncio.CancelledError:
            has_expired = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if has_expired else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code()
            raise
        finally:
            self._num_open_rpcs -= 1
            self._metrics.requests_in_flight.labels(name).dec()
            self._metrics.requests.labels(name, code.name).inc()
            self._metrics.request_seconds.labels(name).observe(time.perf_counter() - started_s)
            span.note({"rpc.system.name": "grpc", "rpc.method": rpc[1:], "rpc.response.status_code": code.name})
            span.end(error=code.name if code in _SERVER_ERRORS else None)

    @asynccontextmanager
    async def _translated(self, rpc: str, context: Context, span: Span) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:  # The top of every RPC: whatever it was, its caller is told.
            status = status_of(error)
            self._record(rpc, error, status, span)
            await context.abort(status.code, status.message, trailing_metadata=status.trailing_metadata())

    def _record(self, rpc: str, error: Exception, status: RpcStatus, span: Span) -> None:
        span.note({"oasst.error.reason": status.reason})
        self._metrics.refused_requests.labels(status.reason).inc()
        if isinstance(error, InvalidRequestError):
            self._metrics.invalid_requests.labels(error.reason).inc()
        if isinstance(error, ChatFailedError):
            return  # Its chat has told of it, with the job's id.
        if status.reason == UNFORESEEN:
            logger.error("failed rpc=%s", rpc, exc_info=error, extra=span.context.log_fields)
        else:
            fields = (rpc, status.code.name, status.reason, status.metadata.get("cause", ""))
            logger.info("refused rpc=%s code=%s reason=%s cause=%s", *fields, extra=span.context.log_fields)


def _header(context: Context, name: str) -> str:
    return next((str(value) for key, value in context.invocation_metadata() or () if key == name), "")


def _caller_of(context: Context) -> TraceContext:
    """Where in a trace the caller is, if it tells."""
    traceparent = _header(context, "traceparent")
    return TraceContext.parse(traceparent, _header(context, "tracestate")) if traceparent else NO_TRACE


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _decode(data: bytes, parse: Callable[[bytes], Message], descriptor: Descriptor) -> Message:
    try:
        return parse(data)
    except DecodeError as error:
        field = find_invalid_text(data, descriptor)
        if field is None:
            description = f"must be a message of type {descriptor.full_name}, its texts in UTF-8"
            violation = Violation("request", description, MALFORMED)
        else:
            violation = Violation(field, "must be UTF-8", INVALID_UTF8)
        raise InvalidRequestError([violation]) from error
