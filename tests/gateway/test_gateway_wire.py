"""Which field keeps a request from being parsed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oasst.v1 import chat_pb2, generation_pb2
from oasst_gateway.wire import find_invalid_text

DESCRIPTOR = chat_pb2.ChatRequest.DESCRIPTOR


def request_bytes() -> bytes:
    messages = [chat_pb2.Message(role=chat_pb2.ROLE_USER, content=text) for text in ("first", "second")]
    return chat_pb2.ChatRequest(
        request_id="my-id",
        conversation=chat_pb2.Conversation(messages=messages),
        sampling=generation_pb2.SamplingParams(preset="preset", temperature=0.5, logit_bias={7: 1.5}),
        limits=generation_pb2.GenerationLimits(stop=["stop0", "stop1"], stop_token_ids=[1, 300]),
    ).SerializeToString()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b"my-id", "request_id"),
        (b"second", "conversation.messages[1].content"),
        (b"preset", "sampling.preset"),
        (b"stop1", "limits.stop[1]"),
    ],
)
def test_the_field_is_found_by_its_path(text: bytes, field: str) -> None:
    assert find_invalid_text(request_bytes().replace(text, b"\xc3" + b"\x28" * (len(text) - 1)), DESCRIPTOR) == field


def test_a_good_message_has_no_such_field() -> None:
    assert find_invalid_text(request_bytes(), DESCRIPTOR) is None


def test_fields_of_a_newer_api_are_passed_over() -> None:
    unknown = b"\xa2\x06\x02\xff\xff" + b"\xad\x06\x00\x00\x00\x00" + b"\xb1\x06" + b"\x00" * 8 + b"\xb8\x06\x01"
    assert find_invalid_text(unknown + request_bytes().replace(b"my-id", b"\xff" * 5), DESCRIPTOR) == "request_id"


@pytest.mark.parametrize(("num_fields", "field"), [(9_000, "request_id"), (1_000_000, None)])
def test_no_more_than_ten_thousand_fields_are_looked_at(num_fields: int, field: str | None) -> None:
    """A message of a million fields would hold up every stream for seconds."""
    unknown = b"\xb8\x06\x01" * num_fields
    data = unknown + request_bytes().replace(b"my-id", b"\xff" * 5)
    assert find_invalid_text(data, DESCRIPTOR) == field


def test_fields_of_fields_count_as_well() -> None:
    message = chat_pb2.Conversation(messages=[chat_pb2.Message()] * 20_000)
    data = chat_pb2.ChatRequest(conversation=message).SerializeToString() + b"\x0a\x01\xff"
    assert find_invalid_text(data, DESCRIPTOR) is None


@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_it_fail(data: bytes) -> None:
    find_invalid_text(data, DESCRIPTOR)


@given(st.integers(min_value=0, max_value=len(request_bytes())))
def test_a_message_cut_off_anywhere_does_not_make_it_fail(length: int) -> None:
    find_invalid_text(request_bytes()[:length], DESCRIPTOR)
