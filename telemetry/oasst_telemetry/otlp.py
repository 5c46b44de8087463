"""Spans by OpenTelemetry, exported by OTLP over gRPC from a thread of its own. Imported only where traces are on."""

import threading
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from oasst_telemetry.context import NO_TRACE, TraceContext
from oasst_telemetry.tracing import Attributes, SpanKind

__all__ = ["OtlpTracer"]

_KINDS = {
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.PRODUCER: trace.SpanKind.PRODUCER,
    SpanKind.CONSUMER: trace.SpanKind.CONSUMER,
}
_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpTracer:
    """Spans of one process, on their way to a receiver. One that is away costs spans, never a request."""

    def __init__(self, endpoint: str, *, service: str, instance: str) -> None:
        # `create` adds what OTEL_RESOURCE_ATTRIBUTES says.
        resource = Resource.create(
            {"service.name": service, "service.instance.id": instance, "service.version": version("oasst-serve")}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("oasst_serve", version("oasst-serve"))

    def start(
        self,
        name: str,
        *,
        kind: SpanKind,
        parent: TraceContext,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> "_OtlpSpan":
        context = _PROPAGATOR.extract(_headers_of(parent), Context())
        span = self._tracer.start_span(
            name, context=context, kind=_KINDS[kind], attributes=attributes, start_time=start_ns
        )
        return _OtlpSpan(self._tracer, span)

    def close(self, timeout_s: float = 2.0) -> None:
        # The exporter's own shutdown waits for a receiver that is away longer than our caller can.
        closing = threading.Thread(target=self._provider.shutdown, name="trace-export", daemon=True)
        closing.start()
        closing.join(timeout_s)


class _OtlpSpan:
    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def context(self) -> TraceContext:
        place = self._span.get_span_context()
        if not place.is_valid:
            return NO_TRACE
        return TraceContext(
            f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags:02x}", place.trace_state.to_header()
        )

    @property
    def is_recorded(self) -> bool:
        return self._span.is_recording()

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
    ) -> "_OtlpSpan":
        context = trace.set_span_in_context(self._span, Context())
        span = self._tracer.start_span(
            name, context=context, kind=_KINDS[kind], attributes=attributes, start_time=start_ns
        )
        return _OtlpSpan(self._tracer, span)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def mark(self, name: str) -> None:
        self._span.add_event(name)

    def link(self, context: TraceContext) -> None:
        linked = trace.get_current_span(_PROPAGATOR.extract(_headers_of(context), Context()))
        self._span.add_link(linked.get_span_context())

    def end(self, *, error: str | None = None, end_ns: int | None = None) -> None:
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(end_ns)


def _headers_of(context: TraceContext) -> dict[str, str]:
    headers = {"traceparent": context.traceparent, "tracestate": context.tracestate}
    return {name: value for name, value in headers.items() if value}
