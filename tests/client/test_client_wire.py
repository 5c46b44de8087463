"""What callers write becomes exactly the request they meant."""

import uuid

import pytest
from oasst.v1 import chat_pb2, generation_pb2
from oasst_client import Message, Role, Truncation, new_request_id
from oasst_client._types import ChatOptions
from oasst_client._wire import chat_request, state_from


def request_of(messages=None, *, prompt=None, token_ids=None, **options):
    return chat_request(messages, prompt, token_ids, options)


def test_a_string_is_one_user_message():
    assert request_of("Hi").conversation.messages == [chat_pb2.Message(role=chat_pb2.ROLE_USER, content="Hi")]


@pytest.mark.parametrize(
    "message", [Message(Role.USER, "Hi"), ("user", "Hi"), {"role": "user", "content": "Hi"}, Message("user", "Hi")]
)
def test_a_message_may_be_written_in_any_familiar_shape(message):
    assert request_of([message]).conversation == request_of("Hi").conversation


def test_an_empty_conversation_is_still_a_conversation_for_the_server_to_refuse():
    assert request_of([]).WhichOneof("input") == "conversation"


def test_a_raw_prompt_and_token_ids_stay_what_they_are():
    assert request_of(prompt="<|prompter|>Hi").prompt == "<|prompter|>Hi"
    assert list(request_of(token_ids=[0, 5]).token_ids.ids) == [0, 5]
    assert request_of(token_ids=[]).WhichOneof("input") == "token_ids"


@pytest.mark.parametrize("inputs", [{}, {"messages": "Hi", "prompt": "Hi"}, {"prompt": "Hi", "token_ids": [1]}])
def test_exactly_one_input_is_needed(inputs):
    with pytest.raises(TypeError, match="exactly one of"):
        request_of(**inputs)


def test_every_option_reaches_the_request():
    options = {
        "model": "tiny",
        "preset": "k50",
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {5: -100.0},
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.2,
        "seed": 0,
        "max_new_tokens": 10,
        "min_new_tokens": 0,
        "stop": ["\n"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "n": 2,
        "logprobs": 0,
        "truncation": Truncation.DROP_OLDEST_TURNS,
        "priority": "high",
        "detach_grace_s": 1.5,
        "timeout_s": 9.0,
        "request_id": "mine",
    }
    assert options.keys() == ChatOptions.__annotations__.keys()
    request = request_of("Hi", **options)

    expected = chat_pb2.ChatRequest(
        request_id="mine",
        model="tiny",
        conversation=request_of("Hi").conversation,
        sampling=generation_pb2.SamplingParams(
            preset="k50",
            repetition_penalty=1.1,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={5: -100.0},
            temperature=0.0,
            top_k=0,
            top_p=0.9,
            min_p=0.05,
            typical_p=0.2,
            seed=0,
        ),
        limits=generation_pb2.GenerationLimits(
            max_new_tokens=10, min_new_tokens=0, stop=["\n"], stop_token_ids=[3], ignore_eos=True
        ),
        n=2,
        logprobs=0,
        truncation=chat_pb2.TRUNCATION_DROP_OLDEST_TURNS,
        priority=chat_pb2.PRIORITY_HIGH,
    )
    expected.detach_grace.FromMilliseconds(1500)
    # The whole call's time is the RPC's own deadline, which the gateway reads from there.
    assert request == expected


def test_zero_is_a_value_and_none_is_not():
    sampling = request_of("Hi", temperature=0, top_k=None).sampling
    assert sampling.HasField("temperature")
    assert not sampling.HasField("top_k")


def test_one_stop_text_is_not_a_list_of_letters():
    assert list(request_of("Hi", stop="END").limits.stop) == ["END"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temprature": 1.0}, "unknown options: temprature"),
        ({"top_k": "many"}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"model": "\ud800"}, "model: .*surrogates"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids"),
        ({"priority": "urgent"}, "urgent"),
        ({"truncation": "middle"}, "middle"),
    ],
)
def test_a_value_no_request_can_carry_is_named(options, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        request_of("Hi", **options)


def test_a_lone_surrogate_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="surrogates"):
        request_of("\ud800")


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="narrator"):
        request_of([("narrator", "Hi")])


def test_a_state_of_a_newer_server_is_unknown():
    assert state_from(chat_pb2.CHAT_STATE_EXPIRED) == "expired"
    assert state_from(99) == "unknown"


def test_request_ids_are_uuids_that_sort_by_time(monkeypatch):
    ids = []
    for now_ms in (1_700_000_000_000, 1_700_000_000_001, 1_900_000_000_000):
        monkeypatch.setattr("time.time_ns", lambda now_ms=now_ms: now_ms * 1_000_000)
        ids.append(new_request_id())
    parsed = [uuid.UUID(each) for each in ids]
    assert ids == sorted(ids)
    assert {each.version for each in parsed} == {7}
    assert {each.variant for each in parsed} == {uuid.RFC_4122}
    assert [each.int >> 80 for each in parsed] == [1_700_000_000_000, 1_700_000_000_001, 1_900_000_000_000]
    assert new_request_id() != new_request_id()
