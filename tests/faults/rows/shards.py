"""The server of one shard of the queue is away, those of the others are not."""

import asyncio
import time
from collections.abc import Sequence

from faults.checker import Transcript
from faults.proofs import recovery, require_ends, require_none_taken_away
from faults.table import Evidence, row
from faults.world import Shape, World

__all__ = ["one_is_away"]

_NUM_SHARDS = 3
# How long the streams of the others may pause at most, and their callers wait until they are accepted: less than half
# of a lease, and of what a client waits for a server that hangs.
_NORMAL_S = 1.0
# How long callers may wait for a word after the shard has come back.
_BACK_S = 4.0
_BETWEEN_REQUESTS_S = 0.5


@row(
    "5b",
    "one of three shards is away for longer than every lease: its server is killed, or stands still",
    "streams of the other shards go on without a pause, and take new ones; its own pause, then go on; no live worker "
    "loses a job",
    shape=Shape(shards=_NUM_SHARDS, step_s=0.02),
    is_timed=True,
)
async def one_is_away(world: World) -> Evidence:
    load = world.load
    for shard in range(_NUM_SHARDS):
        for num_choices in (1, 1, 1, 2):
            load.ask(num_tokens=500, num_choices=num_choices, request_id=world.new_request_id(shard))
    await load.flows(num_tokens=world.dice.randint(1, 40))
    away = world.dice.randrange(_NUM_SHARDS)
    others = [shard for shard in range(_NUM_SHARDS) if shard != away]
    away_s = world.shape.lease_s + world.dice.uniform(1.0, 4.0)
    server, is_killed = world.cluster.servers[away], world.dice.random() < 0.5
    world.strike(f"{'kill -9' if is_killed else 'SIGSTOP'} of shard {away} for {away_s:.1f} s", min_flowing=10)
    if is_killed:
        server.kill()
    else:
        server.pause()
    asked = await _ask_anew(world, others, for_s=away_s)
    world.strike(f"shard {away} is back", min_flowing=8)
    if is_killed:
        await asyncio.to_thread(server.start)  # Callers go on meanwhile.
    else:
        server.resume()
    await load.ended()
    require_ends(load.transcripts)
    elsewhere = [transcript for transcript in load.transcripts if world.shard_number(transcript) != away]
    figures = _require_unnoticed(elsewhere, asked)
    await _require_first_attempts(world, elsewhere)
    return {
        "of other shards": len(elsewhere),
        "asked meanwhile": len(asked),
        **figures,
        **await require_none_taken_away(world),
        **recovery(world, allowance_s=away_s + _BACK_S),
    }


async def _ask_anew(world: World, shards: Sequence[int], *, for_s: float) -> list[tuple[float, Transcript]]:
    """New requests have come to these shards for so long; each with the time it came at."""
    asked: list[tuple[float, Transcript]] = []
    ends_s = time.monotonic() + for_s
    while (left_s := ends_s - time.monotonic()) > 0:
        for shard in shards:
            asked.append((time.monotonic(), world.load.ask(num_tokens=20, request_id=world.new_request_id(shard))))
        await asyncio.sleep(min(left_s, _BETWEEN_REQUESTS_S))
    return asked


def _require_unnoticed(transcripts: Sequence[Transcript], asked: Sequence[tuple[float, Transcript]]) -> Evidence:
    """None of these streams paused, and new ones were accepted at once."""
    pause_s = max(transcript.longest_pause_s() for transcript in transcripts)
    accepted_s = max(transcript.events[0][0] - asked_s for asked_s, transcript in asked)
    if pause_s > _NORMAL_S or accepted_s > _NORMAL_S:
        raise AssertionError(
            f"elsewhere a stream paused for {pause_s:.1f} s, one was accepted after {accepted_s:.1f} s"
        )
    over_s = max(transcript.ended_s - asked_s for asked_s, transcript in asked)
    return {"accepted after s": accepted_s, "over after s": over_s, "longest pause there s": pause_s}


async def _require_first_attempts(world: World, transcripts: Sequence[Transcript]) -> None:
    """Each of these jobs was claimed once, never lost its lease, and was never suspected: none ran alone."""
    for transcript in transcripts:
        claims, lost, charge = [
            await world.job_number(transcript, name) for name in ("fences", "lost_leases", "charge")
        ]
        if (claims, lost, charge) != (1, 0, 0):
            raise AssertionError(f"a job elsewhere had {claims} claims, {lost} lost leases, a charge of {charge}")
