"""What gateway and queue leave of a worker's speed, with steps that take a given time."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from oasst_client import AsyncClient
from rich.table import Table

from bench.options import Measured, Options
from bench.services import MODEL, steps_of, timed_service
from bench.turns import median_of

__all__ = ["ShareRow", "measure", "seen_tokens_per_s", "share_table"]

# Streams, seconds of a step, tokens of each stream.
_LOADS = ((1, 0.01, 400), (64, 0.025, 200), (256, 0.05, 200))


@dataclass(frozen=True)
class ShareRow:
    """Medians of the rounds."""

    streams: int
    step_ms: float
    worker_tokens_per_s: float  # Streams over the mean seconds of its steps.
    tokens_per_s: float  # What callers saw; see `seen_tokens_per_s`.
    share: float


def measure(options: Options) -> Measured:
    rows = [median_of([_measure(*load) for _ in range(options.rounds)]) for load in _LOADS]
    return rows, [share_table(rows)]


def share_table(rows: list[ShareRow]) -> Table:
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


def seen_tokens_per_s(arrivals_s: Sequence[Sequence[float]]) -> float:
    """By when each stream's tokens arrived: from the first token of the last to begin, to the last token of all."""
    all_begun_s = max(arrived_s[0] for arrived_s in arrivals_s)
    ended_s = max(arrived_s[-1] for arrived_s in arrivals_s)
    num_tokens = sum(token_s > all_begun_s for arrived_s in arrivals_s for token_s in arrived_s)
    return num_tokens / (ended_s - all_begun_s)


def _measure(streams: int, step_s: float, tokens: int) -> ShareRow:
    """So many streams at once, each of so many tokens."""
    with timed_service(streams, step_s) as service:
        seen = seen_tokens_per_s(asyncio.run(_stream_all(service.address, streams, tokens)))
        num_steps, seconds = steps_of(service.worker_metrics)
    own = streams * num_steps / seconds
    return ShareRow(streams, step_s * 1e3, own, seen, seen / own)


async def _stream_all(address: str, streams: int, tokens: int) -> list[list[float]]:
    """When each token of each stream arrived, in seconds."""
    async with AsyncClient(address) as client:

        async def read() -> list[float]:
            async with client.stream("Hello!", model=MODEL, max_new_tokens=tokens, ignore_eos=True) as stream:
                return [time.perf_counter() async for _ in stream.tokens()]

        return await asyncio.gather(*(read() for _ in range(streams)))
