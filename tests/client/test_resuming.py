"""Streams that lose their connection, and what is tried again: decided without a server, with time that is told."""

from collections.abc import Callable

import pytest
from google.rpc import code_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_client import (
    AbortedError,
    APIError,
    DeadlineExceededError,
    Delta,
    InternalError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    RetryPolicy,
    StreamDivergedError,
    UnavailableError,
)
from oasst_client._accumulate import Accumulator
from oasst_client._channel import channel_options
from oasst_client._continuation import Continuation
from oasst_client._retry import Attempts

AWAY = UnavailableError("away", code="UNAVAILABLE")
LOST = AbortedError("not stored", code="ABORTED", reason="JOB_LOST")
SHORTER = AbortedError("less is stored", code="ABORTED", reason="STREAM_DIVERGED")


class Clock:
    """Time that the test tells."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_attempts(clock: Clock, *, timeout_s: float | None = None, **policy: float) -> Attempts:
    return Attempts(RetryPolicy(**policy), timeout_s=timeout_s, clock=clock, draw=lambda: 1.0)


def stream_of(clock: Clock, request: object = None, *, timeout_s: float | None = None) -> Continuation:
    request = request or chat_pb2.ChatRequest(request_id="r-1")
    return Continuation(request, Accumulator(request.request_id), make_attempts(clock, timeout_s=timeout_s))


def accepted() -> chat_pb2.ChatEvent:
    return chat_pb2.ChatEvent(accepted=chat_pb2.Accepted(request_id="r-1", resume_token="secret", seed=7))


def tokens(position: int, *texts: str, choice: int = 0, next_position: int | None = None) -> chat_pb2.ChatEvent:
    ids = range(100 + position, 100 + position + len(texts))
    end = position + len(texts) if next_position is None else next_position
    delta = generation_pb2.Delta(choice=choice, position=position, text="".join(texts), token_ids=ids)
    return chat_pb2.ChatEvent(next_position=end, delta=delta)


def finished(choices: int = 1) -> chat_pb2.ChatEvent:
    finishes = [generation_pb2.ChoiceFinish(choice=choice) for choice in range(choices)]
    return chat_pb2.ChatEvent(finished=chat_pb2.Finished(finishes=finishes))


def feed(stream: Continuation, *events: chat_pb2.ChatEvent) -> list[object]:
    return [told for event in events if (told := stream.add(event)) is not None]


# ------------------------------------------------------------------------------------------------------------- attempts


def test_delays_double_up_to_the_most(clock: Clock) -> None:
    attempts = make_attempts(clock, max_attempts=9)
    assert [attempts.delay_after(AWAY) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    with pytest.raises(UnavailableError):
        attempts.delay_after(AWAY)


def test_a_connection_is_tried_again_before_a_call_is_given_up(clock: Clock) -> None:
    """Or a gateway that is back would not be found in time."""
    attempts = Attempts(RetryPolicy(), clock=clock, draw=lambda: 0.0)
    shortest_s = sum(attempts.delay_after(AWAY) for _ in range(RetryPolicy().max_attempts - 1))
    jitter = 1.2  # gRPC's own.
    assert jitter * dict(channel_options())["grpc.max_reconnect_backoff_ms"] < 1000 * shortest_s


def test_half_of_a_delay_is_drawn(clock: Clock) -> None:
    attempts = Attempts(RetryPolicy(), clock=clock, draw=lambda: 0.0)
    assert attempts.delay_after(AWAY) == 0.05


def test_what_the_server_tells_goes_before_our_own_delay(clock: Clock) -> None:
    told = UnavailableError("away", code="UNAVAILABLE", retry_after_s=7.0)
    assert make_attempts(clock).delay_after(told) == 7.0


def test_at_once_is_taken_at_its_word_once(clock: Clock) -> None:
    attempts = make_attempts(clock)
    at_once = UnavailableError("leaving", code="UNAVAILABLE", reason="GATEWAY_LEAVING", retry_after_s=0.0)
    assert [attempts.delay_after(at_once) for _ in range(3)] == [0.0, 0.2, 0.4]


def test_a_server_that_wants_to_be_left_alone_for_long_is_not_waited_for(clock: Clock) -> None:
    told = OverloadedError("full", code="RESOURCE_EXHAUSTED", retry_after_s=31.0)
    with pytest.raises(OverloadedError):
        make_attempts(clock).delay_after(told)


def test_no_attempt_begins_behind_the_deadline(clock: Clock) -> None:
    attempts = make_attempts(clock, timeout_s=1.0)
    assert attempts.remaining_s == 1.0
    clock.now_s += 0.85
    assert attempts.delay_after(AWAY) == 0.1
    assert attempts.remaining_s == pytest.approx(0.15)
    with pytest.raises(UnavailableError):
        attempts.delay_after(AWAY)


def test_an_accepted_request_is_looked_for_as_long_as_the_patience_lasts(clock: Clock) -> None:
    attempts = make_attempts(clock, patience_s=10.0, max_attempts=1)
    for _ in range(5):
        attempts.delay_after(AWAY, is_accepted=True)
        clock.now_s += 2.0
    attempts.saw_life()
    clock.now_s += 5.0
    attempts.delay_after(AWAY, is_accepted=True)
    clock.now_s += 10.1
    with pytest.raises(UnavailableError):
        attempts.delay_after(AWAY, is_accepted=True)


# --------------------------------------------------------------------------------------------------------- continuation


def test_before_it_is_accepted_the_same_request_is_made_again(clock: Clock) -> None:
    stream = stream_of(clock)
    first = stream.next_call
    stream.recover(AWAY)
    assert stream.next_call is first
    assert stream.num_resumes == 0


def test_after_that_it_is_watched_from_the_next_token_on(clock: Clock) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a", "b"), tokens(2, "c"))
    stream.recover(AWAY)
    assert stream.next_call == chat_pb2.WatchChatRequest(request_id="r-1", resume_token="secret", after=3)
    assert stream.num_resumes == 1
    told = feed(stream, accepted(), tokens(3, "d"), finished())
    assert [type(each).__name__ for each in told] == ["Delta", "Finished"]
    assert stream.accumulator.text == "abcd"
    assert stream.is_over


@pytest.mark.parametrize(
    "error",
    [
        AWAY,
        UnavailableError("leaving", code="UNAVAILABLE", reason="GATEWAY_LEAVING", retry_after_s=0.0),
        RequestCancelledError("nobody asked for it", code="CANCELLED"),
        OverloadedError("full", code="RESOURCE_EXHAUSTED", reason="TOO_MANY_CHATS", retry_after_s=1.0),
    ],
)
def test_what_may_pass_is_tried_again(clock: Clock, error: APIError) -> None:
    stream = stream_of(clock)
    stream.recover(error)
    feed(stream, accepted())
    stream.recover(error)
    assert isinstance(stream.next_call, chat_pb2.WatchChatRequest)


@pytest.mark.parametrize(
    "error",
    [
        RequestCancelledError("somebody asked for it", code="CANCELLED", reason="CANCELLED"),
        DeadlineExceededError("late", code="DEADLINE_EXCEEDED"),
        InternalError("broken", code="INTERNAL", reason="NUMERIC"),
        OverloadedError("full for good", code="RESOURCE_EXHAUSTED", reason="QUOTA"),
        AbortedError("poison", code="ABORTED", reason="POISON"),
    ],
)
def test_what_will_not_pass_is_told_at_once(clock: Clock, error: APIError) -> None:
    for events in ((), (accepted(), tokens(0, "a"))):
        stream = stream_of(clock)
        feed(stream, *events)
        with pytest.raises(type(error)):
            stream.recover(error)
        assert stream.is_over


@pytest.mark.parametrize("error", [LOST, NotFoundError("unknown", code="NOT_FOUND", reason="CHAT_NOT_FOUND")])
def test_a_request_that_the_server_lost_is_made_again_with_its_seed(clock: Clock, error: APIError) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a", "b"))
    stream.recover(error)
    again = chat_pb2.ChatRequest(request_id="r-1")
    again.sampling.seed = 7
    assert stream.next_call == again
    # Told again in other pieces: what is held is compared, what is new is told, once.
    told = feed(stream, accepted(), tokens(0, "a"), tokens(1, "b", "c"), tokens(3, "d"), finished())
    assert [each.text for each in told if isinstance(each, Delta)] == ["c", "d"]
    assert [each.position for each in told if isinstance(each, Delta)] == [2, 3]
    assert stream.accumulator.end().text == "abcd"
    assert stream.accumulator.end().token_ids == (100, 101, 102, 103)


def test_a_log_that_is_shorter_than_what_came_is_read_from_its_start(clock: Clock) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a", "b", "c"))
    stream.recover(SHORTER)
    assert stream.next_call == chat_pb2.WatchChatRequest(request_id="r-1", resume_token="secret", after=0)
    assert feed(stream, accepted(), tokens(0, "a"), tokens(1, "b"), tokens(2, "c")) == []
    assert [each.text for each in feed(stream, tokens(3, "d"))] == ["d"]


@pytest.mark.parametrize(
    "told_anew",
    [
        (tokens(0, "a", "x"),),
        (tokens(0, "a"), finished()),
        (tokens(0, "a", "b", "c", "!"),),
        (tokens(0, "a", "b", ""), tokens(3, "d")),
        (chat_pb2.ChatEvent(delta=generation_pb2.Delta(text="abc", token_ids=[100, 7, 102])),),
    ],
    ids=["other text", "shorter", "more text", "less text", "other tokens"],
)
def test_an_answer_that_comes_out_differently_is_never_passed_off_as_the_same(
    clock: Clock, told_anew: tuple[chat_pb2.ChatEvent, ...]
) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a", "b", "c"))
    if told_anew[0].delta.text == "abc!":
        told_anew[0].delta.token_ids.pop()  # Text without a token of its own.
    stream.recover(LOST)
    with pytest.raises(StreamDivergedError) as diverged:
        feed(stream, accepted(), *told_anew)
    assert diverged.value.reason == "STREAM_DIVERGED"
    with pytest.raises(StreamDivergedError):
        stream.recover(diverged.value)


def test_a_request_made_anew_is_asked_for_until_it_is_accepted(clock: Clock) -> None:
    full = OverloadedError("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after_s=1.0)
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a", "b"))
    stream.recover(LOST)
    again = stream.next_call
    while clock.now_s < 100.0 + RetryPolicy().patience_s:
        clock.now_s += stream.recover(full)
        assert stream.next_call is again
    assert feed(stream, accepted(), tokens(0, "a", "b")) == []
    stream.recover(AWAY)
    assert stream.next_call == chat_pb2.WatchChatRequest(request_id="r-1", resume_token="secret", after=2)
    feed(stream, accepted(), tokens(2, "c"), finished())
    assert stream.accumulator.end().seed == 7


def test_a_request_made_anew_is_given_up_when_the_patience_ends(clock: Clock) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a"))
    stream.recover(LOST)
    clock.now_s += RetryPolicy().patience_s + 0.1
    with pytest.raises(UnavailableError):
        stream.recover(AWAY)


def test_a_request_that_is_lost_again_and_again_is_given_up(clock: Clock) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a"))
    for _ in range(3):
        stream.recover(LOST)
        feed(stream, accepted(), tokens(0, "a"))
    with pytest.raises(AbortedError):
        stream.recover(LOST)


def test_whoever_only_watches_cannot_ask_anew(clock: Clock) -> None:
    stream = stream_of(clock, chat_pb2.WatchChatRequest(request_id="r-1", resume_token="secret"))
    feed(stream, accepted(), tokens(0, "a"))
    with pytest.raises(AbortedError):
        stream.recover(LOST)


def test_what_is_sent_again_of_several_choices_is_told_once(clock: Clock) -> None:
    """Cut off inside a bunch: the first choice's part had come, the position to come back to lies before both."""
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a", "b", next_position=0))
    feed(stream, tokens(0, "x", "y", choice=1, next_position=4), tokens(2, "c", next_position=4))
    stream.recover(AWAY)
    assert stream.next_call.after == 4
    told = feed(
        stream,
        accepted(),
        tokens(2, "c", "d", next_position=4),
        tokens(2, "z", choice=1, next_position=7),
        finished(choices=2),
    )
    assert [each.text for each in told if isinstance(each, Delta)] == ["d", "z"]
    assert [choice.text for choice in stream.accumulator.end().choices] == ["abcd", "xyz"]


