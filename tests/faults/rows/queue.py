"""The queue's server dies, hangs, is slow, is full, is emptied, or disagrees with itself."""

import asyncio

from faults.load import until
from faults.proofs import recovery, require_ends, require_none_taken_away, tokens_computed_again
from faults.table import Evidence, row
from faults.world import Shape, World

__all__ = [
    "disagrees_with_itself",
    "emptied",
    "hangs_for_longer_than_a_lease",
    "is_killed",
    "is_slow",
    "memory_is_full",
]

# How long callers may wait for a word after the queue has come back.
_BACK_S = 4.0


@row(
    "4",
    "kill -9 of the queue's server, back after up to 4 s",
    "every accepted request finishes; no live worker loses a job",
    is_quick=True,
)
async def is_killed(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    away_s = world.dice.uniform(0.3, 4.0)
    world.strike(f"kill -9 of the queue's server for {away_s:.1f} s", min_flowing=8)
    world.valkey.kill()
    await asyncio.sleep(away_s)
    world.valkey.start()
    await load.ended()
    require_ends(load.transcripts)
    return {**await require_none_taken_away(world), **recovery(world, allowance_s=away_s + _BACK_S)}


@row(
    "5",
    "the queue's server stands still for longer than every lease",
    "streams pause, then go on; no live worker loses a job",
)
async def hangs_for_longer_than_a_lease(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    still_s = world.shape.lease_s + world.dice.uniform(1.0, 6.0)
    world.strike(f"SIGSTOP of the queue's server for {still_s:.1f} s", min_flowing=8)
    world.valkey.pause()
    await asyncio.sleep(still_s)
    world.valkey.resume()
    await load.ended()
    require_ends(load.transcripts)
    return {**await require_none_taken_away(world), **recovery(world, allowance_s=still_s + _BACK_S)}


@row(
    "13",
    "the queue's memory is full",
    "new requests are refused with a reason, running ones finish",
)
async def memory_is_full(world: World) -> Evidence:
    load = world.load
    running = load.ask_many(8, num_tokens=250)
    await load.flows(running)
    await world.fill_memory()
    world.strike("memory is full", min_flowing=6)
    refused = load.ask_many(4)
    await load.ended(refused)
    require_ends(refused, "QUEUE_UNAVAILABLE")
    await load.ended(running)
    require_ends(running)
    await world.free_memory()
    after = load.ask_many(4)
    await load.ended(after)
    require_ends(after)
    return {"refused": len(refused), "running ones finished": len(running)}


@row(
    "36",
    "the queue is emptied (FLUSHALL), functions and all",
    "callers ask again and go on behind what they have, or are told; no stream is silent",
)
async def emptied(world: World) -> Evidence:
    load = world.load
    before = load.ask_many(12, num_tokens=200)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    struck_s = world.strike("FLUSHALL, FUNCTION FLUSH", min_flowing=8)
    await world.empty_queue()
    await load.ended(before, timeout_s=30)
    require_ends(before, "FINISHED", "JOB_LOST", "STREAM_DIVERGED")
    told_s = max(transcript.ended_s for transcript in before) - struck_s
    after = load.ask_many(4)
    await load.ended(after)
    require_ends(after)
    told = sum(transcript.end != "FINISHED" for transcript in before)
    return {"went on": len(before) - told, "were told": told, "over after s": told_s}


@row(
    "40",
    "the queue disagrees with itself: requests that wait are not in line, and what is in line does not exist",
    "it is put right within a minute and counted; in all other rows the count stays 0",
    shape=Shape(workers=1, worker_options=("--max-sequences", "4")),
)
async def disagrees_with_itself(world: World) -> Evidence:
    load = world.load
    running = [load.ask(num_tokens=300) for _ in range(4)]
    await load.flows(running)
    waiting = [load.ask(num_tokens=20) for _ in range(6)]
    await until(lambda: all(transcript.accepted for transcript in waiting), "requests to wait")
    struck_s = world.strike("3 requests that wait are not in line, 3 that do not exist are", min_flowing=4)
    await world.drop_from_waiting(world.dice.sample(waiting, 3))
    await load.ended(timeout_s=90)
    require_ends(load.transcripts)

    async def repairs() -> float:
        return await world.metric("oasst_worker_reconcile_repairs_total")

    async def are_all_repaired() -> bool:
        return await repairs() >= 4

    await until(are_all_repaired, "the index entries of nobody to go", timeout_s=60)
    over_s = max(transcript.ended_s for transcript in waiting) - struck_s
    return {"repairs": await repairs(), "all answered after s": over_s}


@row("37", "every way to the queue takes 50 ms longer", "tokens come as fast as before", is_timed=True)
async def is_slow(world: World) -> Evidence:
    load = world.load
    await _run_once(world)
    usual_s = await _run_once(world)
    world.note("50 ms on every way to the queue")
    for name in (*world.workers, *world.gateways):
        world.links[name].delay_s = 0.05
    slow_s = await _run_once(world)
    require_ends(load.transcripts)
    # A submit, a claim and the last push each go there and back.
    if slow_s > 1.05 * usual_s + 0.6:
        raise AssertionError(f"the same streams took {slow_s:.2f} s instead of {usual_s:.2f} s")
    return {"streams took s": slow_s, "instead of s": usual_s, "tokens computed again": tokens_computed_again(world)}


async def _run_once(world: World) -> float:
    """How long 12 streams take together."""
    started_s = world.note("12 streams")
    await world.load.ended(world.load.ask_many(12, num_tokens=200))
    return world.note("ended") - started_s
