"""Machines whose clocks jump and whose disks are full."""

import asyncio

from faults.machine import Clock, SmallDisk
from faults.proofs import recovery, require_ends, require_none_taken_away
from faults.table import Evidence, row
from faults.world import Shape, World

__all__ = ["clock_of_the_queue_jumps_back", "clock_of_the_queue_jumps_on", "clocks_of_the_service_jump", "disk_is_full"]

_HOUR_S = 3600


async def _jump(world: World, *offsets_s: int) -> None:
    load = world.load
    # Deadlines that no slow machine misses, and that any of the jumps would.
    load.ask_many(12, num_tokens=250, timeout_s=900.0)
    await load.flows(num_tokens=world.dice.randint(1, 40))
    for offset_s in offsets_s:
        world.strike(f"the clock says {offset_s:+d} s", min_flowing=8)
        world.clock.set(offset_s)
        await asyncio.sleep(0.6)
    load.ask_many(4, num_tokens=40, timeout_s=900.0)
    await load.ended()
    require_ends(load.transcripts)


@row(
    "10",
    "the clocks of workers and gateways jump an hour on, then two back",
    "nothing is seen of it",
    shape=Shape(clocks=frozenset({"worker", "gateway"})),
    needs=Clock.is_possible,
)
async def clocks_of_the_service_jump(world: World) -> Evidence:
    await _jump(world, _HOUR_S, -_HOUR_S)
    return {**await require_none_taken_away(world), **recovery(world)}


@row(
    "11a",
    "the clock of the queue's machine jumps 30 s on",
    "no live worker loses a job",
    shape=Shape(clocks=frozenset({"valkey"})),
    needs=Clock.is_possible,
)
async def clock_of_the_queue_jumps_on(world: World) -> Evidence:
    await _jump(world, 30)
    return {**await require_none_taken_away(world), **recovery(world)}


@row(
    "11b",
    "the clock of the queue's machine jumps an hour back, then a worker dies",
    "streams go on; the dead worker's jobs are not held for an hour",
    shape=Shape(clocks=frozenset({"valkey"})),
    needs=Clock.is_possible,
)
async def clock_of_the_queue_jumps_back(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=250)
    await load.flows(num_tokens=world.dice.randint(1, 40))
    victim = world.busiest_worker()
    world.strike(f"kill -9 {victim.name}, and an hour back", min_flowing=8)
    victim.kill()
    world.clock.set(-_HOUR_S)
    await load.ended()
    require_ends(load.transcripts)
    return recovery(world, allowance_s=world.shape.lease_s)


@row(
    "12",
    "the disk of the queue's server is full",
    "new requests are refused with a reason; running ones go on once there is space",
    shape=Shape(disk_mib=4),
    needs=SmallDisk.is_possible,
)
async def disk_is_full(world: World) -> Evidence:
    load = world.load
    running = load.ask_many(8, num_tokens=250)
    await load.flows(running)
    await world.write_until_refused()
    world.strike("the disk is full", min_flowing=6)
    refused = load.ask_many(4)
    await load.ended(refused)
    require_ends(refused, "QUEUE_UNAVAILABLE")
    world.disk.grow(world.valkey.pid, 64)
    freed_s = world.note("there is space again")
    await load.ended(running)
    require_ends(running)
    return {"refused": len(refused), "running ones finished": len(running), "after s": world.note("done") - freed_s}
