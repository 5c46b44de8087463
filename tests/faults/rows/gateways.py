"""Gateways that die and are replaced, and the ways between them and their callers."""

import asyncio

from oasst_client import AsyncClient

from faults.checker import Transcript
from faults.load import until
from faults.proofs import recovery, require_ends, tokens_computed_again
from faults.table import Evidence, row
from faults.world import Shape, World

__all__ = [
    "abandoned",
    "caller_comes_back_elsewhere",
    "connections_to_callers_break",
    "half_open",
    "is_replaced",
    "killed_before_queueing",
    "killed_before_the_answer",
    "killed_in_a_stream",
    "killed_while_sending",
    "unreachable_for_callers",
]

# A client that notices a silent connection within seconds; by default it asks every half minute.
_ATTENTIVE = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
)


_GRACE_S = 1.0


def num_resumes(transcripts: list[Transcript]) -> int:
    """How often the streams were taken up again."""
    return sum(transcript.num_resumes for transcript in transcripts)


def resumes(transcripts: list[Transcript]) -> dict[str, float]:
    """How often the streams were taken up again; at least once, or the fault met nothing."""
    total = num_resumes(transcripts)
    if not total:
        raise AssertionError("no stream was resumed: the fault met nothing")
    return {"resumes by callers": total}


@row(
    "3",
    "kill -9 of a gateway in the middle of its streams",
    "callers go on at the next token through the other gateway; nothing is computed twice",
    is_quick=True,
)
async def killed_in_a_stream(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=150)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    name = world.dice.choice(list(world.gateways))
    world.strike(f"kill -9 {name}", min_flowing=8)
    world.gateways[name].kill()
    await load.ended()
    require_ends(load.transcripts)
    return {**resumes(load.transcripts), **recovery(world)}


async def _kill_at(world: World, place: str) -> Evidence:
    """A gateway dies at a failpoint; its callers know another one's address as well."""
    load = world.load
    doomed = await world.start_gateway("doomed", "--failpoints", f"{place}=kill@{world.dice.randint(2, 8)}")
    addresses = f"{world.links['to doomed'].address},{world.links['to gateway-0'].address}"
    async with AsyncClient(addresses) as client:
        while doomed.is_running:
            load.ask_many(4, client=client, num_tokens=world.dice.randint(20, 80))
            await asyncio.sleep(0.05)
        world.note(f"the gateway died at {place}")
        await load.ended()
    require_ends(load.transcripts)
    again = tokens_computed_again(world)
    if again:
        raise AssertionError(f"{again} tokens were computed again for the death of a gateway")
    # The death itself shows that it met a request; whether the gateway had streams as well is left to chance.
    return {"resumes by callers": num_resumes(load.transcripts), "tokens computed again": again}


@row("3a", "kill -9 of a gateway that has a request and has not queued it", "it is queued once, through the other")
async def killed_before_queueing(world: World) -> Evidence:
    return await _kill_at(world, "gateway.submitting")


@row("3b", "kill -9 of a gateway that has queued a request and has told nobody", "it runs once, for its caller")
async def killed_before_the_answer(world: World) -> Evidence:
    return await _kill_at(world, "gateway.submitted")


@row("3c", "kill -9 of a gateway before an event it was about to send", "the event comes through the other, once")
async def killed_while_sending(world: World) -> Evidence:
    return await _kill_at(world, "gateway.sending")


@row("6e", "every connection between callers and gateways breaks (RST), three times", "callers go on at the next token")
async def connections_to_callers_break(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=200)
    await load.flows(num_tokens=world.dice.randint(1, 30))
    for _ in range(3):
        await until(lambda: len(load.flowing) == 12, "all streams to be back")
        world.strike("RST on every connection to callers", min_flowing=12)
        for name in world.gateways:
            world.links[f"to {name}"].reset()
        await asyncio.sleep(world.dice.uniform(0.1, 0.4))
    await load.ended()
    require_ends(load.transcripts)
    return {**resumes(load.transcripts), **recovery(world)}


@row("6f", "callers cannot reach a gateway any more, and nobody tells them", "keepalive notices; the other one goes on")
async def unreachable_for_callers(world: World) -> Evidence:
    load = world.load
    async with AsyncClient(world.address, options=_ATTENTIVE) as client:
        load.ask_many(12, client=client, num_tokens=200)
        await load.flows(num_tokens=world.dice.randint(1, 60))
        name = (await world.busiest_gateway()).name
        world.strike(f"{name} cut off from its callers", min_flowing=8)
        world.links[f"to {name}"].cut()
        await load.ended()
        world.links[f"to {name}"].heal()
    require_ends(load.transcripts)
    return {**resumes(load.transcripts), **recovery(world)}


