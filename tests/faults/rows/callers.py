"""Callers that leave, come twice, come in crowds, read slowly or run out of time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from oasst_client import APIError, AsyncClient, OverloadedError, RetryPolicy, new_request_id
from oasst_gateway.tenants import ApiKey, draw_api_key

from faults.checker import FINISHED, Transcript
from faults.load import FaultMissedError, until
from faults.proofs import recovery, require_ends
from faults.table import Evidence, row
from faults.verifiable import Prompt
from faults.world import Shape, World

__all__ = [
    "ask_twice_at_once",
    "cancel_all_at_once",
    "flood",
    "leave",
    "read_slowly",
    "run_out_of_time_in_the_queue",
    "storm_in_a_full_queue",
    "storm_of_retries",
]

# Who comes again without waiting comes so often at once.
_STORMING = 16
_AT_ONCE = RetryPolicy(max_attempts=1)


@row(
    "8",
    "a caller that reads one event and no more",
    "no other stream is slower; its answer waits for it whole",
    is_timed=True,
)
async def read_slowly(world: World) -> Evidence:
    load = world.load
    usual_s = await _run_together(world)
    slow = load.ask(num_tokens=300, think_s=0.02)
    await load.flows([slow])
    beside_s = await _run_together(world)
    world.strike("a slow reader beside others", min_flowing=1)
    await load.ended([slow])
    require_ends(load.transcripts)
    if beside_s > 1.5 * usual_s:
        raise AssertionError(f"beside a slow reader the streams took {beside_s:.2f} s instead of {usual_s:.2f} s")
    return {"others took s": beside_s, "instead of s": usual_s}


async def _run_together(world: World) -> float:
    """How long 8 streams take together."""
    started_s = world.note("8 streams")
    await world.load.ended(world.load.ask_many(8, num_tokens=100))
    return world.note("ended") - started_s


@row(
    "19",
    "the same request comes twice at once, through both gateways, and a third time later",
    "it is generated once, and every caller sees all of it",
    is_quick=True,
)
async def ask_twice_at_once(world: World) -> Evidence:
    load = world.load
    requests = [(new_request_id(), Prompt(world.dice.randrange(2**20)), world.dice.getrandbits(63)) for _ in range(6)]

    def ask_all(client: AsyncClient) -> list[Transcript]:
        return [
            load.ask(client=client, request_id=request_id, prompt=prompt, seed=seed, num_tokens=100)
            for request_id, prompt, seed in requests
        ]

    first_address, second_address = (gateway.listen for gateway in world.gateways.values())
    async with AsyncClient(first_address) as first, AsyncClient(second_address) as second:
        at_once = [*ask_all(first), *ask_all(second)]
        await load.flows(at_once)
        world.strike("the same requests for the third time", min_flowing=6)
        ask_all(first)
        await load.ended()
    require_ends(load.transcripts)
    generated = len({sequence for (sequence, _), _ in world.times_drawn().items() if _is_asked(world, sequence)})
    again = [token for token, times in world.times_drawn().items() if times > 1]
    if generated != len(requests) or again:
        raise AssertionError(f"{len(requests)} requests, {generated} generations, {len(again)} tokens computed again")
    return {"callers": len(load.transcripts), "generations": generated}


def _is_asked(world: World, sequence_id: str) -> bool:
    asked = {world.job_id(transcript) for transcript in world.load.transcripts}
    return sequence_id.partition("/")[0] in asked


@row(
    "24",
    "a flood: far more requests at once than the queue may hold",
    "no more than the cap are accepted, the rest refused at once with a time to come back; accepted ones finish",
    # Slow enough that the queue fills however slowly the crowd comes.
    shape=Shape(gateway_options=("--max-waiting-jobs", "60"), worker_options=("--max-sequences", "8")),
)
async def flood(world: World) -> Evidence:
    load = world.load
    before = load.ask_many(10, num_tokens=200)
    await load.flows(before)
    world.strike("400 requests at once", min_flowing=8)
    async with AsyncClient(world.address, retry=RetryPolicy(max_attempts=1)) as impatient:
        crowd = [load.ask(num_tokens=30, client=impatient) for _ in range(400)]
        await load.ended()
    require_ends(before)
    require_ends(crowd, FINISHED, "QUEUE_FULL")
    refused = [transcript for transcript in crowd if transcript.end != FINISHED]
    if not refused:
        raise AssertionError("nothing was refused: the flood was none")
    if any(transcript.retry_after_s is None for transcript in refused):
        raise AssertionError("a refusal did not say when to come back")
    return {"accepted": len(crowd) - len(refused), "refused": len(refused)}


@row(
    "25",
    "a storm of retries: one tenant's callers come again at once, each time they are refused",
    "they get no more than their tenant's share; another tenant's requests all finish, without a long pause",
    shape=Shape(workers=1, worker_options=("--max-sequences", "16")),
    is_timed=True,
)
async def storm_of_retries(world: World) -> Evidence:
    async with _two_tenants(world, "max_waiting_requests = 8\n") as (polite, stormy):
        return await _storm(world, polite, stormy, num_callers=2 * _STORMING)


@row(
    "25b",
    "the same, by a tenant without a limit of its own: it fills the queue",
    "another tenant's requests are not refused even once, and all finish, without a long pause",
    shape=Shape(workers=1, worker_options=("--max-sequences", "16")),
    is_timed=True,
)
async def storm_in_a_full_queue(world: World) -> Evidence:
    async with _two_tenants(world, "", "--max-waiting-jobs", "16", retry=_AT_ONCE) as (polite, stormy):
        return await _storm(world, polite, stormy, num_callers=3 * _STORMING)


@asynccontextmanager
async def _two_tenants(
    world: World, limits: str, *gateway_options: str, retry: RetryPolicy | None = None
) -> AsyncIterator[tuple[AsyncClient, AsyncClient]]:
    """Callers of two tenants and of a gateway that knows both. The second has limits and comes again at once."""
    polite_key, stormy_key = draw_api_key(), draw_api_key()
    tenants = world.folder / "tenants.toml"
    # The world looks for requests of the tenant `default`.
    tenants.write_text(_tenant("default", polite_key) + _tenant("stormy", stormy_key, limits))
    await world.start_gateway("guarded", "--tenants", str(tenants), *gateway_options)
    address = world.links["to guarded"].address
    async with (
        AsyncClient(address, api_key=polite_key.key, retry=retry or RetryPolicy()) as polite,
        AsyncClient(address, api_key=stormy_key.key, retry=_AT_ONCE) as stormy,
    ):
        yield polite, stormy


async def _storm(world: World, polite: AsyncClient, stormy: AsyncClient, *, num_callers: int) -> Evidence:
    load = world.load
    usual = load.ask_many(8, client=polite, num_tokens=100)
    await load.ended()
    outcomes: Counter[str] = Counter()
    storm = [asyncio.create_task(_come_again_at_once(stormy, world, outcomes)) for _ in range(num_callers)]
    try:
        await until(lambda: outcomes["refused"] >= _STORMING, "the storm")
        among = load.ask_many(8, client=polite, num_tokens=100)
        await load.flows(among)
        world.strike(f"a storm; {outcomes['refused']} were refused so far", min_flowing=8)
        await load.ended()
    finally:
        for caller in storm:
            caller.cancel()
        await asyncio.wait(storm)
    require_ends(load.transcripts)
    if outcomes["failed"]:
        raise AssertionError(f"{outcomes['failed']} requests of the storm were neither answered nor refused")
    return {
        "answered in the storm": outcomes["answered"],
        "refused": outcomes["refused"],
        "others took s": _longest_s(among),
        "instead of s": _longest_s(usual),
        # How much slower is left to the machine: storm, gateway and worker share its cores.
        **recovery(world, allowance_s=-world.shape.lease_s),
    }


def _tenant(name: str, key: ApiKey, more: str = "") -> str:
    keys = f'[{{ id = "{key.key_id}", sha256 = "{key.sha256}" }}]'
    return f'[[tenants]]\nname = "{name}"\nkeys = {keys}\nis_trusted = true\n{more}'


async def _come_again_at_once(client: AsyncClient, world: World, outcomes: Counter[str]) -> None:
    prompt = Prompt(world.dice.randrange(2**20)).token_ids()
    while True:
        try:
            async with client.stream(token_ids=prompt, max_new_tokens=20, ignore_eos=True) as stream:
                async for _ in stream:
                    pass
            outcomes["answered"] += 1
        except OverloadedError:
            outcomes["refused"] += 1
        except APIError:
            outcomes["failed"] += 1


def _longest_s(transcripts: list[Transcript]) -> float:
    """From the first event of a stream to its last, of the slowest."""
    return max(transcript.events[-1][0] - transcript.events[0][0] for transcript in transcripts)


@row(
    "29",
    "the deadline passes while the request waits",
    "DEADLINE_EXCEEDED in time, and no step is spent on it",
    shape=Shape(workers=1, worker_options=("--max-sequences", "4")),
)
async def run_out_of_time_in_the_queue(world: World) -> Evidence:
    load = world.load
    running = [load.ask(num_tokens=200) for _ in range(4)]
    await load.flows(running)
    timeout_s = world.dice.uniform(0.2, 0.6)
    asked_s = world.strike(f"6 requests that may take {timeout_s:.2f} s", min_flowing=4)
    late = [load.ask(timeout_s=timeout_s) for _ in range(6)]
    await load.ended(late)
    told_s = world.note("all are told") - asked_s
    if any(transcript.end == "DEADLINE_UNREACHABLE" for transcript in late):
        raise FaultMissedError("the worker was so slow that requests were refused instead of left to wait")
    require_ends(late, "DEADLINE_EXCEEDED")
    if told_s > timeout_s + 1.0:
        raise AssertionError(f"they were told after {told_s:.2f} s that {timeout_s:.2f} s are over")
    await load.ended(running)
    require_ends(running)
    ids = {world.job_id(transcript) for transcript in late}
    spent = sum(chunk[0].partition("/")[0] in ids for step in world.steps() for chunk in step.chunks)
    if spent:
        raise AssertionError(f"{spent} steps were spent on requests that were over")
    return {"expired": len(late), "steps spent on them": spent, "told after s": told_s}


@row(
    "23",
    "callers leave in the middle and do not come back",
    "the engine is rid of them within two steps and a push; the others do not notice",
    is_timed=True,
)
async def leave(world: World) -> Evidence:
    return await _cancel(world, num_streams=12, num_leaving=6)


@row(
    "30",
    "a storm of cancellations: 96 of 100 streams leave at once",
    "every slot is free within two steps and a push; the others do not notice",
    shape=Shape(worker_options=("--max-sequences", "128")),
    is_timed=True,
)
async def cancel_all_at_once(world: World) -> Evidence:
    return await _cancel(world, num_streams=100, num_leaving=96)


async def _cancel(world: World, *, num_streams: int, num_leaving: int) -> Evidence:
    load = world.load
    load.ask_many(num_streams, num_tokens=300)
    await load.flows()
    leaving = world.dice.sample(load.transcripts, num_leaving)
    staying = [transcript for transcript in load.transcripts if transcript not in leaving]
    left_s = world.strike(f"{num_leaving} callers leave", min_flowing=num_streams)
    for transcript in leaving:
        load.leave(transcript)
    await load.ended()
    require_ends(staying)
    require_ends(leaving, "LEFT")
    ids = {world.job_id(transcript) for transcript in leaving}
    last_s = max(step.at_s for step in world.steps() if any(chunk[0].partition("/")[0] in ids for chunk in step.chunks))
    # Two steps and a push; the rest is the way of 100 cancellations through two gateways on shared cores.
    if last_s - left_s > 2 * world.shape.step_s + 0.02 * num_leaving + 0.5:
        raise AssertionError(f"the engine worked for callers that had left {last_s - left_s:.2f} s before")
    return {"left": num_leaving, "engine free after s": max(0.0, last_s - left_s)}
