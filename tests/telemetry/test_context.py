"""Where in a trace a caller is, as it says in its headers."""

import pytest
from oasst_telemetry import NO_TRACE, TraceContext

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_context_that_was_sent_is_passed_on_as_it_is():
    context = TraceContext.parse(f"00-{TRACE}-{SPAN}-01", "vendor=1")
    assert (context.traceparent, context.tracestate) == (f"00-{TRACE}-{SPAN}-01", "vendor=1")
    assert (context.trace_id, context.is_sampled) == (TRACE, True)
    assert context.log_fields == {"trace_id": TRACE}


def test_an_unsampled_trace_is_known_as_such():
    assert not TraceContext.parse(f"00-{TRACE}-{SPAN}-00").is_sampled


def test_a_later_version_is_read_as_far_as_it_is_known():
    assert TraceContext.parse(f"01-{TRACE}-{SPAN}-01-more").traceparent == f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_a_malformed_header_is_no_trace(header):
    assert TraceContext.parse(header, "vendor=1") == NO_TRACE
    assert NO_TRACE.log_fields == {}
    assert not NO_TRACE.is_sampled


def test_a_state_that_is_too_long_is_left_out():
    assert TraceContext.parse(f"00-{TRACE}-{SPAN}-01", "x" * 513).tracestate == ""
