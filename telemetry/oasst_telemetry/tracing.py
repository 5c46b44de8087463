"""Spans as our code sees them; with nobody to export them to, all they do is pass on whose they would be.

tracer = start_tracer("http://127.0.0.1:4317", service="oasst-gateway", instance="gateway-1")
span = tracer.start("oasst.v1.ChatService/Chat", kind=SpanKind.SERVER, parent=TraceContext.parse(header))
...
span.end()
tracer.close()
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

from oasst_telemetry.context import NO_TRACE, TraceContext

__all__ = ["NO_SPAN", "NO_TRACER", "Attributes", "Span", "SpanKind", "Tracer", "TracingError", "start_tracer"]

# What describes a span. Never a prompt, nor a text that a model wrote.
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class TracingError(Exception):
    """Spans cannot be exported; the message is one sentence that says why."""


class SpanKind(Enum):
    """What a span stands for, by the names of OpenTelemetry."""

    INTERNAL = "internal"
    SERVER = "server"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class Span(Protocol):
    """Something that takes time. Whoever starts it ends it, once. Times are in Unix nanoseconds, unset is now."""

    @property
    def context(self) -> TraceContext:
        """What is caused by it names this as its parent."""

    @property
    def is_recorded(self) -> bool:
        """Whether anybody will see it: what is costly to describe need not be described otherwise."""

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> "Span":
        """A part of it begins."""

    def note(self, attributes: Attributes) -> None:
        """It is described by these as well."""

    def mark(self, name: str) -> None:
        """Something happened in it just now."""

    def link(self, context: TraceContext) -> None:
        """It has to do with a span that did not cause it."""

    def end(self, *, error: str | None = None, end_ns: int | None = None) -> None:
        """It is over, and failed for the reason `error` if there is one."""


class Tracer(Protocol):
    """Starts the spans of one process."""

    def start(
        self,
        name: str,
        *,
        kind: SpanKind,
        parent: TraceContext,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """A span begins that another process caused, or nobody."""

    def close(self, timeout_s: float = 2.0) -> None:
        """What has ended is exported, as far as that can be done in time."""


def start_tracer(endpoint: str | None, *, service: str, instance: str) -> Tracer:
    """Exports to the OTLP receiver at `endpoint`, http://HOST:PORT or https://HOST:PORT, by gRPC; to nobody if None.

    Sampling, headers, certificates and batches are as OpenTelemetry's own variables say: OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE, OTEL_BSP_SCHEDULE_DELAY and so on.

    Raises:
        TracingError: if OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NO_TRACER
    try:
        from oasst_telemetry.otlp import OtlpTracer
    except ImportError as error:
        install = "pip install '.[trace]' in a clone of oasst-serve"
        raise TracingError(f"traces need OpenTelemetry: {install} ({error})") from error
    return OtlpTracer(endpoint, service=service, instance=instance)


class _NoSpan:
    """Its children are its parent's."""

    __slots__ = ("context",)

    is_recorded = False

    def __init__(self, context: TraceContext) -> None:
        self.context = context

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> "_NoSpan":
        return self

    def note(self, attributes: Attributes) -> None:
        """Nobody asked."""

    def mark(self, name: str) -> None:
        """Nobody asked."""

    def link(self, context: TraceContext) -> None:
        """Nobody asked."""

    def end(self, *, error: str | None = None, end_ns: int | None = None) -> None:
        """Nobody asked."""


NO_SPAN: Span = _NoSpan(NO_TRACE)


class _NoTracer:
    def start(
        self,
        name: str,
        *,
        kind: SpanKind,
        parent: TraceContext,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> Span:
        return _NoSpan(parent) if parent.traceparent else NO_SPAN

    def close(self, timeout_s: float = 2.0) -> None:
        """Nothing was kept."""


NO_TRACER: Tracer = _NoTracer()