@pytest.mark.parametrize("position", [0, 2])
def test_within_one_stream_a_repeat_or_a_gap_breaks_the_contract(clock: Clock, position: int) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a"))
    with pytest.raises(ProtocolError):
        feed(stream, tokens(position, "b"))


def test_wherever_a_stream_is_cut_it_comes_out_whole(clock: Clock) -> None:
    """Every cut, resumed by watching and by asking anew, the rest told in pieces of every size."""
    texts = ["a", "", "bc", "d", "", "ef"]
    resumptions: list[tuple[APIError, Callable[[Continuation], int]]] = [
        (AWAY, lambda stream: stream.next_call.after),
        (LOST, lambda _: 0),
        (SHORTER, lambda _: 0),
    ]
    for cut in range(1, len(texts) + 1):
        for size in range(1, len(texts) + 1):
            for error, start_of in resumptions:
                stream = stream_of(clock)
                told = feed(stream, accepted(), *(tokens(index, texts[index]) for index in range(cut)))
                stream.recover(error)
                start = start_of(stream)
                pieces = [tokens(at, *texts[at : at + size]) for at in range(start, len(texts), size)]
                told += feed(stream, accepted(), *pieces, finished())
                deltas = [each for each in told if isinstance(each, Delta)]
                assert "".join(delta.text for delta in deltas) == "abcdef"
                assert [token for delta in deltas for token in delta.token_ids] == [*range(100, 106)]
                assert stream.accumulator.end().text == "abcdef"


def test_a_failure_event_is_an_error_like_any_other(clock: Clock) -> None:
    stream = stream_of(clock)
    feed(stream, accepted(), tokens(0, "a"))
    failed = chat_pb2.Failed(code=code_pb2.ABORTED, reason="JOB_LOST", message="not stored")
    with pytest.raises(AbortedError) as lost:
        feed(stream, chat_pb2.ChatEvent(failed=failed))
    stream.recover(lost.value)
    assert isinstance(stream.next_call, chat_pb2.ChatRequest)
