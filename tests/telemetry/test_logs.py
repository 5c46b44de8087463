"""One line for each event: its fields have the names of its format."""

import json
import logging
import time

import pytest
from oasst_telemetry.logs import JsonFormatter, TextFormatter

TRACE = "0af7651916cd43dd8448eb211c80319c"


def line(formatter: logging.Formatter, message: str, *args: object, **kwargs) -> str:
    record = logging.LogRecord("oasst.test", logging.INFO, __file__, 1, message, args, kwargs.pop("exc_info", None))
    vars(record).update(kwargs)
    return formatter.format(record)


def test_a_line_of_text_ends_with_the_trace_where_there_is_one():
    assert line(TextFormatter(), "accepted job_id=%s n=%d", "j1", 2).endswith("INFO oasst.test accepted job_id=j1 n=2")
    assert line(TextFormatter(), "accepted job_id=%s", "j1", trace_id=TRACE).endswith(f"job_id=j1 trace_id={TRACE}")


def test_a_line_of_text_tells_its_time_in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        said = line(TextFormatter(), "asked to stop", created=1_800_000_000.0, msecs=42.0)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert said == "2027-01-15T08:00:00.042Z INFO oasst.test asked to stop"


def test_fields_keep_their_types_in_json():
    message = "finished job_id=%s tokens=%d elapsed_s=%.3f is_new=%s"
    told = json.loads(line(JsonFormatter(), message, "j1", 12, 0.25, True, trace_id=TRACE))
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "info",
        "logger": "oasst.test",
        "event": "finished",
        "job_id": "j1",
        "tokens": 12,
        "elapsed_s": 0.25,
        "is_new": True,
        "trace_id": TRACE,
    }


def test_a_value_with_spaces_or_equals_signs_stays_one_field():
    told = json.loads(line(JsonFormatter(), "queue away error=%s", OSError("host=x, try again")))
    assert (told["event"], told["error"]) == ("queue away", "host=x, try again")


@pytest.mark.parametrize(
    ("message", "args"), [("asked to stop", ()), ("loaded %s (%d of %d)", ("a", 1, 2)), ("100 %", ())]
)
def test_a_message_that_is_no_list_of_fields_is_the_event(message, args):
    told = json.loads(line(JsonFormatter(), message, *args))
    assert told["event"] == (message % args if args else message)
    assert set(told) == {"time", "level", "logger", "event"}


def test_an_exception_stays_on_its_line():
    try:
        raise ValueError("broken\nin two")
    except ValueError as error:
        said = line(JsonFormatter(), "failed rpc=%s", "Chat", exc_info=(type(error), error, error.__traceback__))
    assert "\n" not in said
    assert "ValueError: broken" in json.loads(said)["exception"]
