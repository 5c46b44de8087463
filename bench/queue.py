"""The queue alone, on a Valkey of its own: what tokens, claims and waiting jobs cost, and how soon a job is claimed."""

import asyncio
import itertools
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import redis.asyncio
from oasst.jobs.v1 import job_pb2
from oasst.v1 import generation_pb2
from oasst_cli.up.valkey import find_server
from oasst_jobs import (
    JOB_VERSION,
    ClaimedJob,
    Claimer,
    PushItem,
    PushStatus,
    QueueClient,
    QueueLimits,
    Reconciler,
    Submitter,
    Sweeper,
    connect,
    job_id_for,
)
from rich.table import Table

from bench.options import Measured, Options
from bench.turns import median_of

__all__ = ["ClaimRow", "MemoryRow", "PollRow", "PushRow", "QueueFigures", "WakeRow", "measure", "queue_table"]

_STREAMS = (1, 8, 32, 128)

_MODEL = "measured"
_PROMPT_TOKENS = 128
_STEP_S = 0.025  # Of a worker of 40 steps a second, which says how many pushes share the renewal of a lease.
_LEASE_MS = 4_000
_SUBMITS_AT_ONCE = 200
_NUM_CALLS = 300
_IDLE_PROCESSES = 50
_IDLE_SECONDS = 4
_START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class PushRow:
    """Tokens of so many streams, one each in every push."""

    streams: int
    server_us_per_token: float  # Processor time.
    worker_us_per_token: float  # Processor time of building, packing and sending the push.


@dataclass(frozen=True)
class ClaimRow:
    """One claim and one submit with so many jobs waiting."""

    waiting_jobs: int
    claim_us: float  # Processor time of the server.
    submit_us: float


@dataclass(frozen=True)
class MemoryRow:
    bytes_per_waiting_job: float
    bytes_per_logged_token: float


@dataclass(frozen=True)
class PollRow:
    """What a process that has nothing to do costs the server each second, with so many workers known."""

    workers: int
    gateway_us: float  # Processor time: it looks at the load, sweeps, and waits for news.
    worker_us: float  # It beats, sweeps, reconciles, waits for work and looks for some.


@dataclass(frozen=True)
class WakeRow:
    """From the begin of a submit to the end of an idle worker's claim, milliseconds."""

    median_ms: float
    p99_ms: float


@dataclass(frozen=True)
class QueueFigures:
    """Medians of the rounds."""

    server: str
    pushes: list[PushRow]
    claims: list[ClaimRow]
    memory: MemoryRow
    polls: list[PollRow]
    wake: WakeRow


_Row = TypeVar("_Row")


def measure(options: Options) -> Measured:
    """A million waiting jobs take a minute to submit in each round, and 1.5 GB."""
    figures = asyncio.run(_measure(options.waiting, options.rounds))
    return [figures], [queue_table(figures)]


def queue_table(figures: QueueFigures) -> Table:
    table = Table(title=f"Queue alone on {figures.server}, append-only file synced every second")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for push in figures.pushes:
        table.add_row(f"server per token, {push.streams} streams", f"{push.server_us_per_token:.1f} us")
        table.add_row(f"worker per token, {push.streams} streams", f"{push.worker_us_per_token:.1f} us")
    for claim in figures.claims:
        table.add_row(f"claim, {claim.waiting_jobs:,} jobs waiting", f"{claim.claim_us:.0f} us")
        table.add_row(f"submit, {claim.waiting_jobs:,} jobs waiting", f"{claim.submit_us:.0f} us")
    table.add_row("memory of a waiting job of 128 tokens", f"{figures.memory.bytes_per_waiting_job:.0f} bytes")
    table.add_row("memory of a logged token", f"{figures.memory.bytes_per_logged_token:.0f} bytes")
    for poll in figures.polls:
        table.add_row(f"idle gateway, {poll.workers} workers known", f"{poll.gateway_us:.0f} us/s")
        table.add_row(f"idle worker, {poll.workers} workers known", f"{poll.worker_us:.0f} us/s")
    table.add_row("submit to claim by an idle worker, median", f"{figures.wake.median_ms:.1f} ms")
    table.add_row("submit to claim by an idle worker, 99th percentile", f"{figures.wake.p99_ms:.1f} ms")
    return table


