"""A call tells which span of its program caused it, if the program traces; the client itself needs no OpenTelemetry."""

from oasst_client import AsyncClient
from opentelemetry import trace

PLACE = trace.SpanContext(
    trace_id=0x0AF7651916CD43DD8448EB211C80319C,
    span_id=0xB7AD6B7169203331,
    is_remote=False,
    trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    trace_state=trace.TraceState([("vendor", "1")]),
)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_call_names_the_current_span(server, client):
    with trace.use_span(trace.NonRecordingSpan(PLACE)):
        client.chat("What is a meme?")
        with client.stream("What is a meme?") as stream:
            stream.completion()
    client.chat("What is a meme?")
    inside, streamed, outside = server.metadata
    assert (inside["traceparent"], inside["tracestate"]) == (TRACEPARENT, "vendor=1")
    assert streamed["traceparent"] == TRACEPARENT
    assert "traceparent" not in outside


async def test_so_does_an_async_call(server):
    async with AsyncClient(server.address) as client:
        with trace.use_span(trace.NonRecordingSpan(PLACE)):
            await client.chat("What is a meme?")
    assert server.metadata[-1]["traceparent"] == TRACEPARENT
