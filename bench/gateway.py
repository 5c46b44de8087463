"""What a gateway process spends on each message it streams, and how it takes a flood of requests.

A feeder in place of a worker logs one token of every stream at each step, and a caller reads all streams. Gateway,
feeder and caller are processes of their own, so the figure is the gateway's alone: processor time, not wall time.
Beside it stands a bare gRPC server that writes messages of the same size to as many streams, or refuses as many
requests with the same words, and does nothing else: what is left between the two is ours.

    python -m bench.gateway feed URL STREAMS TOKENS STEP_S     is the feeder
    python -m bench.gateway bare STREAMS TOKENS STEP_S         is the bare server of streams
    python -m bench.gateway refuse                             is the bare server that refuses
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import uvloop
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_cli.up.valkey import find_server
from oasst_gateway.status import RpcStatus
from oasst_jobs import ClaimedJob, Claimer, PushItem, QueueClient, connect
from rich.table import Table

from bench.checkpoints import DEMO

__all__ = [
    "MODEL",
    "FloodRow",
    "GatewayRow",
    "first_line",
    "flood_table",
    "gateway_table",
    "measure_bare_flood",
    "measure_flood",
    "measure_gateway",
    "running_gateway",
    "start",
]

MODEL = "measured"
CHAT_STREAM = "/oasst.v1.ChatService/ChatStream"
CHAT = "/oasst.v1.ChatService/Chat"

_ANSWERED_WITHIN_S = 120.0


@dataclass(frozen=True)
class GatewayRow:
    streams: int
    step_ms: float  # Between two tokens of a stream; 0 is as fast as it goes.
    tokens_per_s: float
    messages_per_token: float  # Below 1 where tokens that waited together left together.
    cpu_us_per_message: float
    cpu_us_per_token: float
    bare_us_per_message: float  # Of a server that only writes.


@dataclass(frozen=True)
class FloodRow:
    requests: int
    sent_in_s: float
    accepted: int
    refused: int  # By the gateway, with the time to come back.
    turned_away: int  # By gRPC itself, as more streams than a connection may have; a client's retry comes again.
    refusal_p50_ms: float  # From sending to the refusal.
    refusal_p99_ms: float
    cpu_us_per_request: float


def measure_gateway(streams: int, tokens: int, step_s: float) -> GatewayRow:
    """All streams at once, from the first token of the first to the end of the last."""
    numbers = [str(streams), str(tokens), str(step_s)]
    with contextlib.ExitStack() as exits:
        bare = start(exits, sys.executable, "-m", "bench.gateway", "bare", *numbers)
        address = first_line(bare)
        cpu_s, _, num_messages = asyncio.run(_read_all(psutil.Process(bare.pid), address, streams, tokens))
        bare_us = cpu_s / num_messages * 1e6
    with running_gateway() as (process, address, url), contextlib.ExitStack() as exits:
        start(exits, sys.executable, "-m", "bench.gateway", "feed", url, *numbers)
        cpu_s, elapsed_s, num_messages = asyncio.run(_read_all(process, address, streams, tokens))
    num_tokens = streams * tokens
    return GatewayRow(
        streams=streams,
        step_ms=step_s * 1e3,
        tokens_per_s=num_tokens / elapsed_s,
        messages_per_token=num_messages / num_tokens,
        cpu_us_per_message=cpu_s / num_messages * 1e6,
        cpu_us_per_token=cpu_s / num_tokens * 1e6,
        bare_us_per_message=bare_us,
    )


def measure_flood(requests: int, *, max_waiting: int) -> FloodRow:
    """So many requests in a second, into a queue that takes few of them and has no worker."""
    options = ["--max-waiting-jobs", str(max_waiting), "--max-open-chats", str(requests)]
    with running_gateway(*options) as (process, address, _):
        return asyncio.run(_flood(process, address, requests, most_accepted=max_waiting))


def measure_bare_flood(requests: int) -> FloodRow:
    """As many, into a server that does nothing but refuse."""
    with contextlib.ExitStack() as exits:
        bare = start(exits, sys.executable, "-m", "bench.gateway", "refuse")
        return asyncio.run(_flood(psutil.Process(bare.pid), first_line(bare), requests, most_accepted=0))


@contextlib.contextmanager
def running_gateway(*options: str) -> Iterator[tuple[psutil.Process, str, str]]:
    """A gateway on a Valkey of its own: its process, its address, the queue's URL."""
    with contextlib.ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="oasst-bench-")))
        socket = folder / "valkey.sock"
        valkey = [find_server(), "--port", "0", "--unixsocket", socket, "--dir", folder, "--appendonly", "yes"]
        start(exits, *map(str, valkey), "--save", "", "--logfile", str(folder / "valkey.log"))
        url = f"unix://{socket}"
        gateway = start(
            exits,
            *(sys.executable, "-m", "oasst_gateway", "--model", str(DEMO), "--model-name", MODEL, "--redis-url", url),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--log-level", "warning", *options),
        )
        yield psutil.Process(gateway.pid), json.loads(first_line(gateway))["listen"], url


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
            f"{row.bare_us_per_message:.1f}",
            f"{row.cpu_us_per_token:.1f}",
        )
    return table