async def _measure(waiting_jobs: Sequence[int], rounds: int) -> QueueFigures:
    async with _fresh_queue() as queue:
        server = await queue.version()
    return QueueFigures(
        server,
        pushes=[await _median(rounds, partial(_pushes, number)) for number in _STREAMS],
        claims=await _claims(waiting_jobs, rounds),
        memory=await _median(rounds, _memory),
        polls=[await _median(rounds, partial(_polls, workers)) for workers in (_IDLE_PROCESSES, 20 * _IDLE_PROCESSES)],
        wake=await _median(rounds, _wake),
    )


async def _median(rounds: int, measure_once: Callable[[], Awaitable[_Row]]) -> _Row:
    return median_of([await measure_once() for _ in range(rounds)])


class _Queue:
    """A queue on a server that does nothing else."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.redis = client
        self.client = QueueClient(client)
        limits = QueueLimits(max_waiting_jobs=None)
        self.submitter = Submitter(self.client, gateway_id="gateway", limits=limits)
        self.claimer = Claimer(self.client, worker_id="worker", model=_MODEL, lease_ms=120_000)
        self._numbers = itertools.count()

    async def version(self) -> str:
        info = await self.redis.info("server")
        return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"

    async def submit(self, number: int) -> None:
        """So many jobs wait more, of 100 tenants."""
        for start in range(0, number, _SUBMITS_AT_ONCE):
            await asyncio.gather(*(self._submit_one() for _ in range(min(_SUBMITS_AT_ONCE, number - start))))

    async def _submit_one(self) -> None:
        number = next(self._numbers)
        tenant = f"tenant {number % 100}"
        job = job_pb2.Job(
            version=JOB_VERSION,
            job_id=job_id_for(tenant, str(number)),
            tenant=tenant,
            model=_MODEL,
            prompt_token_ids=range(1000, 1000 + _PROMPT_TOKENS),
            sampling=generation_pb2.SamplingParams(temperature=1.0, top_p=0.9, seed=number),
            limits=generation_pb2.GenerationLimits(max_new_tokens=256),
            n=1,
            request_id=str(number),
        )
        await self.submitter.submit(job, digest=bytes(32), timeout_ms=3_600_000)

    async def server_s(self) -> float:
        """Processor time that the server has used."""
        info = await self.redis.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    async def memory_bytes(self) -> int:
        return int((await self.redis.info("memory"))["used_memory"])

    async def log_bytes(self, claims: list[ClaimedJob]) -> int:
        """Memory of these jobs' logs."""
        root = self.client.shards[0].keys.root
        return sum([await self.redis.memory_usage(f"{root}:log:{claim.job_id}", samples=0) for claim in claims])


