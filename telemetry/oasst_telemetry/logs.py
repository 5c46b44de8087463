"""Log lines on standard error: one for each event of a job's life, as text or as JSON.

A line's format is its schema. `logger.info("accepted job_id=%s prompt_tokens=%d", ...)` is the event "accepted" with
two fields, whose names are those in the format and whose values keep their types in JSON:

    2026-11-26T06:30:00.123Z INFO oasst_gateway.chats accepted job_id=5f0c prompt_tokens=12 trace_id=0af7...
    {"time": "...", "level": "info", "logger": "oasst_gateway.chats", "event": "accepted", "job_id": "5f0c", ...}
"""

import json
import logging
import re
import time
from datetime import UTC, datetime
from typing import Literal

__all__ = ["JsonFormatter", "LogFormat", "TextFormatter", "log_to_stderr"]

# A field of a format: its name, and how its value is written as text.
_FIELD = re.compile(r"\s*(\w+)=%[-#0 +]*\d*(?:\.\d+)?[a-z]")
_PLAIN_TYPES = (str, int, float, bool, type(None))

LogFormat = Literal["text", "json"]


class TextFormatter(logging.Formatter):
    """Time in UTC, level, logger, event, fields; the trace last, where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        line = super().formatMessage(record)
        trace_id = getattr(record, "trace_id", None)
        return f"{line} trace_id={trace_id}" if trace_id else line


class JsonFormatter(logging.Formatter):
    """One object a line. A message whose format is no list of fields is the event as a whole."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **_event_of(record),
        }
        trace_id = getattr(record, "trace_id", None)
        if trace_id:
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(*, level: str, log_format: LogFormat) -> None:
    """What the process logs from now on goes to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _event_of(record: logging.LogRecord) -> dict[str, object]:
    """The event and its fields; the text as a whole if the format has values without a name."""
    args = record.args if isinstance(record.args, tuple) else ()
    form = str(record.msg)
    names = _FIELD.findall(form)
    event = _FIELD.sub("", form)
    if not args or len(names) != len(args) or "%" in event:
        return {"event": record.getMessage()}
    return {"event": event.strip()} | dict(zip(names, map(_plain, args), strict=True))


def _plain(value: object) -> object:
    return value if isinstance(value, _PLAIN_TYPES) else str(value)
