"""What a gateway process spends on each message it streams.

A feeder in place of a worker logs one token of every stream at each step, and a caller reads all streams. Gateway,
feeder and caller are processes of their own, so the figure is the gateway's alone: processor time, not wall time.
Beside it stands a bare gRPC server that writes messages of one token to as many streams and does nothing else: what is
left between the two is ours. Where tokens come as fast as they go, a gateway's messages hold several, and nothing
stands beside them.

    python -m bench.gateway feed URL STREAMS TOKENS STEP_S     is the feeder
    python -m bench.gateway bare STREAMS TOKENS STEP_S         is the bare server
"""

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass

import grpc
import psutil
import uvloop
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_jobs import ClaimedJob, Claimer, PushItem, QueueClient, connect
from rich.table import Table

from bench.options import Measured, Options
from bench.services import MODEL, first_line, running_gateway, start
from bench.turns import median_of

__all__ = ["GatewayRow", "chat_request", "cpu_s", "gateway_table", "measure"]

# Streams, tokens of each, seconds between two tokens: one message a token, then as fast as it goes.
_LOADS = ((64, 400, 0.025), (256, 200, 0.1), (64, 400, 0.0))
_CHAT_STREAM = "/oasst.v1.ChatService/ChatStream"


@dataclass(frozen=True)
class GatewayRow:
    """Medians of the rounds."""

    streams: int
    step_ms: float  # Between two tokens of a stream; 0 is as fast as it goes.
    tokens_per_s: float
    messages_per_token: float  # Below 1 where tokens that waited together left together.
    cpu_us_per_message: float
    cpu_us_per_token: float
    bare_us_per_message: float | None  # Of a server that only writes; None where messages hold several tokens.


def measure(options: Options) -> Measured:
    rows = [median_of([_measure(*load) for _ in range(options.rounds)]) for load in _LOADS]
    return rows, [gateway_table(rows)]


def gateway_table(rows: list[GatewayRow]) -> Table:
    table = Table(title="Processor time of a gateway for each streamed message, beside a bare gRPC server's")
    for heading in ("streams", "step", "tokens/s", "messages/token", "us/message", "bare us/message", "us/token"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.streams),
            f"{row.step_ms:g} ms",
            f"{row.tokens_per_s:.0f}",
            f"{row.messages_per_token:.2f}",
            f"{row.cpu_us_per_message:.1f}",
            "-" if row.bare_us_per_message is None else f"{row.bare_us_per_message:.1f}",
            f"{row.cpu_us_per_token:.1f}",
        )
    return table


