"""A place in a trace, as it travels between processes: W3C Trace Context (https://www.w3.org/TR/trace-context)."""

import re
from dataclasses import dataclass

__all__ = ["NO_TRACE", "TraceContext"]

# version "-" trace id "-" span id "-" flags; later versions may append fields.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_IS_SAMPLED = 0x01
# What others must pass on of `tracestate`; ours is what they gave us.
_MAX_STATE_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span that caused something, in whichever process it is; empty where nobody traces.

    >>> TraceContext.parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").trace_id
    '0af7651916cd43dd8448eb211c80319c'
    """

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def parse(cls, traceparent: str, tracestate: str = "") -> "TraceContext":
        """The context that a caller sent. One that is malformed counts as none, as the specification asks."""
        match = _TRACEPARENT.fullmatch(traceparent)
        if match is None or (match[1] == "00" and match[5]):
            return NO_TRACE
        is_kept = len(tracestate) <= _MAX_STATE_CHARACTERS and tracestate.isascii()
        return cls(f"00-{match[2]}-{match[3]}-{match[4]}", tracestate if is_kept else "")

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where nobody traces."""
        return self.traceparent[3:35]

    @property
    def is_sampled(self) -> bool:
        """Whether whoever began the trace wants it kept."""
        return bool(self.traceparent) and bool(int(self.traceparent[53:55], 16) & _IS_SAMPLED)

    @property
    def log_fields(self) -> dict[str, str]:
        """`extra` of a log line that belongs to the trace."""
        return {"trace_id": self.trace_id} if self.traceparent else {}


NO_TRACE = TraceContext()
