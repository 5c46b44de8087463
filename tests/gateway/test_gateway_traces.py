"""A caller's trace goes on in the queue, whether or not the gateway exports spans of its own."""

import grpc
import pytest
from gateway_harness import Gateway, RuleWorker, ask, read_text, start_gateway
from oasst.v1 import chat_pb2
from oasst_gateway.model import ServedModel
from otlp_receiver import OtlpReceiver, ReceivedSpan, running_otlp_receiver
from prometheus_client.openmetrics.exposition import generate_latest

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CALLER = (("traceparent", TRACEPARENT), ("tracestate", "vendor=1"))


async def test_without_traces_of_its_own_a_gateway_hands_the_callers_on(gateway: Gateway, worker: RuleWorker) -> None:
    await read_text(gateway.chat.ChatStream(ask("Hello!"), metadata=CALLER))
    assert (worker.claimed[0].job.traceparent, worker.claimed[0].job.tracestate) == (TRACEPARENT, "vendor=1")


async def test_a_latency_names_the_trace_of_a_request_that_had_it(gateway: Gateway, worker: RuleWorker) -> None:
    await read_text(gateway.chat.ChatStream(ask("Hello!"), metadata=CALLER))
    exemplar = f'# {{trace_id="{TRACEPARENT[3:35]}"}}'
    lines = generate_latest(gateway.registry).decode().splitlines()
    named = {line.partition("_bucket")[0] for line in lines if exemplar in line}
    assert {"gen_ai_server_time_to_first_token_seconds", "oasst_gateway_inter_token_latency_seconds"} < named


@pytest.mark.parametrize("traceparent", ["", TRACEPARENT.removesuffix("01") + "00"])
async def test_no_latency_names_a_trace_that_nobody_keeps(gateway, worker, traceparent) -> None:
    metadata = (("traceparent", traceparent),) if traceparent else ()
    await read_text(gateway.chat.ChatStream(ask("Hello!"), metadata=metadata))
    assert "trace_id" not in generate_latest(gateway.registry).decode()


@pytest.mark.parametrize("metadata", [(), (("traceparent", "00-nonsense"),)])
async def test_no_trace_or_nonsense_leaves_the_job_without(gateway, worker, metadata) -> None:
    await read_text(gateway.chat.ChatStream(ask("Hello!"), metadata=metadata))
    assert worker.claimed[0].job.traceparent == ""


def span_of(receiver: OtlpReceiver, rpc: str) -> ReceivedSpan:
    (span,) = [span for span in receiver.spans() if span.name == f"oasst.v1.{rpc}"]
    return span


async def test_who_comes_back_is_linked_to_what_runs_already(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    with running_otlp_receiver() as receiver:
        async with start_gateway(model, valkey_url, otlp_endpoint=receiver.endpoint) as gateway:
            accepted = (await gateway.chat.SubmitChat(ask("Hello!", request_id="r"), metadata=CALLER)).accepted
            watch = chat_pb2.WatchChatRequest(request_id="r", resume_token=accepted.resume_token)
            await read_text(gateway.chat.WatchChat(watch))
            await gateway.chat.Chat(ask("Hello!", request_id="r"))
        submit = next(span for span in receiver.spans() if span.name == "submit")
        assert submit.parent_id == span_of(receiver, "ChatService/SubmitChat").span_id
        for rpc in ("ChatService/WatchChat", "ChatService/Chat"):
            span = span_of(receiver, rpc)
            assert span.trace_id != submit.trace_id
            assert [link.span_id.hex() for link in span.proto.links] == [submit.span_id]


async def test_a_refusal_is_described_by_its_reason_and_is_no_error_of_the_servers(
    model: ServedModel, valkey_url: str
) -> None:
    with running_otlp_receiver() as receiver:
        async with start_gateway(model, valkey_url, otlp_endpoint=receiver.endpoint) as gateway:
            with pytest.raises(grpc.aio.AioRpcError):
                await gateway.chat.Chat(ask("Hello!", max_new_tokens=10**6))
        span = span_of(receiver, "ChatService/Chat")
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert span.attributes["oasst.error.reason"]
    assert not span.has_failed
