"""What a gateway process spends on each message it streams: processor time, not wall time.

A feeder in place of a worker logs one token of every stream at each step, as fast as it is told to, and a caller reads
all streams. Gateway, feeder and caller are processes of their own, so the figure is the gateway's alone.

    python -m bench.gateway feed URL STREAMS TOKENS STEP_S     is the feeder
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_cli.valkey import find_server
from oasst_jobs import ClaimedJob, Claimer, PushItem, QueueClient, connect

from bench.checkpoints import DEMO

__all__ = ["GatewayRow", "measure_gateway"]

MODEL = "measured"


@dataclass(frozen=True)
class GatewayRow:
    streams: int
    step_ms: float  # Between two tokens of a stream; 0 is as fast as it goes.
    tokens_per_s: float
    messages_per_token: float  # Below 1 where tokens that waited together left together.
    cpu_us_per_message: float
    cpu_us_per_token: float


def measure_gateway(streams: int, tokens: int, step_s: float) -> GatewayRow:
    """All streams at once, from the first token of the first to the end of the last."""
    with running_gateway() as (process, address, url):
        command = [sys.executable, "-m", "bench.gateway", "feed", url, str(streams), str(tokens), str(step_s)]
        with subprocess.Popen(command) as feeder:
            try:
                return asyncio.run(_read_all(process, address, streams, tokens, step_s))
            finally:
                feeder.terminate()


@contextlib.contextmanager
def running_gateway(*options: str) -> Iterator[tuple[psutil.Process, str, str]]:
    """A gateway on a Valkey of its own: its process, its address, the queue's URL."""
    with contextlib.ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="oasst-bench-")))
        socket = folder / "valkey.sock"
        valkey = [find_server(), "--port", "0", "--unixsocket", socket, "--dir", folder, "--appendonly", "yes"]
        _start(exits, *map(str, valkey), "--save", "", "--logfile", str(folder / "valkey.log"))
        url = f"unix://{socket}"
        gateway = _start(
            exits,
            *(sys.executable, "-m", "oasst_gateway", "--model", str(DEMO), "--model-name", MODEL, "--redis-url", url),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--log-level", "warning", *options),
        )
        line = gateway.stdout.readline() if gateway.stdout else ""
        yield psutil.Process(gateway.pid), json.loads(line)["listen"], url


def _start(exits: contextlib.ExitStack, *command: str) -> subprocess.Popen[str]:
    process = exits.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    exits.callback(process.terminate)
    return process


async def _read_all(process: psutil.Process, address: str, streams: int, tokens: int, step_s: float) -> GatewayRow:
    async with grpc.aio.insecure_channel(address) as channel:
        # Bytes are enough here: what the caller spends is not measured, but it must keep up.
        chat_stream = channel.unary_stream(
            "/oasst.v1.ChatService/ChatStream", request_serializer=chat_pb2.ChatRequest.SerializeToString
        )
        calls = [chat_stream(_request(tokens)) for _ in range(streams)]
        for call in calls:
            await call.read()  # `accepted`; the feeder begins once it has claimed all.
        num_messages = 0

        async def read(call: grpc.aio.UnaryStreamCall) -> None:
            nonlocal num_messages
            while await call.read() is not grpc.aio.EOF:
                num_messages += 1

        busy_s, started_s = _cpu_s(process), time.perf_counter()
        await asyncio.gather(*map(read, calls))
        busy_s, elapsed_s = _cpu_s(process) - busy_s, time.perf_counter() - started_s
    num_tokens = streams * tokens
    return GatewayRow(
        streams=streams,
        step_ms=step_s * 1e3,
        tokens_per_s=num_tokens / elapsed_s,
        messages_per_token=num_messages / num_tokens,
        cpu_us_per_message=busy_s / num_messages * 1e6,
        cpu_us_per_token=busy_s / num_tokens * 1e6,
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


if __name__ == "__main__":
    _, _, queue_url, num_streams, num_tokens, pause_s = sys.argv
    asyncio.run(_feed(queue_url, int(num_streams), int(num_tokens), float(pause_s)))
