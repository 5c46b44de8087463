"""The synchronous client against a real server."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2
from oasst.v1 import chat_pb2
from oasst_client import (
    Accepted,
    Client,
    DeadlineExceededError,
    Delta,
    FieldViolation,
    Finished,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    MessageTooLargeError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    RetryPolicy,
    Token,
    TokenAlternative,
    TokenLogprob,
    UnavailableError,
    UnimplementedError,
    Waiting,
)
from waiting import wait_until

TEXT = "An idea that spreads."


def waits_for_its_caller(server):
    """A script that says one word and then nothing more until the call ends."""

    def script(request, context):
        yield server.accepted(request)
        yield server.delta(0, "Well, ")
        server.ended.wait(timeout=30)
        # The server may see a deadline before the client does; ending well would be another answer.
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")

    return script


def test_chat_gives_the_whole_completion(client):
    completion = client.chat("What is a meme?", request_id="mine")
    assert completion.text == TEXT
    assert completion.token_ids == (100, 101, 102, 103)
    assert completion.logprobs[0] == TokenLogprob(-0.5, (TokenAlternative(9, -0.5),))
    assert completion.finish_reason is FinishReason.END_OF_TEXT
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 4)
    assert completion.timings.queue_s == 0.25
    assert (completion.request_id, completion.seed) == ("mine", 7)


def test_a_stream_gives_text_piece_by_piece_and_then_the_same_completion_as_chat(client):
    with client.stream("What is a meme?", request_id="mine") as stream:
        assert list(stream) == ["An ", "idea ", "that ", "spreads."]
        assert stream.text == TEXT
    assert stream.completion() == client.chat("What is a meme?", request_id="mine")


def test_events_are_typed_and_in_order(client):
    with client.stream("What is a meme?") as stream:
        events = list(stream.events())
    assert [type(event) for event in events] == [Accepted, Waiting, Delta, Delta, Delta, Delta, Finished]
    assert events[0].request_id == stream.request_id
    assert (events[0].queue.position, events[0].queue.estimated_wait_s) == (2, 1.5)
    assert events[1].queue.estimated_wait_s is None
    assert "secret" not in repr(events[0])


def test_completion_reads_what_is_left_of_a_stream(client):
    with client.stream("What is a meme?") as stream:
        assert next(iter(stream)) == "An "
        assert stream.completion().text == TEXT


def test_a_stream_gives_its_tokens_one_by_one(server, client):
    def script(request, context):
        yield server.accepted(request)
        joined = server.delta(0, "An idea")
        joined.delta.token_ids.append(101)
        joined.delta.logprobs.append(joined.delta.logprobs[0])
        yield joined
        yield server.delta(0, "Another", choice=1)
        yield server.finished(3, choices=2)

    server.script = script
    with client.stream("What is a meme?", n=2, logprobs=1) as stream:
        assert list(stream.tokens()) == [Token(number, -0.5, (TokenAlternative(9, -0.5),)) for number in (100, 101)]
    assert Delta(0, 0, "An idea", (100, 101)).tokens == (Token(100), Token(101))


def test_choices_are_kept_apart(server, client):
    def script(request, context):
        yield server.accepted(request)
        yield server.delta(0, "red", choice=1)
        yield server.delta(0, "blue", choice=0)
        yield server.delta(1, "ish", choice=1)
        yield server.finished(3, choices=2)

    server.script = script
    with client.stream("A colour?", n=2) as stream:
        assert list(stream) == ["blue"]
    assert [choice.text for choice in stream.completion().choices] == ["blue", "redish"]
    assert [choice.text for choice in client.chat("A colour?", n=2).choices] == ["blue", "redish"]


def test_leaving_a_stream_early_cancels_the_request(server, client):
    server.script = waits_for_its_caller(server)
    with client.stream("Tell me everything.") as stream:
        for text in stream:
            assert text == "Well, "
            break
        assert not server.ended.is_set()
    assert server.ended.wait(timeout=5)
    with pytest.raises(RequestCancelledError):
        stream.completion()


def test_an_exception_of_the_caller_cancels_the_request_and_goes_on_its_way(server, client):
    server.script = waits_for_its_caller(server)
    with pytest.raises(ZeroDivisionError), client.stream("Tell me everything.") as stream:
        next(len(text) / 0 for text in stream)
    assert server.ended.wait(timeout=5)


def test_a_gap_or_a_repeat_in_a_stream_is_never_shown_as_text(server, client):
    for wrong_position in (0, 2):

        def script(request, context, position=wrong_position):
            yield server.accepted(request)
            yield server.delta(0, "one ")
            yield server.delta(position, "another")

        server.script = script
        seen = []
        with pytest.raises(ProtocolError, match="goes on at token"), client.stream("Count.") as stream:
            seen.extend(stream)
        assert "another" not in seen


def test_a_stream_without_its_last_event_is_an_error(server, client):
    def script(request, context):
        yield server.accepted(request)
        yield server.delta(0, "one ")

    server.script = script
    with pytest.raises(ProtocolError, match="without its last event"), client.stream("Count.") as stream:
        list(stream)


def test_a_failed_event_is_raised_with_its_reason_after_the_text_before_it(server, client):
    def script(request, context):
        yield server.accepted(request)
        yield server.delta(0, "one ")
        failed = chat_pb2.Failed(code=code_pb2.INTERNAL, reason="NUMERIC", message="the logits are not numbers")
        yield chat_pb2.ChatEvent(failed=failed)
        server.refuse(context, code_pb2.INTERNAL, "the logits are not numbers", server.error_info("NUMERIC"))

    server.script = script
    with client.stream("Count.") as stream:
        texts = iter(stream)
        assert next(texts) == "one "
        with pytest.raises(InternalError) as error:
            next(texts)
    assert (error.value.code, error.value.reason) == ("INTERNAL", "NUMERIC")
    assert error.value.request_id == stream.request_id


def test_invalid_arguments_name_every_field(server, client):
    def script(request, context):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="must be > 0 and <= 1"),
            error_details_pb2.BadRequest.FieldViolation(field="limits.stop[3]", description="at most 64 characters"),
        ]
        bad_request = error_details_pb2.BadRequest(field_violations=violations)
        server.refuse(context, code_pb2.INVALID_ARGUMENT, "invalid", server.error_info("INVALID_FIELD"), bad_request)
        yield

    server.script = script
    with pytest.raises(InvalidArgumentError) as error:
        client.chat("Hi", top_p=1.5)
    assert [violation.field for violation in error.value.field_violations] == ["sampling.top_p", "limits.stop[3]"]
    assert "sampling.top_p: must be > 0 and <= 1" in str(error.value)
    assert error.value.reason == "INVALID_FIELD"


def test_an_error_tells_nothing_twice():
    violation = FieldViolation("n", "must be at least 1")
    whole = InvalidArgumentError("n: must be at least 1", code="INVALID_ARGUMENT", field_violations=(violation,))
    assert str(whole) == "n: must be at least 1 (INVALID_ARGUMENT)"
    short = InvalidArgumentError("invalid", code="INVALID_ARGUMENT", field_violations=(violation,))
    assert str(short) == "invalid (INVALID_ARGUMENT); n: must be at least 1"


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:50051", "https://chat.example"])
def test_an_address_that_is_none_is_refused_with_what_to_give(address):
    with pytest.raises(ValueError, match="give HOST:PORT"):
        Client(address)


def test_a_refusal_tells_when_to_come_back(server):
    def script(request, context):
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000))
        server.refuse(context, code_pb2.RESOURCE_EXHAUSTED, "full", server.error_info("QUEUE_FULL"), retry)
        yield

    server.script = script
    with (
        Client(server.address, retry=RetryPolicy(max_attempts=1)) as client,
        pytest.raises(OverloadedError) as error,
        client.stream("Hi") as stream,
    ):
        list(stream)
    assert (error.value.reason, error.value.retry_after_s) == ("QUEUE_FULL", 2.5)
    assert len(server.requests) == 1


def test_a_refusal_for_now_is_overload_though_no_reason_is_told(server):
    """As a proxy refuses that limits rates."""

    def script(request, context):
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2))
        server.refuse(context, code_pb2.RESOURCE_EXHAUSTED, "too many requests", retry)
        yield

    server.script = script
    with Client(server.address, retry=RetryPolicy(max_attempts=1)) as client, pytest.raises(OverloadedError):
        client.chat("Hi")


def test_what_the_server_adds_to_its_reason_is_told(server, client):
    def script(request, context):
        info = error_details_pb2.ErrorInfo(reason="BROKEN", domain="oasst.v1", metadata={"cause": "a wire"})
        server.refuse(context, code_pb2.INTERNAL, "broken", info)
        yield

    server.script = script
    with pytest.raises(InternalError) as error:
        client.chat("Hi")
    assert error.value.metadata == {"cause": "a wire"}


def test_a_stream_that_failed_tells_the_same_when_asked_again(server, client):
    def fails(request, context):
        yield server.accepted(request)
        yield server.delta(0, "Well, ")
        server.refuse(context, code_pb2.INTERNAL, "broken", server.error_info("NUMERIC"))

    def has_a_gap(request, context):
        yield server.accepted(request)
        yield server.delta(1, "idea ")
        yield server.finished(2)

    for script, error in ((fails, InternalError), (has_a_gap, ProtocolError)):
        server.script = script
        stream = client.stream("Hi")
        for _ in range(2):
            with pytest.raises(error):
                stream.completion()


def test_a_message_beyond_grpcs_size_is_not_taken_for_overload(client):
    with pytest.raises(MessageTooLargeError):
        client.chat("x" * 5_000_000)


def test_the_deadline_of_a_call_ends_it(server, client):
    server.script = waits_for_its_caller(server)
    with pytest.raises(DeadlineExceededError), client.stream("Hi", timeout_s=0.2) as stream:
        list(stream)
    assert server.ended.wait(timeout=5)


def test_endless_is_no_deadline(server, client):
    given_s = []

    def script(request, context):
        given_s.append(context.time_remaining())
        yield from server.answer(request, context)

    server.script = script
    client.chat("Hi", timeout_s=math.inf)
    client.stream("Hi", timeout_s=math.inf).completion()
    assert min(given_s) > 1e9
    client.submit("Hi", timeout_s=math.inf)
    assert not server.requests[-1].HasField("timeout")


def test_an_unavailable_server_is_tried_again_with_the_same_request_id(server, client):
    def script(request, context):
        if len(server.requests) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield from server.answer(request, context)

    server.script = script
    assert client.chat("What is a meme?").text == TEXT
    assert len({request.request_id for request in server.requests}) == 1
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_unavailable():
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError) as error:
        client.chat("Hi", timeout_s=10)
    assert error.value.request_id


def test_a_call_the_server_does_not_have_says_so(client, server):
    def script(request, context):
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "ChatStream is not there yet")
        yield

    server.script = script
    with pytest.raises(UnimplementedError, match="not there yet"):
        client.chat("Hi")


def test_cancel_tells_the_state_the_request_is_in(client):
    assert client.cancel("known") == "cancelled"
    with pytest.raises(NotFoundError) as error:
        client.cancel("unknown")
    assert error.value.reason == "REQUEST_NOT_FOUND"


def test_models_tell_their_limits_ids_and_presets(client):
    [model] = client.models()
    assert model == client.model()
    assert (model.name, model.max_positions) == ("tiny", 128)
    # Id 0 of an optional control token is an id, an absent one is None.
    assert (model.control_tokens.padding, model.control_tokens.system) == (0, None)
    assert (model.presets[0].name, model.presets[0].values) == ("k50", {"temperature": 0.75, "top_k": 50})


def test_text_and_token_ids_are_each_others_inverse(client):
    assert client.detokenize(*client.tokenize("Hi", "you")) == ("Hi", "you")


def test_load_tells_what_waits_and_which_workers_live(client):
    load = client.load()
    assert (load.waiting_requests, load.workers[0].max_sequences, load.workers[0].age_s) == (3, 4, 1.0)
    assert load.estimated_wait_s is None


def test_metadata_goes_with_every_chat(server):
    with Client(server.address, metadata=[("authorization", "Bearer key")]) as client:
        client.chat("Hi")
    assert server.metadata[0]["authorization"] == "Bearer key"


def test_threads_share_one_client(client):
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(client.chat("Hi").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [TEXT] * 8


def test_a_stream_may_be_closed_after_its_client(server):
    client = Client(server.address)
    stream = client.stream("Hi")
    next(iter(stream.events()))
    client.close()
    stream.close()


@pytest.mark.parametrize(
    "call", [lambda client: client.chat("Hi"), lambda client: client.stream("Hi").completion()], ids=["chat", "stream"]
)
def test_closing_a_client_under_a_call_is_told_as_a_cancellation(server, call):
    server.script = waits_for_its_caller(server)
    client = Client(server.address)
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(call, client)
        assert server.started.wait(timeout=5)
        client.close()
        with pytest.raises(RequestCancelledError, match="was closed"):
            answer.result(timeout=5)
    with pytest.raises(RequestCancelledError, match="the client was closed"):
        call(client)
    assert server.ended.wait(timeout=5)


def test_closing_a_client_ends_the_wait_for_the_next_attempt(server):
    def away(request, context):
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=20))
        server.refuse(context, code_pb2.UNAVAILABLE, "away", retry)
        yield

    server.script = away
    client = Client(server.address)
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(client.chat, "Hi")
        assert server.ended.wait(timeout=5)
        client.close()
        with pytest.raises(RequestCancelledError):
            answer.result(timeout=5)


def test_closing_a_stream_while_it_begins_its_next_call_ends_that_call(server, client, monkeypatch):
    were_ended = []

    def lost_once(request, context):
        if len(server.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        is_ended = threading.Event()
        context.add_callback(is_ended.set)
        yield server.accepted(request)
        were_ended.append(is_ended.wait(timeout=20))

    server.script = lost_once
    stream = client.stream("Hi")
    begin_call = stream._start_call

    def close_and_begin_call(*arguments):
        stream.close()  # As another thread does at this very moment.
        return begin_call(*arguments)

    monkeypatch.setattr(stream, "_start_call", close_and_begin_call)
    with pytest.raises(RequestCancelledError, match="the stream was closed"):
        stream.completion()
    assert False not in were_ended


def test_closing_a_client_ends_the_wait_of_its_streams_for_the_next_call(server):
    def lost(request, context):
        yield server.accepted(request)
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=20))
        server.refuse(context, code_pb2.UNAVAILABLE, "away", retry)

    server.script = lost
    client = Client(server.address)
    stream = client.stream("Hi")
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(stream.completion)
        wait_until(lambda: stream.num_resumes == 1)
        client.close()
        with pytest.raises(RequestCancelledError, match="was closed"):
            answer.result(timeout=10)
