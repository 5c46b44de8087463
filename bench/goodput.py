"""What gateway and queue leave of a worker's speed, and what becomes of it when too much is asked for.

The worker's steps take a known time, so that its own rate is known: sequences over seconds of a step.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oasst_client import APIError, AsyncClient, DeadlineExceededError, OverloadedError, RetryPolicy
from rich.table import Table

from bench.gateway import MODEL, first_line, running_gateway, start

__all__ = ["GoodputRow", "ShareRow", "goodput_table", "measure_goodput", "measure_share", "share_table"]

_QUESTION = "Hello!"


@dataclass(frozen=True)
class ShareRow:
    streams: int
    step_ms: float
    worker_tokens_per_s: float  # Its own rate.
    tokens_per_s: float  # What callers saw.

    @property
    def share(self) -> float:
        return self.tokens_per_s / self.worker_tokens_per_s


@dataclass(frozen=True)
class GoodputRow:
    load: float  # Asked for, as a multiple of what the worker can do.
    requests: int
    refused: int
    late: int  # Accepted, and not done by their deadline.
    good_tokens_per_s: float  # Of requests that were done by their deadline.
    worker_tokens_per_s: float


def measure_share(streams: int, *, step_s: float, tokens: int) -> ShareRow:
    """So many streams at once, each of so many tokens; counted between the first token of all and the last of any."""
    with _service(streams, step_s) as address:
        elapsed_s = asyncio.run(_stream_all(address, streams, tokens))
    return ShareRow(streams, step_s * 1e3, streams / step_s, streams * (tokens - 1) / elapsed_s)


def measure_goodput(
    loads: Sequence[float], *, sequences: int = 16, step_s: float = 0.02, tokens: int = 64, seconds: float = 15.0
) -> list[GoodputRow]:
    """Requests at random times, each with twice the time that it takes on an idle worker, plus a second."""
    deadline_s = 2 * tokens * step_s + 1
    capacity = sequences / step_s
    rows = []
    for load in loads:
        with _service(sequences, step_s) as address:
            rate = load * capacity / tokens
            requests, refused, late, good = asyncio.run(_arrive(address, rate, seconds, tokens, deadline_s))
        rows.append(GoodputRow(load, requests, refused, late, good * tokens / seconds, capacity))
    return rows


def share_table(rows: Sequence[ShareRow]) -> Table:
    table = Table(title="Tokens per second through gateway and queue, as a share of the worker's own rate")
    for heading in ("streams", "step", "worker's own", "seen by callers", "share"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.streams),
            f"{row.step_ms:g} ms",
            f"{row.worker_tokens_per_s:.0f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.share:.2f}",
        )
    return table


def goodput_table(rows: Sequence[GoodputRow]) -> Table:
    table = Table(title="Tokens per second of requests that were done by their deadline")
    for heading in ("load", "requests", "refused", "late", "good tokens/s", "of the worker's rate", "of the best"):
        table.add_column(heading, justify="right")
    best = max(row.good_tokens_per_s for row in rows)
    for row in rows:
        table.add_row(
            f"{row.load:g}x",
            str(row.requests),
            str(row.refused),
            str(row.late),
            f"{row.good_tokens_per_s:.0f}",
            f"{row.good_tokens_per_s / row.worker_tokens_per_s:.2f}",
            f"{row.good_tokens_per_s / best:.2f}",
        )
    return table


@contextlib.contextmanager
def _service(sequences: int, step_s: float) -> Iterator[str]:
    """The address of a gateway with one timed worker."""
    with running_gateway() as (_, address, url), contextlib.ExitStack() as exits:
        options = ["--redis-url", url, "--metrics-listen", "127.0.0.1:0", "--log-level", "warning"]
        options += ["--max-sequences", str(sequences), "--step-tokens", str(sequences * 16 + 512)]
        first_line(start(exits, sys.executable, "-m", "bench.timed_worker", str(step_s), *options))
        yield address


async def _stream_all(address: str, streams: int, tokens: int) -> float:
    """Seconds from the first token of the last to begin, to the last token of all."""
    async with AsyncClient(address) as client:
        begun_s: list[float] = []

        async def read() -> None:
            async with client.stream(_QUESTION, model=MODEL, max_new_tokens=tokens, ignore_eos=True) as stream:
                num_pieces = 0
                async for _ in stream:
                    if not num_pieces:
                        begun_s.append(time.perf_counter())
                    num_pieces += 1

        await asyncio.gather(*(read() for _ in range(streams)))
        return time.perf_counter() - max(begun_s)


async def _arrive(
    address: str, rate: float, seconds: float, tokens: int, deadline_s: float
) -> tuple[int, int, int, int]:
    """How many requests there were, were refused, were late, and were done in time."""
    outcomes = {"refused": 0, "late": 0, "good": 0}
    draw = random.Random(0)
    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:

        async def ask() -> None:
            try:
                await client.chat(_QUESTION, model=MODEL, max_new_tokens=tokens, ignore_eos=True, timeout_s=deadline_s)
                outcomes["good"] += 1
            except OverloadedError:
                outcomes["refused"] += 1
            except (DeadlineExceededError, APIError):
                outcomes["late"] += 1

        # So that the gateway has seen how fast the worker is.
        await asyncio.gather(*(client.chat(_QUESTION, max_new_tokens=tokens, ignore_eos=True) for _ in range(16)))
        await asyncio.sleep(1.5)
        asked, due_s = [], time.perf_counter()
        ends_s = due_s + seconds
        while (due_s := due_s + draw.expovariate(rate)) < ends_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            asked.append(asyncio.create_task(ask()))
        await asyncio.gather(*asked)
    return len(asked), outcomes["refused"], outcomes["late"], outcomes["good"]
