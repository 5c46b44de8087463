"""A real chat in a trace: caller, gateway, queue and worker, also where a worker dies in the middle of it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import oasst_training
import pytest
from oasst_client import Client
from oasst_jobs import QueueClient, connect
from opentelemetry import trace
from otlp_receiver import OtlpReceiver, ReceivedSpan, running_otlp_receiver
from serving_line import read_serving_line
from waiting import wait_until

DEMO = Path(oasst_training.__file__).parent / "demo"
CALLER = trace.SpanContext(
    trace_id=0x0AF7651916CD43DD8448EB211C80319C,
    span_id=0xB7AD6B7169203331,
    is_remote=False,
    trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
)
TRACE_ID, CALLER_ID = f"{CALLER.trace_id:032x}", f"{CALLER.span_id:016x}"


class Service:
    """Processes on one queue that export their spans to one receiver."""

    def __init__(self, exits: ExitStack, redis_url: str, receiver: OtlpReceiver, folder: Path) -> None:
        self._exits = exits
        self._redis_url = redis_url
        self._folder = folder
        self.receiver = receiver

    def start(self, role: str, *options: str) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
        """The process, and what it told once it served."""
        log = self.log_of(role)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", f"oasst_{role}", "--model", str(DEMO), "--redis-url", self._redis_url),
                *("--metrics-listen", "127.0.0.1:0", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=self._exits.enter_context(log.open("ab")),
            env={
                **os.environ,
                "OTEL_EXPORTER_OTLP_ENDPOINT": self.receiver.endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "50",
            },
        )
        self._exits.callback(process.communicate)
        self._exits.callback(process.kill)
        return process, read_serving_line(process, log)

    def log_of(self, role: str) -> Path:
        """What processes of this role say."""
        return self._folder / f"{role}.log"

    def lose_leases(self) -> None:
        """Whoever holds a job has been silent for longer than its lease."""

        async def lose() -> None:
            redis = connect(self._redis_url)
            leases = f"{QueueClient(redis).shards[0].keys.root}:leases"
            await redis.zadd(leases, dict.fromkeys(await redis.zrange(leases, 0, -1), 1))
            await redis.aclose()

        asyncio.run(lose())

    def spans(self, is_whole: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """The spans of the caller's trace, once they are all there."""
        wait_until(lambda: is_whole(self.receiver.spans(TRACE_ID)), "the trace to be whole")
        return self.receiver.spans(TRACE_ID)


@pytest.fixture
def service(valkey_url: str, tmp_path: Path) -> Iterator[Service]:
    with ExitStack() as exits:
        receiver = exits.enter_context(running_otlp_receiver())
        yield Service(exits, valkey_url, receiver, tmp_path)


def named(spans: list[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name]


def test_a_chat_is_one_trace_from_its_caller_to_the_workers_steps(service):
    _, worker = service.start("worker", "--worker-id", "w")
    gateway, serving = service.start("gateway", "--gateway-id", "g", "--listen", "127.0.0.1:0", "--log-format", "json")
    with Client(serving["listen"]) as client, trace.use_span(trace.NonRecordingSpan(CALLER)):
        completion = client.stream("What is a meme?", temperature=0).completion()
    spans = service.spans(lambda spans: len(spans) == 6)
    rpc, submit, queue, chat, prefill, decode = (
        named(spans, name)[0]
        for name in ("oasst.v1.ChatService/ChatStream", "submit", "queue", "chat demo", "prefill", "decode")
    )
    assert rpc.parent_id == CALLER_ID
    assert submit.parent_id == rpc.span_id
    assert queue.parent_id == chat.parent_id == submit.span_id
    assert prefill.parent_id == decode.parent_id == chat.span_id
    assert {span.instance for span in (rpc, submit)} == {"g"}
    assert {span.instance for span in (queue, chat, prefill, decode)} == {"w"} == {worker["id"]}

    # One after the other, and inside what caused them; the clocks of two processes of one machine are one.
    at = [(span.proto.start_time_unix_nano, span.proto.end_time_unix_nano) for span in (queue, prefill, decode)]
    assert at[0][1] == at[1][0] < at[1][1] == at[2][0] < at[2][1] <= rpc.proto.end_time_unix_nano
    assert [event.name for event in rpc.proto.events] == ["first token"]

    assert rpc.attributes["rpc.response.status_code"] == "OK"
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.request.model"] == "demo"
    assert chat.attributes["oasst.job.outcome"] == "finished"
    for span in (rpc, chat):
        assert span.attributes["gen_ai.usage.input_tokens"] == completion.usage.prompt_tokens
        assert span.attributes["gen_ai.usage.output_tokens"] == completion.usage.completion_tokens
        assert span.attributes["gen_ai.response.finish_reasons"] == ["end_of_text"]
    everything = " ".join(str(span.proto) for span in spans)
    assert "meme" not in everything
    assert completion.text.split()[-1] not in everything

    gateway.send_signal(signal.SIGTERM)
    gateway.wait(timeout=20)
    lines = [json.loads(line) for line in service.log_of("gateway").read_text().splitlines()]
    assert [line["event"] for line in lines if line.get("trace_id") == TRACE_ID] == ["accepted", "finished"]


def test_the_next_worker_goes_on_in_the_same_trace(service):
    first, _ = service.start("worker", "--worker-id", "first")
    _, serving = service.start("gateway", "--listen", "127.0.0.1:0")
    with (
        Client(serving["listen"]) as client,
        trace.use_span(trace.NonRecordingSpan(CALLER)),
        client.stream("Tell me about owls.", max_new_tokens=1900, ignore_eos=True, seed=1) as stream,
    ):
        texts = iter(stream)
        for _ in range(3):
            next(texts)
        service.spans(lambda spans: named(spans, "queue"))
        first.kill()
        first.wait()
        service.lose_leases()
        service.start("worker", "--worker-id", "second")
        completion = stream.completion()
    spans = service.spans(lambda spans: named(spans, "chat demo") and named(spans, "oasst.v1.ChatService/ChatStream"))
    (queue,) = named(spans, "queue")
    (submit,) = named(spans, "submit")
    (chat,) = named(spans, "chat demo")
    assert (queue.instance, chat.instance) == ("first", "second")
    assert queue.parent_id == chat.parent_id == submit.span_id
    assert chat.attributes["oasst.job.attempt"] == 2
    assert 3 <= chat.attributes["oasst.job.resumed_tokens"] < 1900
    assert completion.usage.completion_tokens == 1900
