"""The primary of the queue's servers is cut off from its replica, dies, and the replica stands in its place."""

import asyncio

from faults.load import FaultMissedError
from faults.proofs import recovery, require_ends
from faults.table import Evidence, row
from faults.world import Shape, World

__all__ = ["primary_is_cut_off_and_dies", "primary_is_cut_off_and_dies_unwaited", "sentinel_fails_over"]

# How long callers may wait for a word after the replica has taken over.
_BACK_S = 6.0

_REPLICATED = Shape(
    has_standby=True,
    gateway_options=("--durability", "replicated"),
    valkey_options=("--min-replicas-to-write", "1", "--min-replicas-max-lag", "1"),
)


@row(
    "7",
    "the primary is cut off from its replica, then dies; each acceptance waited for a replica",
    "nothing accepted is lost; streams go on behind what their callers have",
    shape=_REPLICATED,
)
async def primary_is_cut_off_and_dies(world: World) -> Evidence:
    evidence, cut_s = await _cut_then_fail_over(world)
    require_ends(world.load.transcripts)
    return {**evidence, **recovery(world, allowance_s=cut_s + _BACK_S)}


@row(
    "7b",
    "the same, and acceptances waited for no replica",
    "what was accepted during the cut is lost, and nothing else; callers ask again by themselves",
    shape=Shape(has_standby=True),
)
async def primary_is_cut_off_and_dies_unwaited(world: World) -> Evidence:
    world.has_lost_data = True
    evidence, cut_s = await _cut_then_fail_over(world)
    require_ends(world.load.transcripts, "FINISHED", "STREAM_DIVERGED")
    return {**evidence, **recovery(world, allowance_s=cut_s + _BACK_S)}


@row(
    "35",
    "the primary dies, and a sentinel makes its replica the primary",
    "gateways and workers follow by themselves; nothing accepted is lost, streams go on",
    shape=Shape(has_standby=True, has_sentinel=True),
)
async def sentinel_fails_over(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=300)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    world.strike("kill -9 of the primary", min_flowing=8)
    world.valkey.kill()
    await asyncio.sleep(world.dice.uniform(0.0, 2.0))
    load.ask_many(4)
    await load.ended()
    world.valkey.start()  # As a replica, as soon as the sentinel sees it.
    require_ends(load.transcripts)
    return recovery(world, allowance_s=_BACK_S)


async def _cut_then_fail_over(world: World) -> tuple[Evidence, float]:
    """What was lost with the primary, and how long it was cut off; all streams have ended."""
    load = world.load
    load.ask_many(12, num_tokens=400)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    cut_s = world.dice.uniform(0.3, 3.0)
    world.strike(f"primary and replica cut off from each other for {cut_s:.1f} s", min_flowing=8)
    world.links["replication"].cut()
    load.ask_many(4, num_tokens=400)
    await asyncio.sleep(cut_s)
    world.strike("kill -9 of the primary, its replica is promoted", min_flowing=8)
    accepted = [transcript for transcript in load.transcripts if transcript.accepted]
    num_seen = {transcript.request_id: transcript.num_seen for transcript in accepted}
    await world.fail_over()
    num_kept = {transcript.request_id: await world.num_logged(transcript) for transcript in accepted}
    num_lost = sum(max(0, seen - (num_kept[request_id] or 0)) for request_id, seen in num_seen.items())
    if not num_lost:
        raise FaultMissedError("the replica had all that callers had seen")
    await world.add_replica()
    await load.ended()
    return {"requests lost": list(num_kept.values()).count(None), "seen tokens lost": num_lost}, cut_s
