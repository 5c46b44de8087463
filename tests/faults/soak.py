"""Hundreds of streams for minutes: no defect, and memory of gateways, workers and the queue's server stays flat."""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from faults.checker import FINISHED, stream_defects
from faults.world import DefectError, Shape, World

__all__ = ["Usage", "growth", "soak"]

_SAMPLES = 60
# A process that grows by no more than this from one half of the time to the other is flat: allocators breathe.
_FLAT_SHARE = 0.05
_FLAT_BYTES = 4 * 2**20


@dataclass
class Usage:
    """Memory over time, by what uses it; bytes."""

    samples: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, num_bytes: int) -> None:
        self.samples.setdefault(name, []).append(num_bytes)


def growth(samples: Sequence[int]) -> tuple[float, float]:
    """Median of the second and of the last quarter. The first is left out: caches and pools fill then."""
    quarter = len(samples) // 4
    return statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])


async def soak(world: World, *, num_streams: int, duration_s: float, num_tokens: int) -> tuple[Usage, int, int]:
    """Memory, and how many streams and tokens there were. Each stream was right from its first token to its last."""
    ends_s = time.monotonic() + duration_s
    counts = {"streams": 0, "tokens": 0}

    async def one_after_another() -> None:
        while time.monotonic() < ends_s:
            # Of different lengths, so that they do not all begin and end together.
            transcript = world.load.ask(num_tokens=world.dice.randint(num_tokens // 2, num_tokens * 3 // 2))
            await world.load.ended([transcript])
            defects = stream_defects(transcript)
            if defects or transcript.end != FINISHED:
                raise DefectError(f"{transcript.request_id} ended as {transcript.end}; {defects}")
            counts["streams"] += 1
            counts["tokens"] += transcript.num_seen
            world.load.forget(transcript)

    usage = Usage()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_streams):
            tasks.create_task(one_after_another())
        while time.monotonic() < ends_s:
            await asyncio.sleep(duration_s / _SAMPLES)
            for process in (*world.workers.values(), *world.gateways.values()):
                usage.add(process.name, psutil.Process(process.pid).memory_info().rss)
            usage.add("data in the queue", (await world.queue_info())["used_memory"])
    return usage, counts["streams"], counts["tokens"]


def report(usage: Usage) -> tuple[str, list[str]]:
    """The table in Markdown, and what is not flat."""
    lines, grown = ["| memory of | second quarter | last quarter | change |", "|---|---:|---:|---:|"], []
    for name, samples in usage.samples.items():
        before, after = growth(samples)
        lines.append(f"| {name} | {before / 2**20:.1f} MiB | {after / 2**20:.1f} MiB | {after / before - 1:+.1%} |")
        if after - before > max(_FLAT_SHARE * before, _FLAT_BYTES):
            grown.append(name)
    return "\n".join(lines), grown


async def run(options: argparse.Namespace) -> int:
    shape = Shape(
        step_s=options.step_s,
        has_ledgers=False,
        worker_options=("--max-sequences", str(options.streams), "--step-tokens", "4096", "--log-level", "warning"),
        # Answers go after seconds, not minutes, so that coming and going balance early.
        gateway_options=("--retention-s", "5", "--log-level", "warning"),
    )
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        async with World.open(Path(folder), shape, random.Random(options.seed)) as world:
            usage, num_streams, num_tokens = await soak(
                world, num_streams=options.streams, duration_s=60 * options.minutes, num_tokens=options.tokens
            )
    table, grown = report(usage)
    print(
        f"{options.streams} streams at a time for {options.minutes:g} minutes: {num_streams:,} requests,"
        f" {num_tokens:,} tokens, no defect.\n\n{table}"
    )
    if grown:
        print(f"not flat: {', '.join(grown)}", file=sys.stderr)
    return int(bool(grown))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="mean length of an answer")
    parser.add_argument("--step-s", type=float, default=0.1, help="duration of an engine step")
    parser.add_argument("--seed", type=int, default=1)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
