"""How a gateway takes a flood of requests into a queue that takes few of them.

Beside it stands a bare gRPC server that refuses every request with the same words, and does nothing else: what is left
between the two is ours. `python -m bench.flood` is that server. A connection has as many streams in both.
"""

import asyncio
import contextlib
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

import grpc
import psutil
import uvloop
from oasst.v1 import chat_pb2
from oasst_gateway.server import MAX_STREAMS
from oasst_gateway.status import RpcStatus
from rich.table import Table

from bench.gateway import chat_request, cpu_s
from bench.options import Measured, Options
from bench.services import first_line, running_gateway, start
from bench.turns import median_of

__all__ = ["FloodRow", "flood_table", "measure"]

_REQUESTS = 10_000
_MAX_WAITING = 100
_CHAT = "/oasst.v1.ChatService/Chat"
_ANSWERED_WITHIN_S = 120.0


@dataclass(frozen=True)
class FloodRow:
    """Medians of the rounds."""

    requests: float
    sent_in_s: float
    accepted: float
    refused: float  # By the gateway, with the time to come back.
    turned_away: float  # By gRPC itself, as more streams than a connection may have; a client's retry comes again.
    refusal_p50_ms: float  # From sending to the refusal.
    refusal_p99_ms: float
    cpu_us_per_answer: float  # Accepted or refused: who is turned away never reaches the server's own code.


def measure(options: Options) -> Measured:
    rounds = [
        (_flood_gateway(_REQUESTS, max_waiting=_MAX_WAITING), _flood_bare(_REQUESTS)) for _ in range(options.rounds)
    ]
    row, bare = (median_of(rows) for rows in zip(*rounds, strict=True))
    return [row, bare], [flood_table(row, bare)]


def flood_table(row: FloodRow, bare: FloodRow) -> Table:
    table = Table(title="A flood of requests into a queue that takes a hundred, beside a bare server that refuses all")
    table.add_column("figure")
    for heading in ("gateway", "bare"):
        table.add_column(heading, justify="right")
    for figure, of in (
        (
            "requests, and the seconds in which they were sent",
            lambda row: f"{row.requests:.0f} in {row.sent_in_s:.1f} s",
        ),
        ("accepted", lambda row: f"{row.accepted:.0f}"),
        ("refused by the server", lambda row: f"{row.refused:.0f}"),
        ("turned away by gRPC's limit on streams", lambda row: f"{row.turned_away:.0f}"),
        ("from sending to refusal, median", lambda row: f"{row.refusal_p50_ms:.0f} ms"),
        ("from sending to refusal, 99 %", lambda row: f"{row.refusal_p99_ms:.0f} ms"),
        ("processor time of the server for each accepted or refused", lambda row: f"{row.cpu_us_per_answer:.0f} us"),
    ):
        table.add_row(figure, of(row), of(bare))
    return table


def _flood_gateway(requests: int, *, max_waiting: int) -> FloodRow:
    """So many requests in a second, into a queue that takes few of them and has no worker."""
    options = ["--max-waiting-jobs", str(max_waiting), "--max-open-chats", str(requests)]
    with running_gateway(*options) as (process, address, _):
        return asyncio.run(_flood(process, address, requests, most_accepted=max_waiting))


def _flood_bare(requests: int) -> FloodRow:
    """As many, into a server that does nothing but refuse."""
    with contextlib.ExitStack() as exits:
        bare = start(exits, sys.executable, "-m", "bench.flood")
        return asyncio.run(_flood(psutil.Process(bare.pid), first_line(bare), requests, most_accepted=0))


async def _flood(process: psutil.Process, address: str, requests: int, *, most_accepted: int) -> FloodRow:
    refusal_s: list[float] = []
    codes: Counter[grpc.StatusCode] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        chat = channel.unary_unary(_CHAT, request_serializer=chat_pb2.ChatRequest.SerializeToString)

        async def ask() -> None:
            sent_s = time.perf_counter()
            try:
                await chat(chat_request(16))
            except grpc.aio.AioRpcError as error:
                codes[error.code()] += 1
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    refusal_s.append(time.perf_counter() - sent_s)

        busy_s, started_s = cpu_s(process), time.perf_counter()
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
        spent_s = cpu_s(process) - busy_s
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
        cpu_us_per_answer=spent_s / (requests - codes[grpc.StatusCode.UNAVAILABLE]) * 1e6,
    )


async def _refuse() -> None:
    """Refuses every request as the gateway does when its queue is full."""
    status = RpcStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full", retry_after_s=1.0)
    metadata = status.trailing_metadata()

    async def chat(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.abort(status.code, status.message, trailing_metadata=metadata)

    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", MAX_STREAMS)])
    handler = grpc.unary_unary_rpc_method_handler(chat)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("oasst.v1.ChatService", {"Chat": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_refuse())
