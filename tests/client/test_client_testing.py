"""The fake service behaves towards a client as the real one does."""

import asyncio

import grpc
import pytest
from oasst.v1 import chat_pb2, chat_pb2_grpc
from oasst_client import (
    AsyncClient,
    ChatState,
    Client,
    FieldViolation,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    RetryPolicy,
)
from oasst_client.testing import Answer, FakeServer


def ask(server, question="Hi", **options):
    with Client(server.address, api_key="key", retry=RetryPolicy(max_attempts=1)) as client:
        return client.chat(question, **options)


def test_chats_are_answered_in_turn_and_the_last_answer_stays():
    with FakeServer("one", "two") as server:
        assert [ask(server).text for _ in range(3)] == ["one", "two", "two"]
        assert server.metadata[0]["authorization"] == "Bearer key"


def test_an_answer_may_depend_on_the_request():
    with FakeServer(lambda request: request.conversation.messages[-1].content.upper()) as server:
        assert ask(server, "so so").text == "SO SO"
        assert ask(server, prompt=None, question=[("user", "a"), ("assistant", "b"), ("user", "c")]).text == "C"
        assert server.questions == ["so so", "c"]


def test_limits_choices_and_logprobs_of_a_request_are_kept():
    with FakeServer("one two three") as server:
        completion = ask(server, max_new_tokens=2, n=2, logprobs=2)
    assert [choice.text for choice in completion.choices] == ["one two", "one two"]
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.usage.completion_tokens, len(completion.logprobs[0].alternatives)) == (4, 2)


def test_an_error_refuses_with_all_it_tells():
    refusal = InvalidArgumentError(
        "one field is not as allowed",
        code="INVALID_ARGUMENT",
        reason="INVALID_FIELD",
        field_violations=(FieldViolation("n", "must be at least 1"),),
    )
    with FakeServer(refusal) as server, pytest.raises(InvalidArgumentError) as raised:
        ask(server)
    assert (raised.value.reason, raised.value.field_violations) == (refusal.reason, refusal.field_violations)
    full = OverloadedError("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after_s=1.5)
    with FakeServer(full) as server, pytest.raises(OverloadedError) as raised:
        ask(server)
    assert raised.value.retry_after_s == 1.5


def test_an_answer_may_break_in_the_middle():
    broken = Answer("one two", error=InternalError("the worker died", code="INTERNAL", reason="NUMERIC"))
    with FakeServer(broken) as server, Client(server.address) as client:
        with pytest.raises(InternalError, match="the worker died"), client.stream("Hi") as stream:
            list(stream)
        assert stream.text == "one two"


def test_a_chat_can_be_cancelled_from_elsewhere_and_its_reader_is_told():
    with FakeServer("one two three", token_interval_s=30) as server, Client(server.address) as client:
        with client.stream("Hi") as stream:
            next(stream.events())
            assert client.cancel(stream.request_id) == "cancelled"
            with pytest.raises(RequestCancelledError):
                list(stream.events())
        with pytest.raises(NotFoundError):
            client.cancel("unknown")


async def test_a_chat_is_read_on_after_a_read_that_timed_out():
    with FakeServer("one two", token_interval_s=0.1) as server:
        async with AsyncClient(server.address) as client, client.stream("Hi") as stream:
            events = stream.events()
            await anext(events)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(events)
            assert [text async for text in stream] == ["one", " two"]


def test_a_chat_whose_stream_is_closed_is_cancelled():
    with FakeServer("one two", token_interval_s=30) as server, Client(server.address) as client:
        with client.stream("Hi") as stream:
            accepted = next(stream.events())
        assert client.get(accepted.request_id, accepted.resume_token).state is ChatState.CANCELLED


def test_a_chat_is_not_cancelled_by_who_has_a_token_of_another():
    with FakeServer("one two", token_interval_s=30) as server, Client(server.address) as client:
        accepted = client.submit("Hi")
        with pytest.raises(NotFoundError):
            client.cancel(accepted.request_id, resume_token="stolen")
        assert client.get(accepted.request_id, accepted.resume_token).state is ChatState.RUNNING
        assert client.cancel(accepted.request_id, resume_token=accepted.resume_token) is ChatState.CANCELLED


def test_a_chat_that_was_submitted_can_be_watched_and_read_by_who_has_its_token():
    with FakeServer("one two three") as server, Client(server.address) as client:
        accepted = client.submit("Hi")
        with client.watch(accepted.request_id, accepted.resume_token) as stream:
            assert stream.completion().text == "one two three"
        snapshot = client.get(accepted.request_id, accepted.resume_token)
        assert snapshot.state is ChatState.FINISHED
        with pytest.raises(NotFoundError):
            client.get(accepted.request_id, "stolen")


def test_a_chat_can_be_watched_from_any_token():
    with FakeServer("one two three") as server, grpc.insecure_channel(server.address) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        accepted = stub.SubmitChat(chat_pb2.ChatRequest(prompt="<|prompter|>Hi<|endoftext|><|assistant|>")).accepted
        request = chat_pb2.WatchChatRequest(request_id=accepted.request_id, resume_token=accepted.resume_token, after=1)
        watched = list(stub.WatchChat(request))
        assert [event.delta.text for event in watched if event.HasField("delta")] == [" two", " three"]
        assert watched[-1].HasField("finished")


def test_tokens_are_words_and_control_tokens_only_where_they_are_asked_for():
    with FakeServer() as server, Client(server.address) as client:
        text = "Hi  there<|endoftext|> \n"
        (plain,), (parsed,) = client.tokenize(text), client.tokenize(text, parse_control_tokens=True)
        end_of_text = client.model().control_tokens.end_of_text
        assert client.detokenize(plain, parsed) == (text, text)
        assert (end_of_text in plain, end_of_text in parsed) == (False, True)
        assert client.detokenize(parsed, skip_control_tokens=True) == ("Hi  there \n",)
        assert {preset.name for preset in client.model().presets} >= {"k50", "nucleus9"}
