"""Whatever bytes a caller sends, it is answered: soon, with a reason, and nothing in the gateway breaks."""

import asyncio
import logging
import random

import grpc
import pytest
from gateway_harness import Gateway, RuleWorker, ask, details_of, rule_text
from google.protobuf.message import Message
from oasst.v1 import chat_pb2, model_pb2

CHAT, MODEL = "/oasst.v1.ChatService", "/oasst.v1.ModelService"
# RPC -> whether it streams, and a request that is mutated.
RPCS: dict[str, tuple[bool, Message]] = {
    f"{CHAT}/Chat": (False, ask("Hello!", max_new_tokens=2)),
    f"{CHAT}/ChatStream": (True, ask("Hello!", "Hi!", "How are you?", max_new_tokens=2, request_id="r-1")),
    f"{CHAT}/SubmitChat": (False, ask("Hello!", max_new_tokens=2)),
    f"{CHAT}/WatchChat": (True, chat_pb2.WatchChatRequest(request_id="r-1", resume_token="t", after=1)),
    f"{CHAT}/GetChat": (False, chat_pb2.GetChatRequest(request_id="r-1", resume_token="t")),
    f"{CHAT}/CancelChat": (False, chat_pb2.CancelChatRequest(request_id="r-1")),
    f"{MODEL}/Tokenize": (False, model_pb2.TokenizeRequest(texts=["Hello", "<|prompter|>"])),
    f"{MODEL}/Detokenize": (False, model_pb2.DetokenizeRequest(sequences=[model_pb2.TokenSequence(ids=[1, 2])])),
    f"{MODEL}/GetModel": (False, model_pb2.GetModelRequest(name="tiny")),
    f"{MODEL}/GetLoad": (False, model_pb2.GetLoadRequest()),
}
# What a caller's own fault may end in. UNKNOWN and INTERNAL are not among them.
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # By a timeout of the request's own.
    grpc.StatusCode.CANCELLED,  # By a request with the same id.
}
TIMEOUT_S = 10.0

_ODD_TEXTS = ["", "\0", "\ufeff", "<|prompter|>", "a" * 5000, "\n" * 3000, "𐍈", "日本語", "..", "r-1", "k50", "-1"]
_ODD_NUMBERS = [0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1, 4096]
_ODD_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")]