def cpu_s(process: psutil.Process) -> float:
    """Processor time that it has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def chat_request(tokens: int) -> chat_pb2.ChatRequest:
    """A question, to be answered by so many tokens."""
    message = chat_pb2.Message(role=chat_pb2.ROLE_PROMPTER, content="Hello!")
    return chat_pb2.ChatRequest(
        conversation=chat_pb2.Conversation(messages=[message]),
        limits=generation_pb2.GenerationLimits(max_new_tokens=tokens),
    )


def _measure(streams: int, tokens: int, step_s: float) -> GatewayRow:
    """All streams at once, from the first token of the first to the end of the last."""
    bare_us = _bare_us_per_message(streams, tokens, step_s) if step_s else None
    with running_gateway() as (process, address, url), contextlib.ExitStack() as exits:
        start(exits, sys.executable, "-m", "bench.gateway", "feed", url, *map(str, (streams, tokens, step_s)))
        spent_s, elapsed_s, num_messages = asyncio.run(_read_all(process, address, streams, tokens))
    num_tokens = streams * tokens
    return GatewayRow(
        streams=streams,
        step_ms=step_s * 1e3,
        tokens_per_s=num_tokens / elapsed_s,
        messages_per_token=num_messages / num_tokens,
        cpu_us_per_message=spent_s / num_messages * 1e6,
        cpu_us_per_token=spent_s / num_tokens * 1e6,
        bare_us_per_message=bare_us,
    )


def _bare_us_per_message(streams: int, tokens: int, step_s: float) -> float:
    with contextlib.ExitStack() as exits:
        bare = start(exits, sys.executable, "-m", "bench.gateway", "bare", *map(str, (streams, tokens, step_s)))
        address = first_line(bare)
        spent_s, _, num_messages = asyncio.run(_read_all(psutil.Process(bare.pid), address, streams, tokens))
    return spent_s / num_messages * 1e6


async def _read_all(process: psutil.Process, address: str, streams: int, tokens: int) -> tuple[float, float, int]:
    """Processor seconds of the server, seconds, messages."""
    async with grpc.aio.insecure_channel(address) as channel:
        # Bytes are enough here: what the caller spends is not measured, but it must keep up.
        chat_stream = channel.unary_stream(_CHAT_STREAM, request_serializer=chat_pb2.ChatRequest.SerializeToString)
        calls = [chat_stream(chat_request(tokens)) for _ in range(streams)]
        for call in calls:
            await call.read()  # `accepted`; tokens begin once all are there.
        num_messages = 0

        async def read(call: grpc.aio.UnaryStreamCall) -> None:
            nonlocal num_messages
            while await call.read() is not grpc.aio.EOF:
                num_messages += 1

        busy_s, started_s = cpu_s(process), time.perf_counter()
        await asyncio.gather(*map(read, calls))
        return cpu_s(process) - busy_s, time.perf_counter() - started_s, num_messages


async def _feed(url: str, streams: int, tokens: int, step_s: float) -> None:
    redis = connect(url)
    claimer = Claimer(QueueClient(redis), worker_id="feeder", model=MODEL, lease_ms=60_000)
    jobs: list[ClaimedJob] = []
    while len(jobs) < streams:
        jobs += await claimer.claim(max_jobs=streams, max_tokens=streams * 4096)
        await asyncio.sleep(0.01)
    due_s = time.perf_counter()
    for position in range(tokens):
        await claimer.push([_item(job, position, is_last=position == tokens - 1) for job in jobs])
        due_s += step_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))


def _item(job: ClaimedJob, position: int, *, is_last: bool) -> PushItem:
    delta = generation_pb2.Delta(position=position, text=" token", token_ids=[1000 + position])
    finish = generation_pb2.ChoiceFinish(reason=generation_pb2.FINISH_REASON_LENGTH)
    return PushItem(
        job.job_id,
        job.fence,
        position,
        entry=job_pb2.LogEntry(end_position=position + 1, deltas=[delta]),
        outcome=job_pb2.Outcome(finished=chat_pb2.Finished(finishes=[finish])) if is_last else None,
    )


async def _serve_bare(streams: int, tokens: int, step_s: float) -> None:
    """Writes a message of a token's size to each stream at each step, once all streams are there."""
    message = _item_event().SerializeToString()
    inboxes: list[asyncio.Queue[bytes]] = []
    are_all_there = asyncio.Event()

    async def stream(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        inbox: asyncio.Queue[bytes] = asyncio.Queue()
        inboxes.append(inbox)
        await context.write(message)
        if len(inboxes) == streams:
            are_all_there.set()
        for _ in range(tokens):
            await context.write(await inbox.get())

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("oasst.v1.ChatService", {"ChatStream": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await are_all_there.wait()
    due_s = time.perf_counter()
    for _ in range(tokens):
        for inbox in inboxes:
            inbox.put_nowait(message)
        due_s += step_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    await server.wait_for_termination()


def _item_event() -> chat_pb2.ChatEvent:
    delta = generation_pb2.Delta(position=1000, text=" token", token_ids=[1000])
    return chat_pb2.ChatEvent(next_position=1000, delta=delta)


def _main(role: str, *arguments: str) -> None:
    *url, streams, tokens, step_s = arguments
    load = int(streams), int(tokens), float(step_s)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_feed(*url, *load) if role == "feed" else _serve_bare(*load))


if __name__ == "__main__":
    _main(*sys.argv[1:])
