"""What is to be scored, through a real gateway and a real queue."""

import asyncio
from collections.abc import Sequence

import grpc
import pytest
from gateway_harness import Gateway, RuleWorker, ask, details_of, read_text, rule_text, start_gateway
from google.rpc import code_pb2
from job_samples import finished, make_scores
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, scoring_pb2
from oasst_gateway.model import ServedModel
from oasst_gateway.scores import read_scores
from oasst_jobs import JobState, LogSnapshot, PushStatus, QueueClient, Subscription
from waiting import until

Item = tuple[Sequence[int], int]

MAX_POSITIONS = 256  # Of the fixtures' model.


def score(*items: Item, **fields: object) -> scoring_pb2.ScoreRequest:
    protos = [scoring_pb2.ScoreItem(token_ids=ids, context_length=length) for ids, length in items]
    return scoring_pb2.ScoreRequest(items=protos, **fields)


THREE = score(([1, 2], 1), ([1, 3], 1), ([1, 2, 3], 2), request_id="three")


async def test_every_item_has_its_score_in_order(gateway: Gateway, worker: RuleWorker) -> None:
    response = await gateway.scoring.Score(THREE)
    assert [each.logprob for each in response.scores] == [0, -1, -2]
    job = worker.claimed[0].job
    assert job.priority == chat_pb2.PRIORITY_BULK
    assert [list(item.token_ids) for item in job.score_items] == [[1, 2], [1, 3], [1, 2, 3]]
    assert gateway.sample("scored_items_total") == 3


async def test_scores_of_a_request_that_fails_are_not_counted(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    scoring = asyncio.ensure_future(gateway.scoring.Score(THREE))
    await until(lambda: len(worker.claimed) == 1)
    worker.allow(1)
    worker.failure = chat_pb2.Failed(code=code_pb2.INTERNAL, reason="BROKEN", message="broken")
    worker.allow(1)
    with pytest.raises(grpc.aio.AioRpcError):
        await scoring
    assert gateway.sample("scored_items_total") == 0


async def test_items_that_were_scored_again_are_told_once() -> None:
    """The queue lost an item after it was read here; its worker scored it once more, with others in one entry."""
    subscription = Subscription("job", after=0, now_s=0.0, catch_up=lambda _: None)
    subscription.update(job_pb2.JobUpdate(job_id="job", entry=make_scores(0, 2)), 0.0)
    log = LogSnapshot(
        state=JobState.FINISHED,
        end_position=4,
        outcome=finished(0),
        entries=[make_scores(1, 4)],
    )
    subscription.catch_up(2, log, 0.0)
    scores, outcome = await read_scores(subscription)
    assert [each.logprob for each in scores] == [0, -1, -2, -3]
    assert outcome == finished(0)


async def test_the_same_request_again_costs_nothing(gateway: Gateway, worker: RuleWorker) -> None:
    first, second = await gateway.scoring.Score(THREE), await gateway.scoring.Score(THREE)
    assert first == second
    assert len(worker.claimed) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.scoring.Score(score(([1, 2], 1), request_id="three"))
    assert details_of(refused.value).reason == "REQUEST_ID_CONFLICT"


async def test_no_chat_waits_for_what_is_to_be_scored(gateway: Gateway, worker: RuleWorker, queue: QueueClient) -> None:
    worker.hold()
    scoring = asyncio.ensure_future(gateway.scoring.Score(THREE))
    await until(lambda: len(worker.claimed) == 1)
    call = gateway.chat.ChatStream(ask("Hello!"))
    await call.read()
    worker.free()
    assert await read_text(call) == rule_text(4)
    assert len((await scoring).scores) == 3


async def test_a_caller_who_leaves_takes_the_job_along(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    call = gateway.scoring.Score(THREE)
    await until(lambda: len(worker.claimed) == 1)
    call.cancel()
    await until(lambda: worker.dropped == [PushStatus.CANCELLED])


async def test_it_can_be_cancelled_by_its_id(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    call = asyncio.ensure_future(gateway.scoring.Score(THREE))
    await until(lambda: len(worker.claimed) == 1)
    await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="three"))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert failed.value.code() is grpc.StatusCode.CANCELLED


async def test_a_deadline_ends_it(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await gateway.scoring.Score(THREE, timeout=0.3)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(worker.dropped) == 1)


async def test_a_failure_is_told_with_its_reason(gateway: Gateway, worker: RuleWorker) -> None:
    worker.failure = chat_pb2.Failed(code=code_pb2.INTERNAL, reason="NUMERIC", message="not finite")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await gateway.scoring.Score(THREE)
    assert details_of(failed.value).reason == "NUMERIC"


async def test_a_full_queue_of_scores_is_told_and_chats_still_come_in(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, max_waiting_jobs=1) as gateway:
        waiting = gateway.scoring.Score(THREE)
        await until(lambda: gateway.sample("tenant_requests_total", tenant="default") == 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.scoring.Score(score(([1, 2], 1)))
        details = details_of(refused.value)
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert details.retry_after_s
        await gateway.chat.SubmitChat(ask("Hello!"))
        waiting.cancel()


async def test_a_request_that_has_its_place_is_not_refused_for_a_full_queue(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, max_waiting_jobs=1) as gateway:
        waiting = gateway.scoring.Score(THREE)
        await until(lambda: gateway.sample("tenant_requests_total", tenant="default") == 1)
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.scoring.Score(score(([1, 2], 1)))
        again = gateway.scoring.Score(THREE)
        await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="three"))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await again
        assert details_of(ended.value).reason == "CANCELLED"
        waiting.cancel()


async def test_a_gateway_that_leaves_sends_its_callers_elsewhere(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    worker.hold()
    async with start_gateway(model, valkey_url, drain_grace_s=0.1) as gateway:
        call = asyncio.ensure_future(gateway.scoring.Score(THREE))
        await until(lambda: len(worker.claimed) == 1)
    with pytest.raises(grpc.aio.AioRpcError) as sent_away:
        await call
    assert details_of(sent_away.value).reason == "GATEWAY_LEAVING"
    worker.free()
    async with start_gateway(model, valkey_url) as gateway:
        assert len((await gateway.scoring.Score(THREE)).scores) == 3
    assert worker.dropped == []


LONG = [1] * (MAX_POSITIONS + 1)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (score(), "items"),
        (score(*[([1, 2], 1)] * 257), "items"),
        (score(*[(LONG, 1)] * 256, (LONG, 1)), "items"),
        (score(([1, 2], 1), ([1], 1)), "items[1].token_ids"),
        (score(([*LONG, 1], 1)), "items[0].token_ids"),
        (score(([1, 2], 0)), "items[0].context_length"),
        (score(([1, 2], 2)), "items[0].context_length"),
        (score(([1, 100_000], 1)), "items[0].token_ids[1]"),
        (score(([1, 2], 1), model="other"), "model"),
        (score(([1, 2], 1), request_id="a b"), "request_id"),
    ],
)
async def test_what_the_api_does_not_allow_is_refused_by_its_field(
    gateway: Gateway, request_: scoring_pb2.ScoreRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.scoring.Score(request_)
    details = details_of(refused.value)
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert field in details.violations


async def test_an_item_may_have_one_token_more_than_the_model_has_positions(
    gateway: Gateway, worker: RuleWorker
) -> None:
    assert len((await gateway.scoring.Score(score((LONG, MAX_POSITIONS)))).scores) == 1
