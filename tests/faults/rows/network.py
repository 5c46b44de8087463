"""Ways between processes that are cut, and connections that break."""

import asyncio

from faults.load import until
from faults.proofs import recovery, require_ends, require_none_taken_away
from faults.table import Evidence, row
from faults.world import World

__all__ = [
    "connections_to_the_queue_break",
    "gateway_is_cut_off_from_the_queue",
    "worker_is_cut_off_for_long",
    "worker_is_cut_off_for_short",
]


# A worker that is back notices with its next call, after the one it waits for has timed out and been backed off.
_REFUSED_WITHIN_S = 10.0


@row("6a", "a gateway is cut off from the queue for 1 to 6 s", "its streams pause, then go on where they were")
async def gateway_is_cut_off_from_the_queue(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    name = world.dice.choice(list(world.gateways))
    cut_s = world.dice.uniform(1.0, 6.0)
    world.strike(f"{name} cut off from the queue for {cut_s:.1f} s", min_flowing=8)
    world.links[name].cut()
    await asyncio.sleep(cut_s)
    world.links[name].heal()
    await load.ended()
    require_ends(load.transcripts)
    return {**await require_none_taken_away(world), **recovery(world, allowance_s=cut_s)}


@row("6b", "a worker is cut off from the queue for less than its lease", "nobody else gets its jobs")
async def worker_is_cut_off_for_short(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    name = world.busiest_worker().name
    cut_s = world.dice.uniform(0.3, 0.5) * world.shape.lease_s
    world.strike(f"{name} cut off from the queue for {cut_s:.1f} s", min_flowing=8)
    world.links[name].cut()
    await asyncio.sleep(cut_s)
    world.links[name].heal()
    await load.ended()
    require_ends(load.transcripts)
    return {**await require_none_taken_away(world), **recovery(world)}


@row(
    "6c",
    "a worker is cut off from the queue for longer than its lease",
    "its jobs go on elsewhere; back again, it is refused and drops them",
)
async def worker_is_cut_off_for_long(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    cut_off = world.busiest_worker()
    cut_s = world.shape.lease_s + world.dice.uniform(2.0, 5.0)
    world.strike(f"{cut_off.name} cut off from the queue for {cut_s:.1f} s", min_flowing=8)
    world.links[cut_off.name].cut()
    await asyncio.sleep(cut_s)
    world.links[cut_off.name].heal()
    await load.ended()
    require_ends(load.transcripts)

    async def fenced() -> float:
        return await cut_off.metric("oasst_worker_fenced_pushes_total")

    await until(fenced, "the worker that is back to be refused", timeout_s=_REFUSED_WITHIN_S)
    return {"pushes refused": await fenced(), **recovery(world)}


@row(
    "6d",
    "every connection to the queue breaks (RST), three times, with answers under way",
    "nothing is seen of it",
    is_quick=True,
)
async def connections_to_the_queue_break(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 30))
    ways = [world.links[name] for name in (*world.workers, *world.gateways)]
    for way in ways:
        way.delay_s = 0.02  # Longer than a step: there is always a call whose answer is under way, and is lost.
    for _ in range(3):
        await asyncio.sleep(world.dice.uniform(0.1, 0.3))
        world.strike("RST on every connection to the queue", min_flowing=8)
        for way in ways:
            way.reset()
    await load.ended()
    require_ends(load.transcripts)
    return {**await require_none_taken_away(world), **recovery(world)}
