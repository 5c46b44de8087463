"""Items of any number are scored in order, in requests that a server takes."""

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2
from oasst_client import (
    AsyncClient,
    Client,
    InvalidArgumentError,
    ItemScore,
    RequestCancelledError,
    ScoreItem,
    UnavailableError,
)
from oasst_client.testing import FakeServer
from waiting import wait_until

RETRY_IN_20_S = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=20))


def items_of(*lengths: int) -> list[ScoreItem]:
    """Items with a context of one token and continuations of these lengths."""
    return [ScoreItem([1] * (1 + length), 1) for length in lengths]


def score(server, items, **options) -> tuple[ItemScore, ...]:
    """The scores, which the async client gives as well."""

    async def score_async():
        async with AsyncClient(server.address) as client:
            return await client.score(items, **options)

    with Client(server.address) as client:
        scores = client.score(items, **options)
    assert asyncio.run(score_async()) == scores
    return scores


def test_scores_come_in_the_order_of_the_items(server):
    scores = score(server, items_of(3, 1, 2))
    assert [each.logprob for each in scores] == pytest.approx([-0.6, -0.2, -0.4])
    assert all(each.token_logprobs == () for each in scores)


def test_no_items_are_no_request(server):
    assert score(server, []) == ()
    assert server.score_requests == []


def test_the_logprobs_of_tokens_come_where_they_are_asked_for(server):
    (scored,) = score(server, items_of(2), token_logprobs=True)
    assert scored.token_logprobs == pytest.approx((-0.2, -0.2))


def test_many_items_are_several_requests_with_an_id_each(server):
    scores = score(server, items_of(*range(1, 201)))
    assert [each.logprob for each in scores] == pytest.approx([-0.2 * length for length in range(1, 201)])
    sizes = sorted(len(request.items) for request in server.score_requests)
    assert sizes == [8, 8, 64, 64, 64, 64, 64, 64]
    assert len({request.request_id for request in server.score_requests}) == 8


def test_requests_of_long_items_hold_fewer(server):
    score(server, items_of(*[2048] * 20))
    num_tokens = [sum(len(item.token_ids) for item in request.items) for request in server.score_requests]
    assert max(num_tokens) <= 32_768
    assert min(num_tokens) == 5 * 2049  # 15 items and 5 of them.


def test_texts_are_tokenized_by_the_server_with_the_space_in_the_continuation(server):
    scores = score(server, [("ab ", "c"), ScoreItem([1, 2], 1), ("", "xy"), ("ab", " c")])
    items = server.score_requests[0].items
    assert [(bytes(item.token_ids), item.context_length) for item in items] == [
        (b"ab c", 2),
        (b"\x01\x02", 1),
        (b"\x00xy", 1),
        (b"ab c", 2),
    ]
    assert [each.logprob for each in scores] == pytest.approx([-0.4, -0.2, -0.4, -0.4])


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (("only",), TypeError, r"items\[1\]: give a ScoreItem or the texts"),
        ("ab", TypeError, r"items\[1\]: give a ScoreItem or the texts"),
        (("context", ""), ValueError, r"items\[1\]: the continuation is empty"),
        (ScoreItem([1], 1), ValueError, r"items\[1\]: context_length must be at least 1 and less than all its 1 ids"),
        (ScoreItem([1, 2], 0), ValueError, r"items\[1\]: context_length .* 2 ids, is 0"),
    ],
)
def test_what_is_no_item_is_told_before_anything_is_sent(server, item, error, message):
    with Client(server.address) as client, pytest.raises(error, match=message):
        client.score([("a", "b"), item])
    assert server.score_requests == []


def test_a_continuation_that_ends_inside_of_the_last_token_of_its_context_is_told():
    with FakeServer() as server, Client(server.address) as client:
        with pytest.raises(ValueError, match=r"items\[1\]: the continuation has no token of its own, \('me', 'me'\)"):
            client.score([("a", " b"), ("me", "me")])
        assert server.score_requests == []


def test_a_server_that_is_away_is_asked_again_with_the_same_id(server):
    def be_away_once(request, context: grpc.ServicerContext):
        if len(server.score_requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    server.on_score = be_away_once
    with Client(server.address) as client:
        assert len(client.score(items_of(1))) == 1
    first, second = server.score_requests
    assert first == second


def test_a_refusal_names_the_item_by_its_place_among_all(server):
    def refuse(request, context: grpc.ServicerContext):
        if 9 in request.items[-1].token_ids:
            field, wrong = f"items[{len(request.items) - 1}].token_ids", "must be less than 9"
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=wrong)
            bad_request = error_details_pb2.BadRequest(field_violations=[violation])
            server.refuse(context, code_pb2.INVALID_ARGUMENT, f"{field}: {wrong}", bad_request)

    server.on_score = refuse
    items = [*items_of(*[1] * 70), ScoreItem([1, 9], 1)]
    with Client(server.address) as client, pytest.raises(InvalidArgumentError) as raised:
        client.score(items)
    assert str(raised.value) == "items[70].token_ids: must be less than 9 (INVALID_ARGUMENT)"
    assert raised.value.field_violations[0].field == "items[70].token_ids"

    async def score_async():
        async with AsyncClient(server.address) as client:
            await client.score(items)

    with pytest.raises(InvalidArgumentError, match=r"items\[70\]"):
        asyncio.run(score_async())