@asynccontextmanager
async def _fresh_queue() -> AsyncIterator[_Queue]:
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        socket = Path(folder) / "valkey.sock"
        command = [
            *(str(find_server()), "--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"),
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        client = connect(f"unix://{socket}")
        try:
            await _wait_for(client)
            yield _Queue(client)
        finally:
            await client.aclose()
            process.kill()
            await process.wait()


async def _wait_for(client: redis.asyncio.Redis) -> None:
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            try:
                await client.ping()
            except redis.exceptions.ConnectionError:
                await asyncio.sleep(0.02)
            else:
                return


async def _pushes(streams: int) -> PushRow:
    steps = max(20, 4000 // streams)
    async with _fresh_queue() as queue:
        await queue.submit(streams)
        claims = await queue.claimer.claim(max_jobs=streams, max_tokens=2**50)
        await _push(queue, claims, 0, 10)  # Warms up.
        server_s, worker_s = await queue.server_s(), time.process_time()
        await _push(queue, claims, 10, 10 + steps)
        server_s, worker_s = await queue.server_s() - server_s, time.process_time() - worker_s
    tokens = streams * steps
    return PushRow(streams, server_s / tokens * 1e6, worker_s / tokens * 1e6)


async def _push(queue: _Queue, claims: list[ClaimedJob], first: int, last: int) -> None:
    steps_per_renewal = round(_LEASE_MS / 3 / 1000 / _STEP_S)
    for step in range(first, last):
        items = [
            PushItem(claim.job_id, claim.fence, step, _entry(step), renews=step % steps_per_renewal == 0)
            for claim in claims
        ]
        statuses = await queue.claimer.push(items)
        if any(status is not PushStatus.OK for status in statuses):
            raise RuntimeError("a push was refused")


def _entry(position: int) -> job_pb2.LogEntry:
    delta = generation_pb2.Delta(position=position, text=" word", token_ids=[1000 + position])
    return job_pb2.LogEntry(end_position=position + 1, deltas=[delta])


async def _claims(waiting_jobs: Sequence[int], rounds: int) -> list[ClaimRow]:
    """Few jobs wait first, then more on the same server."""
    rows_of_rounds = [await _claim_among(waiting_jobs) for _ in range(rounds)]
    return [median_of(rows) for rows in zip(*rows_of_rounds, strict=True)]


async def _claim_among(waiting_jobs: Sequence[int]) -> list[ClaimRow]:
    rows = []
    async with _fresh_queue() as queue:
        num_waiting = 0
        for number in sorted(waiting_jobs):
            await queue.submit(number - num_waiting)
            num_waiting = number
            start_s = await queue.server_s()
            await queue.submit(_NUM_CALLS)
            submitted_s = await queue.server_s()
            await _claim_one_by_one(queue, _NUM_CALLS)
            claimed_s = await queue.server_s()
            claim_us, submit_us = (
                (end_s - begin_s) / _NUM_CALLS * 1e6
                for begin_s, end_s in ((submitted_s, claimed_s), (start_s, submitted_s))
            )
            rows.append(ClaimRow(number, claim_us, submit_us))
    return rows


async def _claim_one_by_one(queue: _Queue, number: int) -> None:
    for _ in range(number):
        if len(await queue.claimer.claim(max_jobs=1, max_tokens=2**50)) != 1:
            raise RuntimeError("a claim found nothing")


async def _memory() -> MemoryRow:
    async with _fresh_queue() as queue:
        await queue.submit(1)
        before = await queue.memory_bytes()
        await queue.submit(10_000)
        waiting = await queue.memory_bytes()
        claims = await queue.claimer.claim(max_jobs=100, max_tokens=2**50)
        await _push(queue, claims, 0, 200)
        logged = await queue.log_bytes(claims)
    return MemoryRow((waiting - before) / 10_000, logged / (100 * 200))


async def _polls(workers: int) -> PollRow:
    """Each as often a second as the processes themselves."""
    async with _fresh_queue() as queue:
        names = [f"worker-{number}" for number in range(workers)]
        claimers = [Claimer(queue.client, worker_id=name, model=_MODEL, lease_ms=_LEASE_MS) for name in names]
        statuses = [job_pb2.WorkerStatus(worker_id=name, model=_MODEL, version="0") for name in names]
        for claimer, status in zip(claimers, statuses, strict=True):
            await claimer.heartbeat(status)
        [shard] = queue.client.shards
        sweeper, reconciler = Sweeper(queue.client), Reconciler(queue.client)

        async def gateway(number: int) -> None:
            await queue.submitter.load(_MODEL)
            await sweeper.sweep()
            await shard.read_updates(f"gateway-{number}", "0")

        async def worker(number: int) -> None:
            await claimers[number].heartbeat(statuses[number])
            await sweeper.sweep()
            for _ in range(2):
                await reconciler.walk()
            for is_scoring in (False, True):
                await claimers[number].wait_for_work(1.0, is_scoring=is_scoring)
                await claimers[number].claim(max_jobs=1, max_tokens=2**50, is_scoring=is_scoring)

        gateway_us, worker_us = [await _cost_us(queue, poll) for poll in (gateway, worker)]
        return PollRow(workers, gateway_us, worker_us)


async def _cost_us(queue: _Queue, poll: Callable[[int], Awaitable[None]]) -> float:
    """Processor time of the server for one process's second."""
    await asyncio.gather(*map(poll, range(_IDLE_PROCESSES)))  # Connects.
    before_s = await queue.server_s()
    for _ in range(_IDLE_SECONDS):
        await asyncio.gather(*map(poll, range(_IDLE_PROCESSES)))
    return (await queue.server_s() - before_s) / (_IDLE_SECONDS * _IDLE_PROCESSES) * 1e6


async def _wake() -> WakeRow:
    """A worker without work waits; jobs come one at a time."""
    times_ms = []
    async with _fresh_queue() as queue:
        await queue.client.check_server()
        for _ in range(300):
            waiting = asyncio.create_task(queue.claimer.wait_for_work(10.0))
            await asyncio.sleep(0.005)
            started_s = time.perf_counter()
            await queue.submit(1)
            await waiting
            if len(await queue.claimer.claim(max_jobs=1, max_tokens=2**50)) != 1:
                raise RuntimeError("the worker was woken for nothing")
            times_ms.append((time.perf_counter() - started_s) * 1e3)
    return WakeRow(statistics.median(times_ms), statistics.quantiles(times_ms, n=100, method="inclusive")[98])