@row(
    "22",
    "callers leave; others with their resume tokens come, to both gateways at once, and after the retention",
    "each sees the whole answer from its first token; after the retention it is NOT_FOUND",
    shape=Shape(gateway_options=("--retention-s", "3")),
)
async def caller_comes_back_elsewhere(world: World) -> Evidence:
    load = world.load
    first = [load.ask(num_tokens=150, detach_grace_s=10.0) for _ in range(8)]
    await load.flows(first, num_tokens=world.dice.randint(1, 60))
    world.strike("8 callers leave, 16 come", min_flowing=6)
    for transcript in first:
        load.leave(transcript)
    one, other = (gateway.listen for gateway in world.gateways.values())
    async with AsyncClient(one) as at_one, AsyncClient(other) as at_other:
        back = [load.watch(asked, client=client) for asked in first for client in (at_one, at_other)]
        await load.ended()
        require_ends(first, "LEFT")
        require_ends(back)
        await asyncio.sleep(3.5)
        late = [load.watch(asked, client=at_one) for asked in first]
        await load.ended(late)
    require_ends(late, "CHAT_NOT_FOUND")
    world.has_lost_data = True  # What was kept for its retention is gone, as it should be.
    again = tokens_computed_again(world)
    return {"came back": len(back), "came too late": len(late), "tokens computed again": again}


@row(
    "23b", "callers vanish and do not come back; their connections break", "after their grace the engine is rid of them"
)
async def abandoned(world: World) -> Evidence:
    # The grace, the interval in which gateways tell whom they watch, and a sweep.
    return await _vanish(world, breaks=True, limit_s=_GRACE_S + 5.0 + 2.0)


@row(
    "9",
    "callers vanish and nobody is told: their connections stay open",
    "keepalive notices within 40 s; after their grace the engine is rid of them",
    shape=Shape(step_s=0.05),
    max_seeds=2,
)
async def half_open(world: World) -> Evidence:
    return await _vanish(world, breaks=False, limit_s=30.0 + 10.0 + _GRACE_S + 5.0 + 2.0)


async def _vanish(world: World, *, breaks: bool, limit_s: float) -> Evidence:
    """Callers of one gateway are gone without a word; how long it takes until no step is spent on them."""
    load = world.load
    way = world.links["to gateway-0"]
    staying = load.ask_many(6, num_tokens=400)
    async with AsyncClient(way.address) as client:
        gone = [load.ask(client=client, num_tokens=1500, detach_grace_s=_GRACE_S) for _ in range(6)]
        await load.flows()
        left_s = world.strike("6 callers vanish", min_flowing=10)
        way.cut()
        for transcript in gone:
            load.leave(transcript)
        await load.ended(gone)
        if breaks:
            way.reset()
    ids = {world.job_id(transcript) for transcript in gone}

    async def are_over() -> bool:
        states = [await world.state(transcript) for transcript in gone]
        return all(state and state.is_terminal for state in states)

    await until(are_over, "those that vanished to be cancelled", timeout_s=limit_s)
    last_s = max(step.at_s for step in world.steps() if any(chunk[0].partition("/")[0] in ids for chunk in step.chunks))
    way.heal()
    await load.ended()
    require_ends(staying)
    return {"vanished": len(gone), "engine free after s": last_s - left_s}


@row(
    "32b",
    "both gateways are replaced, one after the other, under load",
    "open streams are handed over; no request fails, nothing is computed twice",
    shape=Shape(gateway_options=("--drain-grace-s", "0.2")),
)
async def is_replaced(world: World) -> Evidence:
    load = world.load
    async with load.kept_up(10, num_tokens=100):
        for name in list(world.gateways):
            leaving = world.gateways[name]
            await until(lambda: len(load.flowing) >= 8, "8 streams to flow")
            world.strike(f"SIGTERM {name}, a new one starts in its place", min_flowing=8)
            leaving.terminate()
            if await leaving.wait() != 0:
                raise AssertionError(f"{name} did not end well")
            await world.start_gateway(name)
    require_ends(load.transcripts)
    again = tokens_computed_again(world)
    if again:
        raise AssertionError(f"{again} tokens were computed again")
    return {"requests": len(load.transcripts), **resumes(load.transcripts), "tokens computed again": again}
