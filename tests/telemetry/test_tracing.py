"""Spans as a receiver sees them, and what is left of them where there is none."""

import sys
import time

import pytest
from oasst_telemetry import NO_TRACE, SpanKind, TraceContext, TracingError, start_tracer
from otlp_receiver import running_otlp_receiver

CALLER = TraceContext.parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "vendor=1")


def test_spans_reach_the_receiver_with_their_parents_times_and_errors():
    with running_otlp_receiver() as receiver:
        tracer = start_tracer(receiver.endpoint, service="test", instance="one")
        whole = tracer.start("whole", kind=SpanKind.SERVER, parent=CALLER, start_ns=1_000)
        part = whole.child("part", attributes={"a": ["x", "y"]}, start_ns=2_000)
        part.mark("first token")
        part.link(CALLER)
        part.end(end_ns=3_000)
        whole.note({"n": 2})
        whole.end(error="INTERNAL", end_ns=4_000)
        tracer.close()
        first, second = receiver.spans()
    assert (first.service, first.instance, first.name, first.parent_id) == ("test", "one", "whole", "b7ad6b7169203331")
    assert (second.name, second.parent_id) == ("part", first.span_id)
    assert {first.trace_id, second.trace_id} == {CALLER.trace_id}
    assert (first.proto.start_time_unix_nano, first.proto.end_time_unix_nano) == (1_000, 4_000)
    assert first.attributes == {"n": 2, "error.type": "INTERNAL"}
    assert (first.has_failed, second.has_failed) == (True, False)
    assert first.proto.trace_state == "vendor=1"
    assert second.attributes == {"a": ["x", "y"]}
    assert [event.name for event in second.proto.events] == ["first token"]
    assert [link.span_id.hex() for link in second.proto.links] == ["b7ad6b7169203331"]


def test_a_child_in_another_process_is_told_by_the_context():
    with running_otlp_receiver() as receiver:
        here, there = (start_tracer(receiver.endpoint, service=name, instance=name) for name in ("here", "there"))
        cause = here.start("cause", kind=SpanKind.PRODUCER, parent=NO_TRACE)
        there.start("effect", kind=SpanKind.CONSUMER, parent=cause.context).end()
        cause.end()
        for tracer in (here, there):
            tracer.close()
        first, second = receiver.spans()
    assert (second.parent_id, second.trace_id) == (first.span_id, first.trace_id)
    assert (first.service, second.service) == ("here", "there")


def test_a_caller_who_does_not_want_its_trace_kept_is_obeyed():
    with running_otlp_receiver() as receiver:
        tracer = start_tracer(receiver.endpoint, service="test", instance="one")
        unsampled = TraceContext.parse(CALLER.traceparent[:-2] + "00")
        span = tracer.start("whole", kind=SpanKind.SERVER, parent=unsampled)
        assert not span.is_recorded
        assert span.context.trace_id == CALLER.trace_id
        assert not span.context.is_sampled
        span.end()
        tracer.close()
        assert receiver.spans() == []


def test_without_a_receiver_spans_pass_on_whose_they_would_be():
    tracer = start_tracer(None, service="test", instance="one")
    span = tracer.start("whole", kind=SpanKind.SERVER, parent=CALLER)
    assert span.child("part").context == span.context == CALLER
    assert not span.is_recorded
    assert tracer.start("whole", kind=SpanKind.SERVER, parent=NO_TRACE).context == NO_TRACE


def test_a_receiver_that_is_away_does_not_hold_up_the_end():
    tracer = start_tracer("http://127.0.0.1:1", service="test", instance="one")
    tracer.start("whole", kind=SpanKind.SERVER, parent=NO_TRACE).end()
    started_s = time.monotonic()
    tracer.close(timeout_s=0.5)
    assert time.monotonic() - started_s < 5


def test_without_opentelemetry_the_error_tells_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "oasst_telemetry.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(TracingError, match=r"pip install '\.\[trace\]' in a clone"):
        start_tracer("http://127.0.0.1:4317", service="test", instance="one")