def flood_table(row: FloodRow, bare: FloodRow) -> Table:
    table = Table(title="A flood of requests into a queue that takes a hundred, beside a bare server that refuses all")
    table.add_column("figure")
    for heading in ("gateway", "bare"):
        table.add_column(heading, justify="right")
    for figure, of in (
        ("requests, and the seconds in which they were sent", lambda row: f"{row.requests} in {row.sent_in_s:.1f} s"),
        ("accepted", lambda row: str(row.accepted)),
        ("refused by the server", lambda row: str(row.refused)),
        ("turned away by gRPC's limit on streams", lambda row: str(row.turned_away)),
        ("from sending to refusal, median", lambda row: f"{row.refusal_p50_ms:.0f} ms"),
        ("from sending to refusal, 99 %", lambda row: f"{row.refusal_p99_ms:.0f} ms"),
        ("processor time of the server for each", lambda row: f"{row.cpu_us_per_request:.0f} us"),
    ):
        table.add_row(figure, of(row), of(bare))
    return table


def start(exits: contextlib.ExitStack, *command: str) -> subprocess.Popen[str]:
    process = exits.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    exits.callback(process.terminate)
    return process


def first_line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"it did not start: exit code {process.wait()}")
    return line.strip()


async def _read_all(process: psutil.Process, address: str, streams: int, tokens: int) -> tuple[float, float, int]:
    """Processor seconds of the server, seconds, messages."""
    async with grpc.aio.insecure_channel(address) as channel:
        # Bytes are enough here: what the caller spends is not measured, but it must keep up.
        chat_stream = channel.unary_stream(CHAT_STREAM, request_serializer=chat_pb2.ChatRequest.SerializeToString)
        calls = [chat_stream(_request(tokens)) for _ in range(streams)]
        for call in calls:
            await call.read()  # `accepted`; tokens begin once all are there.
        num_messages = 0

        async def read(call: grpc.aio.UnaryStreamCall) -> None:
            nonlocal num_messages
            while await call.read() is not grpc.aio.EOF:
                num_messages += 1

        busy_s, started_s = _cpu_s(process), time.perf_counter()
        await asyncio.gather(*map(read, calls))
        return _cpu_s(process) - busy_s, time.perf_counter() - started_s, num_messages


async def _flood(process: psutil.Process, address: str, requests: int, *, most_accepted: int) -> FloodRow:
    refusal_s: list[float] = []
    codes: Counter[grpc.StatusCode] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        chat = channel.unary_unary(CHAT, request_serializer=chat_pb2.ChatRequest.SerializeToString)

        async def ask() -> None:
            sent_s = time.perf_counter()
            try:
                await chat(_request(16))
            except grpc.aio.AioRpcError as error:
                codes[error.code()] += 1
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    refusal_s.append(time.perf_counter() - sent_s)

        busy_s, started_s = _cpu_s(process), time.perf_counter()
        calls = []
        for index in range(requests):
            calls.append(asyncio.create_task(ask()))
            # Evenly over the second, as far as the sender keeps up.
            await asyncio.sleep(max(0.0, started_s + index / requests - time.perf_counter()))
        sent_in_s = time.perf_counter() - started_s
        # Whoever was accepted waits for a worker that never comes.
        async with asyncio.timeout(_ANSWERED_WITHIN_S):
            while requests - codes.total() > most_accepted:  # noqa: ASYNC110 - the others are tasks of their own
                await asyncio.sleep(0.1)
        cpu_s = _cpu_s(process) - busy_s
        num_accepted = requests - codes.total()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    cuts = statistics.quantiles(refusal_s, n=100)
    return FloodRow(
        requests=requests,
        sent_in_s=sent_in_s,
        accepted=num_accepted,
        refused=codes[grpc.StatusCode.RESOURCE_EXHAUSTED],
        turned_away=codes[grpc.StatusCode.UNAVAILABLE],
        refusal_p50_ms=cuts[49] * 1e3,
        refusal_p99_ms=cuts[98] * 1e3,
        cpu_us_per_request=cpu_s / requests * 1e6,
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _request(tokens: int) -> chat_pb2.ChatRequest:
    message = chat_pb2.Message(role=chat_pb2.ROLE_PROMPTER, content="Hello!")
    return chat_pb2.ChatRequest(
        conversation=chat_pb2.Conversation(messages=[message]),
        limits=generation_pb2.GenerationLimits(max_new_tokens=tokens),
    )


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


async def _refuse() -> None:
    """Refuses every request as the gateway does when its queue is full."""
    status = RpcStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full", retry_after_s=1.0)
    metadata = status.trailing_metadata()

    async def chat(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.abort(status.code, status.message, trailing_metadata=metadata)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(chat)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("oasst.v1.ChatService", {"Chat": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def _item_event() -> chat_pb2.ChatEvent:
    delta = generation_pb2.Delta(position=1000, text=" token", token_ids=[1000])
    return chat_pb2.ChatEvent(next_position=1000, delta=delta)


def _main(role: str, *arguments: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if role == "refuse":
            runner.run(_refuse())
            return
        *url, streams, tokens, step_s = arguments
        load = int(streams), int(tokens), float(step_s)
        runner.run(_feed(*url, *load) if role == "feed" else _serve_bare(*load))


if __name__ == "__main__":
    _main(*sys.argv[1:])
