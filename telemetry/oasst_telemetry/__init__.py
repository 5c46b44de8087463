"""What gateway and worker tell of themselves in the same way: spans, log lines, probes and metrics over HTTP.

It tells mistyped options as well. Nothing here knows a job or a model. OpenTelemetry is imported only once spans are to
be exported.
"""

from oasst_telemetry.context import NO_TRACE, TraceContext
from oasst_telemetry.logs import LogFormat, log_to_stderr
from oasst_telemetry.probes import Check, Condition, ProbeServer, parse_address
from oasst_telemetry.tracing import NO_SPAN, NO_TRACER, Attributes, Span, SpanKind, Tracer, TracingError, start_tracer
from oasst_telemetry.variables import MistypedVariableError, refuse_mistyped_variables, unknown_variables

__all__ = [
    "NO_SPAN",
    "NO_TRACE",
    "NO_TRACER",
    "Attributes",
    "Check",
    "Condition",
    "LogFormat",
    "MistypedVariableError",
    "ProbeServer",
    "Span",
    "SpanKind",
    "TraceContext",
    "Tracer",
    "TracingError",
    "log_to_stderr",
    "parse_address",
    "refuse_mistyped_variables",
    "start_tracer",
    "unknown_variables",
]
