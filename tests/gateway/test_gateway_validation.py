"""What the API refuses: pure checks first, then the same through a real server."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from gateway_harness import Gateway, RuleWorker, ask, details_of
from google.protobuf.duration_pb2 import Duration
from oasst.v1 import chat_pb2, generation_pb2, model_pb2
from oasst_gateway.authentication import DEFAULT_TENANT
from oasst_gateway.errors import InvalidRequestError
from oasst_gateway.model import ServedModel
from oasst_gateway.preparation import PreparedJob, prepare_chat
from oasst_gateway.validation import check_detokenize, check_tokenize, duration_ms
from oasst_jobs import QueueClient

Prepare = Callable[[chat_pb2.ChatRequest], PreparedJob]

PROMPTER, ASSISTANT, SYSTEM = chat_pb2.ROLE_PROMPTER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_SYSTEM


@pytest.fixture
def prepare(model: ServedModel) -> Prepare:
    return lambda request: prepare_chat(request, model, tenant=DEFAULT_TENANT, request_id=request.request_id or "r-1")


def talk(*messages: tuple[int, str]) -> chat_pb2.ChatRequest:
    conversation = chat_pb2.Conversation(
        messages=[chat_pb2.Message(role=role, content=content) for role, content in messages]
    )
    return chat_pb2.ChatRequest(conversation=conversation)


def sampling(**values: Any) -> chat_pb2.ChatRequest:
    return ask("Hello!", sampling=generation_pb2.SamplingParams(**values))


def limited(**values: Any) -> chat_pb2.ChatRequest:
    request = ask("Hello!")
    request.limits.CopyFrom(generation_pb2.GenerationLimits(**values))
    return request


def violations_of(prepare: Prepare, request: chat_pb2.ChatRequest) -> dict[str, str]:
    with pytest.raises(InvalidRequestError) as refused:
        prepare(request)
    return {violation.field: violation.description for violation in refused.value.violations}


BAD_FIELDS = [
    ("request_id", ask("Hello!", request_id="no spaces"), "request_id", "1 to 64 characters"),
    ("long request_id", ask("Hello!", request_id="r" * 65), "request_id", "1 to 64 characters"),
    ("unknown model", ask("Hello!", model="gpt-5"), "model", "tiny"),
    ("no input", chat_pb2.ChatRequest(), "input", "one of conversation, prompt and token_ids"),
    ("no messages", talk(), "conversation.messages", "at least one"),
    ("too many messages", talk(*[(PROMPTER, "a")] * 257), "conversation.messages", "at most 256 messages, has 257"),
    ("no role", talk((0, "Hello!")), "conversation.messages[0].role", "prompter (or user), assistant or system"),
    ("unknown role", talk((9, "Hello!")), "conversation.messages[0].role", "prompter (or user), assistant or system"),
    ("assistant first", talk((ASSISTANT, "Hi")), "conversation.messages[0].role", "alternate"),
    ("prompter twice", talk((PROMPTER, "a"), (PROMPTER, "b")), "conversation.messages[1].role", "alternate"),
    ("assistant last", talk((PROMPTER, "a"), (ASSISTANT, "b")), "conversation.messages[1].role", "alternate"),
    ("late system", talk((PROMPTER, "a"), (SYSTEM, "b")), "conversation.messages[1].role", "only the first"),
    ("only system", talk((SYSTEM, "Be nice.")), "conversation.messages", "alternate"),
    ("wrong after system", talk((SYSTEM, "a"), (ASSISTANT, "b")), "conversation.messages[1].role", "alternate"),
    ("empty content", talk((PROMPTER, "")), "conversation.messages[0].content", "not be empty"),
    ("empty system", talk((SYSTEM, ""), (PROMPTER, "a")), "conversation.messages[0].content", "not be empty"),
    ("empty prompt", chat_pb2.ChatRequest(prompt=""), "prompt", "not be empty"),
    ("hopeless prompt", chat_pb2.ChatRequest(prompt="a" * 1_000_000), "prompt", "has 1000000 characters: at most 4080"),
    ("hopeless message", ask("a" * 1_000_000), "conversation", "has 1000000 characters: at most 4080"),
    ("no ids", chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds()), "token_ids.ids", "not be empty"),
    ("padding id", chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=[1, 5000])), "token_ids.ids[1]", "below 3"),
    ("unknown preset", sampling(preset="k51"), "sampling.preset", "k50-Creative"),
    ("negative temperature", sampling(temperature=-0.1), "sampling.temperature", "at least 0 and at most 100"),
    ("hot temperature", sampling(temperature=100.5), "sampling.temperature", "at least 0 and at most 100"),
    ("temperature of NaN", sampling(temperature=float("nan")), "sampling.temperature", "at least 0"),
    ("infinite temperature", sampling(temperature=float("inf")), "sampling.temperature", "at most 100"),
    ("top_p of 1.5", sampling(top_p=1.5), "sampling.top_p", "above 0 and at most 1"),
    ("top_p of 0", sampling(top_p=0.0), "sampling.top_p", "above 0 and at most 1"),
    ("typical_p of 0", sampling(typical_p=0.0), "sampling.typical_p", "above 0 and at most 1"),
    ("negative min_p", sampling(min_p=-1), "sampling.min_p", "at least 0 and at most 1"),
    ("negative top_k", sampling(top_k=-1), "sampling.top_k", "at least 0"),
    ("repetition_penalty of 0", sampling(repetition_penalty=0), "sampling.repetition_penalty", "above 0"),
    ("presence_penalty", sampling(presence_penalty=2.1), "sampling.presence_penalty", "at least -2 and at most 2"),
    ("frequency_penalty", sampling(frequency_penalty=-2.1), "sampling.frequency_penalty", "at least -2"),
    ("strong bias", sampling(logit_bias={7: 101.0}), "sampling.logit_bias[7]", "at least -100 and at most 100"),
    ("biased padding", sampling(logit_bias={5000: 1.0}), "sampling.logit_bias[5000]", "below"),
    ("many biases", sampling(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias", "at most 300"),
    ("negative max_new_tokens", limited(max_new_tokens=-1), "limits.max_new_tokens", "at least 1 and at most 255"),
    ("max_new_tokens of 0", limited(max_new_tokens=0), "limits.max_new_tokens", "at least 1 and at most 255"),
    ("huge max_new_tokens", limited(max_new_tokens=256), "limits.max_new_tokens", "at least 1 and at most 255"),
    ("negative min_new_tokens", limited(min_new_tokens=-1), "limits.min_new_tokens", "from 0 to max_new_tokens"),
    ("min above max", limited(min_new_tokens=3, max_new_tokens=2), "limits.min_new_tokens", "from 0 to"),
    ("min above what fits", limited(min_new_tokens=255), "limits.min_new_tokens", "can be generated"),
    ("a thousand stops", limited(stop=["a"] * 1000), "limits.stop", "at most 4 texts, has 1000"),
    ("empty stop", limited(stop=["a", ""]), "limits.stop[1]", "1 to 64 characters"),
    ("long stop", limited(stop=["a", "b", "c", "d" * 65]), "limits.stop[3]", "1 to 64 characters"),
    ("many stop ids", limited(stop_token_ids=[1] * 17), "limits.stop_token_ids", "at most 16"),
    ("padding as stop", limited(stop_token_ids=[1, 5000]), "limits.stop_token_ids[1]", "below"),
    ("n of 0", ask("Hello!", n=0), "n", "at least 1 and at most 4"),
    ("n of 5", ask("Hello!", n=5), "n", "at least 1 and at most 4"),
    ("negative logprobs", ask("Hello!", logprobs=-1), "logprobs", "at least 0 and at most 20"),
    ("21 logprobs", ask("Hello!", logprobs=21), "logprobs", "at least 0 and at most 20"),
    ("unknown truncation", ask("Hello!", truncation=7), "truncation", "Truncation"),
    ("unknown priority", ask("Hello!", priority=7), "priority", "Priority"),
    ("negative grace", ask("Hello!", detach_grace=Duration(seconds=-1)), "detach_grace", "from 0 to 3600"),
    ("timeout of 0", ask("Hello!", timeout=Duration()), "timeout", "above 0"),
    ("negative timeout", ask("Hello!", timeout=Duration(nanos=-1)), "timeout", "above 0"),
    ("endless timeout", ask("Hello!", timeout=Duration(seconds=10**9)), "timeout", "at most 604800"),
]


@pytest.mark.parametrize(
    ("request_", "field", "allowed"), [row[1:] for row in BAD_FIELDS], ids=[r[0] for r in BAD_FIELDS]
)
def test_a_bad_field_is_named_with_what_is_allowed(
    prepare: Prepare, request_: chat_pb2.ChatRequest, field: str, allowed: str
) -> None:
    violations = violations_of(prepare, request_)
    assert list(violations) == [field]
    assert allowed in violations[field]


def test_all_violations_are_told_at_once(prepare: Prepare) -> None:
    request = ask("Hello!", request_id="?", model="other", n=9, logprobs=99)
    request.sampling.top_p = 2
    request.limits.stop.append("")
    assert list(violations_of(prepare, request)) == [
        *("request_id", "model", "sampling.top_p", "limits.stop[0]", "n", "logprobs"),
    ]


def test_so_many_violations_are_told_that_they_fit_into_metadata(prepare: Prepare) -> None:
    violations = violations_of(prepare, sampling(logit_bias=dict.fromkeys(range(300), 500.0)))
    assert len(violations) == 17
    assert violations["request"] == "284 more fields are not as allowed"


def test_a_violation_never_repeats_the_callers_text(prepare: Prepare) -> None:
    request = ask("Hello!", request_id="secret!", model="secret")
    request.sampling.preset = "secret"
    assert "secret" not in str(violations_of(prepare, request))


GOOD_REQUESTS = [
    ("bounds of sampling", sampling(temperature=0, top_k=0, top_p=1, min_p=0, typical_p=1, repetition_penalty=0.01)),
    ("other bounds of sampling", sampling(temperature=100, presence_penalty=-2, frequency_penalty=2, min_p=1)),
    ("bounds of limits", limited(min_new_tokens=0, max_new_tokens=1, stop=["s" * 64] * 4, stop_token_ids=[0] * 16)),
    ("most alternatives", ask("Hello!", n=4, logprobs=20)),
    ("user is prompter", talk((chat_pb2.ROLE_USER, "a"), (ASSISTANT, "b"), (PROMPTER, "c"))),
    ("system first", talk((SYSTEM, "Be nice."), (PROMPTER, "a"))),
    ("an answer of nothing", talk((PROMPTER, "a"), (ASSISTANT, ""), (PROMPTER, "b"))),
    ("any character", ask("a\x00b\u2028 \U0001f44d\ufffd\n\n")),
    ("longest id", ask("Hello!", request_id="aZ09_-" * 10 + "abcd")),
]


@pytest.mark.parametrize("request_", [row[1] for row in GOOD_REQUESTS], ids=[row[0] for row in GOOD_REQUESTS])
def test_what_the_api_allows_passes(prepare: Prepare, request_: chat_pb2.ChatRequest) -> None:
    assert prepare(request_).job.prompt_token_ids


def test_a_positive_duration_never_becomes_none() -> None:
    assert duration_ms(Duration(nanos=1)) == 1
    assert duration_ms(Duration(seconds=2, nanos=1_000_000)) == 2001


async def refusal_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return details_of(refused.value)


async def test_bad_input_is_refused_before_any_queue(gateway: Gateway, queue: QueueClient) -> None:
    refusals = [
        (ask("Hello!", model="gpt-5"), "model"),
        (talk(), "conversation.messages"),
        (talk((ASSISTANT, "Hi")), "conversation.messages[0].role"),
        (sampling(temperature=-1), "sampling.temperature"),
        (sampling(top_p=1.5), "sampling.top_p"),
        (ask("a" * 3_000_000), "conversation"),
        (chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=[5] * 2049)), "token_ids"),
        (limited(max_new_tokens=-1), "limits.max_new_tokens"),
        (limited(stop=["a"] * 1000), "limits.stop"),
    ]
    for request, field in refusals:
        details = await refusal_of(gateway.chat.Chat(request))
        assert details.code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.domain == "oasst.v1"
        assert details.reason == ("PROMPT_TOO_LONG" if field in ("conversation", "token_ids") else "INVALID_FIELD")
        assert list(details.violations) == [field]
        assert details.retry_after_s is None
    assert (await queue.load("tiny")).waiting_jobs == 0


async def test_a_request_of_ten_megabytes_is_not_even_read(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.Chat(ask("a" * 10_000_000))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_invalid_utf8_is_refused_with_the_name_of_its_field(gateway: Gateway) -> None:
    request = talk((PROMPTER, "a"), (ASSISTANT, "Hello"), (PROMPTER, "b"))
    request.request_id = "my-id"
    request.limits.stop.extend(["a", "stop!"])
    fields = {b"Hello": "conversation.messages[1].content", b"my-id": "request_id", b"stop!": "limits.stop[1]"}
    for text, field in fields.items():
        data = request.SerializeToString().replace(text, b"\xff" * len(text))
        details = await refusal_of(gateway.channel.unary_unary("/oasst.v1.ChatService/Chat")(data))
        assert (details.code, details.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_UTF8")
        assert details.violations == {field: "must be UTF-8"}


async def test_bytes_that_are_no_message_are_refused(gateway: Gateway) -> None:
    details = await refusal_of(gateway.channel.unary_unary("/oasst.v1.ChatService/Chat")(b"\xff\xff\xff"))
    assert (details.code, details.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED")
    assert details.violations == {"request": "must be a message of type oasst.v1.ChatRequest, its texts in UTF-8"}


async def test_refusals_are_counted_by_reason(gateway: Gateway, worker: RuleWorker) -> None:
    await refusal_of(gateway.chat.Chat(sampling(top_p=1.5)))
    assert gateway.sample("invalid_requests_total", reason="INVALID_FIELD") == 1
    assert gateway.sample("requests_total", rpc="ChatService/Chat", code="INVALID_ARGUMENT") == 1


def test_what_is_in_a_batch_of_too_many_is_not_looked_at(model: ServedModel) -> None:
    padding = model.limits.tokenizer_size
    texts = model_pb2.TokenizeRequest(texts=["a" * 5_000] * 257)
    sequences = model_pb2.DetokenizeRequest(sequences=[model_pb2.TokenSequence(ids=[padding] * 5_000)] * 257)
    with pytest.raises(InvalidRequestError) as too_many_texts:
        check_tokenize(texts, model_name="tiny")
    with pytest.raises(InvalidRequestError) as too_many_sequences:
        check_detokenize(sequences, model_name="tiny", limits=model.limits)
    told = [*too_many_texts.value.violations, *too_many_sequences.value.violations]
    assert [(each.field, each.description) for each in told] == [
        ("texts", "must have at most 256 entries, has 257"),
        ("sequences", "must have at most 256 entries, has 257"),
    ]


async def test_other_rpcs_check_their_fields_as_well(gateway: Gateway, model: ServedModel) -> None:
    padding = model.limits.tokenizer_size
    refusals = [
        (gateway.model.GetModel(model_pb2.GetModelRequest(name="x")), "name"),
        (gateway.model.GetLoad(model_pb2.GetLoadRequest(model="x")), "model"),
        (gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=["a"] * 257)), "texts"),
        (gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=["a" * 1_000_001])), "texts"),
        (
            gateway.model.Detokenize(
                model_pb2.DetokenizeRequest(sequences=[model_pb2.TokenSequence(ids=[1, padding])])
            ),
            "sequences[0].ids[1]",
        ),
        (
            gateway.model.Detokenize(
                model_pb2.DetokenizeRequest(sequences=[model_pb2.TokenSequence(ids=[1] * 500_001)] * 2)
            ),
            "sequences",
        ),
        (gateway.chat.CancelChat(chat_pb2.CancelChatRequest()), "request_id"),
    ]
    for call, field in refusals:
        details = await refusal_of(call)
        assert (details.code, list(details.violations)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