async def call(gateway: Gateway, rpc: str, data: bytes) -> grpc.StatusCode:
    """How the call with these very bytes ends."""
    is_stream, _ = RPCS[rpc]
    try:
        if is_stream:
            async for _ in gateway.channel.unary_stream(rpc)(data, timeout=TIMEOUT_S):
                pass
        else:
            await gateway.channel.unary_unary(rpc)(data, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            _ = details_of(error)  # Every refusal of ours carries its details.
        return error.code()
    return grpc.StatusCode.OK


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some flipped, cut out, put in or repeated."""
    mutated = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(mutated) + 1)
        match draw.randrange(4):
            case 0 if at < len(mutated):
                mutated[at] ^= 1 << draw.randrange(8)
            case 1:
                del mutated[at : at + draw.randint(1, 8)]
            case 2:
                mutated[at:at] = draw.randbytes(draw.randint(1, 8))
            case _:
                mutated[at:at] = mutated[at : at + 16] * draw.randint(1, 20)
    return bytes(mutated)


def fill_oddly(message: Message, draw: random.Random, depth: int = 0) -> None:
    """Sets fields of the message to values that nobody should send."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.5 or depth > 3:
            continue
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            for _ in range(draw.choice([1, 3, 400])):
                getattr(message, field.name)[draw.randrange(2**32)] = draw.choice(_ODD_FLOATS)
        elif field.message_type is not None:
            times = draw.choice([1, 2, 5]) if field.is_repeated else 1
            for _ in range(times):
                child = getattr(message, field.name)
                fill_oddly(child.add() if field.is_repeated else child, draw, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_odd_value(field, draw) for _ in range(draw.choice([1, 5, 100])))
        else:
            setattr(message, field.name, _odd_value(field, draw))


def _odd_value(field: object, draw: random.Random) -> object:
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            text = draw.choice(_ODD_TEXTS)
            return text.encode() if field.type == field.TYPE_BYTES else text
        case field.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case field.CPPTYPE_FLOAT | field.CPPTYPE_DOUBLE:
            return draw.choice(_ODD_FLOATS)
        case field.CPPTYPE_ENUM:
            return draw.choice([0, 1, 2, 3, 4, 77, -1])
    bounds = {
        field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        field.CPPTYPE_UINT32: (0, 2**32 - 1),
        field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT64: (0, 2**64 - 1),
    }
    low, high = bounds[field.cpp_type]
    return draw.choice([number for number in _ODD_NUMBERS if low <= number <= high])


@pytest.fixture(autouse=True)
def nothing_unforeseen(caplog: pytest.LogCaptureFixture):
    """No error was logged as a defect, and none escaped into gRPC or asyncio."""
    yield
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == []


async def still_answers(gateway: Gateway) -> None:
    response = await gateway.chat.Chat(ask("Hello!", max_new_tokens=2), timeout=TIMEOUT_S)
    assert response.choices[0].text == rule_text(2)
    in_flight = {rpc: gateway.sample("requests_in_flight", rpc=rpc.removeprefix("/oasst.v1.")) for rpc in RPCS}
    assert not any(in_flight.values()), in_flight


@pytest.mark.parametrize("seed", range(4))
async def test_random_and_mutated_bytes_are_answered_with_a_reason(
    gateway: Gateway, worker: RuleWorker, seed: int
) -> None:
    draw = random.Random(seed)
    inputs = []
    for rpc, (_, request) in RPCS.items():
        valid = request.SerializeToString()
        inputs += [(rpc, draw.randbytes(draw.randint(0, 200))) for _ in range(15)]
        inputs += [(rpc, mutate_bytes(valid, draw)) for _ in range(30)]
    for start in range(0, len(inputs), 50):
        batch = inputs[start : start + 50]
        codes = await asyncio.gather(*(call(gateway, rpc, data) for rpc, data in batch))
        assert set(codes) <= ALLOWED, [pair for pair in zip(codes, batch, strict=True) if pair[0] not in ALLOWED]
    await still_answers(gateway)


@pytest.mark.parametrize("seed", range(4))
async def test_well_formed_messages_of_odd_values_are_answered_with_a_reason(
    gateway: Gateway, worker: RuleWorker, seed: int
) -> None:
    draw = random.Random(seed)
    inputs = []
    for rpc, (_, valid) in RPCS.items():
        for _ in range(30):
            request = type(valid)()
            if draw.random() < 0.5:
                request.CopyFrom(valid)
            fill_oddly(request, draw)
            inputs.append((rpc, request.SerializeToString()))
    for start in range(0, len(inputs), 50):
        batch = inputs[start : start + 50]
        codes = await asyncio.gather(*(call(gateway, rpc, data) for rpc, data in batch))
        assert set(codes) <= ALLOWED, [pair for pair in zip(codes, batch, strict=True) if pair[0] not in ALLOWED]
    await still_answers(gateway)


async def test_text_that_is_not_utf8_is_an_invalid_argument_wherever_it_stands(gateway: Gateway) -> None:
    for rpc, (_, valid) in RPCS.items():
        data = valid.SerializeToString()
        strings = [text for text in _strings_of(valid) if text]
        for text in strings:
            broken = data.replace(text.encode(), b"\xff" * len(text.encode()))
            assert await call(gateway, rpc, broken) is grpc.StatusCode.INVALID_ARGUMENT, (rpc, text)


def _strings_of(message: Message) -> list[str]:
    found: list[str] = []
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        for each in values:
            if isinstance(each, str):
                found.append(each)
            elif isinstance(each, Message):
                found += _strings_of(each)
    return found


async def test_a_giant_request_is_refused_before_it_is_read(gateway: Gateway, worker: RuleWorker) -> None:
    for size, code in ((5_000_000, grpc.StatusCode.RESOURCE_EXHAUSTED), (3_000_000, grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.Chat(ask("x" * size), timeout=TIMEOUT_S)
        assert refused.value.code() is code
    await still_answers(gateway)


async def test_oversized_metadata_is_refused(gateway: Gateway, worker: RuleWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.Chat(ask("Hello!"), metadata=(("x", "y" * 100_000),), timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await still_answers(gateway)


async def test_an_rpc_that_is_not_there_says_so(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.channel.unary_unary(f"{CHAT}/Nothing")(b"", timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stream_of_requests_where_one_belongs_is_refused(gateway: Gateway, worker: RuleWorker) -> None:
    """The wrong order: two messages on a call that takes one."""
    data = ask("Hello!", max_new_tokens=2).SerializeToString()

    async def twice():
        yield data
        yield data

    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.channel.stream_unary(f"{CHAT}/GetChat")(twice(), timeout=TIMEOUT_S)
    await still_answers(gateway)


def test_every_rpc_of_the_api_is_tried() -> None:
    services = [
        chat_pb2.DESCRIPTOR.services_by_name["ChatService"],
        model_pb2.DESCRIPTOR.services_by_name["ModelService"],
    ]
    rpcs = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert rpcs - set(RPCS) == {f"{MODEL}/ListModels"}  # Its request has no field.
