"""A chat from its request to its end, through a real gateway and a real queue."""

import asyncio

import grpc
import pytest
from gateway_harness import (
    Gateway,
    RuleWorker,
    ask,
    details_of,
    read_into,
    read_text,
    rule_text,
    start_gateway,
    state_of,
)
from google.protobuf.duration_pb2 import Duration
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2, model_pb2
from oasst_gateway.model import ServedModel
from oasst_jobs import Claimer, JobState, PushItem, PushStatus, QueueClient, QueueLimits, Submitter
from waiting import until


def submitter_of(queue: QueueClient) -> Submitter:
    return Submitter(queue, gateway_id="test", limits=QueueLimits())


async def test_a_stream_is_accepted_then_deltas_then_finished(gateway: Gateway, worker: RuleWorker) -> None:
    events = [event async for event in gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    assert events[0].accepted.request_id == "r-1"
    assert "".join(event.delta.text for event in events) == rule_text(4)
    assert [token_id for event in events for token_id in event.delta.token_ids] == [10, 11, 12, 13]
    assert events[-1].finished.finishes[0].reason == generation_pb2.FINISH_REASON_LENGTH
    assert events[-1].finished.usage.completion_tokens == 4
    assert events[-1].next_position == 4


async def test_a_unary_chat_answers_with_the_whole_completion(gateway: Gateway, worker: RuleWorker) -> None:
    response = await gateway.chat.Chat(ask("Hello!", request_id="r-1", n=2, logprobs=0))
    assert (response.request_id, response.model) == ("r-1", "tiny")
    assert [choice.text for choice in response.choices] == [rule_text(4), rule_text(4, choice=1)]
    assert [list(choice.token_ids) for choice in response.choices] == [[10, 11, 12, 13]] * 2
    assert [len(choice.logprobs) for choice in response.choices] == [4, 4]
    assert [choice.finish.choice for choice in response.choices] == [0, 1]
    assert response.usage.completion_tokens == 8
    assert response.seed == worker.claimed[0].job.sampling.seed


async def test_a_request_that_comes_once_more_is_measured_once(gateway: Gateway, worker: RuleWorker) -> None:
    for _ in range(2):
        await gateway.chat.Chat(ask("Hello!", request_id="r-1"))
    assert gateway.sample("queue_wait_seconds_count") == 1
    for name in ("time_to_first_token", "time_per_output_token"):
        labels = {"gen_ai_operation_name": "chat"}
        assert gateway.registry.get_sample_value(f"gen_ai_server_{name}_seconds_count", labels) == 1


async def test_an_answer_without_a_token_still_has_its_choices(gateway: Gateway, queue: QueueClient) -> None:
    call = gateway.chat.Chat(ask("Hello!", n=2, request_id="r-1"))
    claimer = Claimer(queue, worker_id="laconic", model="tiny")
    await until(lambda: state_of(queue, "r-1"))
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    finishes = [
        generation_pb2.ChoiceFinish(choice=choice, reason=generation_pb2.FINISH_REASON_END_OF_TEXT)
        for choice in range(2)
    ]
    outcome = job_pb2.Outcome(finished=chat_pb2.Finished(finishes=finishes))
    await claimer.push([PushItem(claimed.job_id, claimed.fence, 0, outcome=outcome)])
    response = await call
    assert [(choice.text, list(choice.token_ids), choice.finish) for choice in response.choices] == [
        ("", [], finish) for finish in finishes
    ]


async def test_no_header_is_sent_before_the_request_is_in_the_queue(gateway: Gateway, queue: QueueClient) -> None:
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await call.initial_metadata()
    assert await state_of(queue, "r-1") is JobState.WAITING
    call.cancel()


async def test_a_caller_who_reads_late_gets_the_rest_in_one_piece(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    call = gateway.chat.ChatStream(ask("Hello!", max_new_tokens=5, request_id="r-1"))
    worker.free()
    await until(lambda: gateway.sample("generated_tokens_total") == 5)
    late = [event async for event in gateway.chat.ChatStream(ask("Hello!", max_new_tokens=5, request_id="r-1"))]
    assert [event.WhichOneof("event") for event in late] == ["accepted", "delta", "finished"]
    assert late[1].delta.text == rule_text(5)
    assert late[1].next_position == 5
    assert await read_text(call) == rule_text(5)


async def test_the_same_request_twice_runs_once_and_both_see_it_all(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    first = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    accepted = (await first.read()).accepted
    second = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    assert (await second.read()).accepted.seed == accepted.seed
    worker.free()
    for call in (first, second):
        assert await read_text(call) == rule_text(4)
    assert len(worker.claimed) == 1


async def test_the_same_id_with_another_request_is_refused(gateway: Gateway, worker: RuleWorker) -> None:
    await gateway.chat.Chat(ask("Hello!", request_id="r-1"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.Chat(ask("Goodbye!", request_id="r-1"))
    assert details_of(refused.value).code is grpc.StatusCode.ALREADY_EXISTS
    assert details_of(refused.value).reason == "REQUEST_ID_CONFLICT"


async def test_a_refused_duplicate_does_not_cancel_the_original(
    gateway: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.chat.Chat(ask("Goodbye!", request_id="r-1"))
    worker.free()
    assert await read_text(call) == rule_text(4)
    assert await state_of(queue, "r-1") is JobState.FINISHED


async def test_whoever_leaves_ends_the_work(gateway: Gateway, worker: RuleWorker, queue: QueueClient) -> None:
    worker.hold()
    worker.allow(1)
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await call.read()
    await call.read()
    call.cancel()
    await until(lambda: worker.dropped == [PushStatus.CANCELLED])
    assert await state_of(queue, "r-1") is JobState.CANCELLED


async def test_a_unary_caller_who_leaves_ends_the_work(
    gateway: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    call = gateway.chat.Chat(ask("Hello!", request_id="r-1"))
    await until(lambda: len(worker.claimed) == 1)
    call.cancel()
    await until(lambda: worker.dropped == [PushStatus.CANCELLED])


async def test_work_that_another_caller_watches_goes_on(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    leaving = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    staying = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await asyncio.gather(leaving.read(), staying.read())
    leaving.cancel()
    await until(lambda: gateway.sample("requests_in_flight", rpc="ChatService/ChatStream") == 1)
    worker.free()
    assert await read_text(staying) == rule_text(4)


async def test_within_its_grace_a_left_request_is_found_again(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    request = ask("Hello!", request_id="r-1", detach_grace=Duration(seconds=60))
    call = gateway.chat.ChatStream(request)
    await call.read()
    call.cancel()
    await until(lambda: gateway.sample("requests_in_flight", rpc="ChatService/ChatStream") == 0)
    worker.free()
    assert await read_text(gateway.chat.ChatStream(request)) == rule_text(4)
    assert len(worker.claimed) == 1


async def test_after_its_grace_a_left_request_is_cancelled(
    gateway: Gateway, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1", detach_grace=Duration(nanos=50_000_000)))
    await call.read()
    call.cancel()
    await until(lambda: worker.dropped == [PushStatus.CANCELLED])


async def test_cancel_chat_ends_a_stream_with_a_failed_event(gateway: Gateway, worker: RuleWorker) -> None:
    worker.hold()
    worker.allow(1)
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    events = [await call.read(), await call.read()]
    cancelled = await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1"))
    assert cancelled.state == chat_pb2.CHAT_STATE_CANCELLED
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await read_into(events, call)
    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert details_of(ended.value).reason == "CANCELLED"
    await until(lambda: worker.dropped == [PushStatus.CANCELLED])


async def test_cancelling_what_has_ended_changes_nothing(gateway: Gateway, worker: RuleWorker) -> None:
    await gateway.chat.Chat(ask("Hello!", request_id="r-1"))
    cancelled = await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1"))
    assert cancelled.state == chat_pb2.CHAT_STATE_FINISHED


async def test_an_unknown_request_cannot_be_cancelled(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="nobody"))
    assert details_of(refused.value).code is grpc.StatusCode.NOT_FOUND
    assert details_of(refused.value).reason == "CHAT_NOT_FOUND"


async def test_a_wrong_resume_token_finds_no_request(gateway: Gateway) -> None:
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    token = (await call.read()).accepted.resume_token
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1", resume_token="ü" + token))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    cancelled = await gateway.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1", resume_token=token))
    assert cancelled.state == chat_pb2.CHAT_STATE_CANCELLED
    call.cancel()


async def test_a_deadline_passes_in_the_queue(gateway: Gateway, queue: QueueClient) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as expired:
        await gateway.chat.Chat(ask("Hello!", request_id="r-1"), timeout=0.2)
    assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def has_ended() -> bool:
        state = await state_of(queue, "r-1")
        return state is not None and state.is_terminal

    await until(has_ended)


async def test_a_timeout_shorter_than_the_deadline_ends_the_request(gateway: Gateway) -> None:
    call = gateway.chat.ChatStream(ask("Hello!", timeout=Duration(nanos=100_000_000)), timeout=30)
    events: list[chat_pb2.ChatEvent] = []
    with pytest.raises(grpc.aio.AioRpcError) as expired:
        await read_into(events, call)
    assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(expired.value).reason == "DEADLINE_EXCEEDED"
    assert [event.WhichOneof("event") for event in events] == ["accepted", "failed"]


async def test_a_failure_is_told_as_event_and_as_status(gateway: Gateway, worker: RuleWorker) -> None:
    worker.failure = chat_pb2.Failed(code=grpc.StatusCode.INTERNAL.value[0], reason="NUMERIC", message="not a number")
    events: list[chat_pb2.ChatEvent] = []
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read_into(events, gateway.chat.ChatStream(ask("Hello!")))
    assert events[-1].failed == worker.failure
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert failed.value.details() == "not a number"
    assert details_of(failed.value).reason == "NUMERIC"


async def test_a_full_queue_says_when_to_come_back(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, max_waiting_jobs=1) as gateway:
        waiting = gateway.chat.ChatStream(ask("Hello!"))
        assert (await waiting.read()).accepted.queue.position == 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.Chat(ask("Me too!"))
        details = details_of(refused.value)
        assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details.reason == "QUEUE_FULL"
        assert details.retry_after_s is not None
        assert details.pushback_ms == round(details.retry_after_s * 1000) > 0
        waiting.cancel()


async def test_a_gateway_with_enough_open_chats_takes_no_more(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, max_open_chats=1) as gateway:
        waiting = gateway.chat.ChatStream(ask("Hello!"))
        await waiting.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.Chat(ask("Me too!"))
        assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        assert details_of(refused.value).pushback_ms == 1000
        waiting.cancel()


async def test_whoever_waits_is_told_the_place_and_the_wait(gateway: Gateway, queue: QueueClient) -> None:
    busy = Claimer(queue, worker_id="busy", model="tiny")
    await busy.heartbeat(job_pb2.WorkerStatus(worker_id="busy", model="tiny", tokens_per_second=8.0))
    first = gateway.chat.ChatStream(ask("Hello!"))
    assert not (await first.read()).accepted.queue.estimated_wait.ToMilliseconds()
    await until(lambda: gateway.sample("workers") == 1 and gateway.sample("queue_waiting_jobs") == 1)
    second = gateway.chat.ChatStream(ask("Hello!"))
    queue_status = (await second.read()).accepted.queue
    load = await gateway.model.GetLoad(model_pb2.GetLoadRequest())
    assert queue_status.position == 1
    assert queue_status.estimated_wait.ToMilliseconds() == pytest.approx(load.waiting_tokens / 2 / 8.0 * 1000, abs=1)
    assert load.estimated_wait.ToMilliseconds() == pytest.approx(load.waiting_tokens / 8.0 * 1000, abs=1)
    assert (load.waiting_requests, load.running_requests, load.workers[0].worker_id) == (2, 0, "busy")
    for call in (first, second):
        call.cancel()


async def test_a_second_gateway_streams_what_the_first_accepted(
    model: ServedModel, valkey_url: str, gateway: Gateway, worker: RuleWorker
) -> None:
    worker.hold()
    worker.allow(2)
    first = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await first.read()
    async with start_gateway(model, valkey_url) as other:
        second = other.chat.ChatStream(ask("Hello!", request_id="r-1"))
        await second.read()
        worker.free()
        for call in (first, second):
            assert await read_text(call) == rule_text(4)


async def test_a_stopping_gateway_lets_open_chats_end(model: ServedModel, valkey_url: str, worker: RuleWorker) -> None:
    worker.hold()
    async with start_gateway(model, valkey_url, drain_grace_s=20) as gateway:
        call = gateway.chat.ChatStream(ask("Hello!"))
        await call.read()
        ending = asyncio.create_task(read_text(call))
        asyncio.get_running_loop().call_later(0.1, worker.free)
    assert await ending == rule_text(4)


async def test_a_gateway_that_stops_leaves_unfinished_chats_to_the_queue(
    model: ServedModel, valkey_url: str, worker: RuleWorker, queue: QueueClient
) -> None:
    worker.hold()
    async with start_gateway(model, valkey_url, drain_grace_s=0.1) as gateway:
        call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
        await call.read()
    assert not (await state_of(queue, "r-1")).is_terminal
    worker.free()
    async with start_gateway(model, valkey_url) as other:
        retry = other.chat.ChatStream(ask("Hello!", request_id="r-1"))
        assert await read_text(retry) == rule_text(4)
