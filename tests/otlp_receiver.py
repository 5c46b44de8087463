"""A receiver of traces: what a collector is to the processes that export to it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

__all__ = ["OtlpReceiver", "ReceivedSpan", "running_otlp_receiver"]


@dataclass(frozen=True)
class ReceivedSpan:
    """A span, and the process it is of."""

    service: str
    instance: str
    proto: trace_pb2.Span

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def span_id(self) -> str:
        return self.proto.span_id.hex()

    @property
    def trace_id(self) -> str:
        return self.proto.trace_id.hex()

    @property
    def parent_id(self) -> str:
        return self.proto.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, object]:
        return {each.key: _value_of(each.value) for each in self.proto.attributes}

    @property
    def has_failed(self) -> bool:
        return self.proto.status.code == trace_pb2.Status.STATUS_CODE_ERROR


@dataclass
class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps everything it is sent."""

    endpoint: str = ""
    requests: list[trace_service_pb2.ExportTraceServiceRequest] = field(default_factory=list)

    def Export(  # noqa: N802 - named by the proto
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str | None = None) -> list[ReceivedSpan]:
        """All spans so far, or those of a trace, by their start."""
        spans = []
        for resource in (each for request in list(self.requests) for each in request.resource_spans):
            process = {each.key: _value_of(each.value) for each in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                spans.append(ReceivedSpan(process["service.name"], process["service.instance.id"], span))
        spans.sort(key=lambda span: span.proto.start_time_unix_nano)
        return [span for span in spans if trace_id in (None, span.trace_id)]


@contextmanager
def running_otlp_receiver() -> Iterator[OtlpReceiver]:
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    receiver = OtlpReceiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None).wait()


def _value_of(value: object) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value_of(each) for each in value.array_value.values]
    return getattr(value, kind)