def test_a_refusal_names_the_field_and_ends_the_other_requests(server):
    def refuse(request, context: grpc.ServicerContext):
        violation = error_details_pb2.BadRequest.FieldViolation(field="items[0].context_length", description="is 0")
        bad_request = error_details_pb2.BadRequest(field_violations=[violation])
        server.refuse(context, code_pb2.INVALID_ARGUMENT, "one field is not as allowed", bad_request)

    server.on_score = refuse
    with Client(server.address) as client, pytest.raises(InvalidArgumentError) as raised:
        client.score(items_of(*[1] * 64 * 20))
    assert raised.value.field_violations[0].field.endswith("].context_length")
    assert len(server.score_requests) < 20


def test_a_refusal_ends_the_wait_for_the_next_attempt_of_the_other_requests(server):
    """Neither for as long as the server wants to be left alone, nor are they scored after it."""
    is_another_away = threading.Event()

    def refuse_the_last(request, context: grpc.ServicerContext):
        if len(request.items) == 1:
            is_another_away.wait(10)
            server.refuse(context, code_pb2.INVALID_ARGUMENT, "not as allowed")
        is_another_away.set()
        server.refuse(context, code_pb2.UNAVAILABLE, "away", RETRY_IN_20_S)

    server.on_score = refuse_the_last
    with Client(server.address) as client:
        begun_s = time.monotonic()
        with pytest.raises(InvalidArgumentError):
            client.score(items_of(*[1] * 65))
        assert time.monotonic() - begun_s < 10
    assert len(server.score_requests) == 2


def test_closing_a_client_ends_the_wait_for_the_next_attempt_of_its_scores(server):
    is_away = threading.Event()

    def be_away(request, context: grpc.ServicerContext):
        is_away.set()
        server.refuse(context, code_pb2.UNAVAILABLE, "away", RETRY_IN_20_S)

    server.on_score = be_away
    client = Client(server.address)
    with ThreadPoolExecutor(max_workers=1) as pool:
        scores = pool.submit(client.score, items_of(1))
        assert is_away.wait(10)
        client.close()
        with pytest.raises(RequestCancelledError):
            scores.result(timeout=10)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_deadline_is_for_tokenizing_as_well(server, is_async):
    given_s = []
    server.on_tokenize = lambda context: given_s.append(context.time_remaining())
    pairs = [("", str(number)) for number in range(300)]

    async def score_async():
        async with AsyncClient(server.address) as client:
            await client.score(pairs, timeout_s=3)

    if is_async:
        asyncio.run(score_async())
    else:
        with Client(server.address) as client:
            client.score(pairs, timeout_s=3)
    assert len(given_s) == 2
    assert max(given_s) <= 3


def test_endless_is_no_deadline(server):
    given_s = []
    server.on_score = lambda request, context: given_s.append(context.time_remaining())
    score(server, items_of(1), timeout_s=math.inf)
    assert min(given_s) > 1e9


def test_a_deadline_is_for_all_requests_together(server):
    given = []
    server.on_score = lambda request, context: given.append(context.time_remaining())
    with Client(server.address) as client:
        client.score(items_of(*[1] * 640), timeout_s=30)
    assert len(given) == 10
    assert max(given) <= 30


def test_a_refusal_ends_the_calls_of_the_other_requests_and_tells_the_server(server):
    held_to_their_end = []

    def refuse_the_last(request, context: grpc.ServicerContext):
        if len(request.items) == 1:
            wait_until(lambda: len(server.score_requests) == 3)
            server.refuse(context, code_pb2.INVALID_ARGUMENT, "not as allowed")
        is_left = threading.Event()
        context.add_callback(is_left.set)
        held_to_their_end.append(not is_left.wait(20))

    server.on_score = refuse_the_last
    with Client(server.address) as client, pytest.raises(InvalidArgumentError):
        client.score(items_of(*[1] * 129))
    wait_until(lambda: held_to_their_end == [False, False])
    assert sorted(server.cancelled) == sorted(each.request_id for each in server.score_requests if len(each.items) > 1)


async def test_whoever_is_cancelled_cancels_at_the_server(server):
    has_begun, may_end = threading.Event(), threading.Event()

    def hold(request, context):
        has_begun.set()
        may_end.wait(10)

    server.on_score = hold
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(client.score(items_of(1)))
        await asyncio.to_thread(has_begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    may_end.set()
    assert server.cancelled == [server.score_requests[0].request_id]


def test_an_error_of_a_fake_score_refuses_the_request():
    def refuse(item: ScoreItem) -> ItemScore:
        raise RequestCancelledError("cancelled", code="CANCELLED", reason="CANCELLED")

    with FakeServer(score=refuse) as server, Client(server.address) as client:
        with pytest.raises(RequestCancelledError):
            client.score(items_of(1))
        assert len(server.score_requests) == 1


def test_a_server_that_is_never_there_is_told_as_such(server):
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.score(items_of(1), timeout_s=0.5)


def test_a_fake_server_keeps_what_it_was_asked():
    with FakeServer() as server, Client(server.address) as client:
        scores = client.score(items_of(1, 2), token_logprobs=True)
    assert scores == (ItemScore(-1.0, False, (-1.0,)), ItemScore(-2.0, False, (-1.0, -1.0)))
    assert list(chain.from_iterable(list(item.token_ids) for item in server.score_requests[0].items)) == [1] * 5


def test_progress_is_told_as_requests_are_answered(server):
    sync_progress: list[int] = []
    with Client(server.address) as client:
        client.score(items_of(*[1] * 150), on_progress=sync_progress.append)
    assert (len(sync_progress), sync_progress[-1]) == (3, 150)

    async def score_async() -> list[int]:
        progress: list[int] = []
        async with AsyncClient(server.address) as client:
            await client.score(items_of(*[1] * 150), on_progress=progress.append)
        return progress

    async_progress = asyncio.run(score_async())
    assert (len(async_progress), async_progress[-1]) == (3, 150)
