"""Workers that die, hang, stand still and come back."""

import asyncio
import time

from faults.load import until
from faults.processes import ServiceProcess
from faults.proofs import recovery, require_ends, require_some_resumed
from faults.table import Evidence, row
from faults.verifiable import Script
from faults.world import Shape, World

__all__ = [
    "device_is_lost",
    "killed_after_a_claim",
    "killed_after_a_push",
    "killed_before_a_push",
    "killed_in_decoding",
    "killed_in_prefill",
    "logits_are_not_finite",
    "no_memory_at_all",
    "out_of_memory",
    "prompt_kills",
    "step_hangs",
    "zombie_returns",
]


@row(
    "1",
    "kill -9 of a worker in a prefill",
    "another worker finishes; the first token comes within lease, sweep and prefill",
)
async def killed_in_prefill(world: World) -> Evidence:
    load = world.load
    others = load.ask_many(8)
    await load.flows(others)
    slow = load.ask(script=Script.SLOW_PREFILL, prompt_tokens=64, num_tokens=20)
    slow_id = world.job_id(slow)

    def worker_of_slow() -> str | None:
        return next((step.worker for step in world.steps() for chunk in step.chunks if slow_id in chunk[0]), None)

    await until(worker_of_slow, "the slow prefill to begin")
    struck_s = world.strike(f"kill -9 {worker_of_slow()} in a prefill", min_flowing=2)
    world.workers[worker_of_slow()].kill()
    await load.ended()
    require_ends(load.transcripts)
    first_s = next(at_s for at_s, event in slow.events if event in slow.deltas) - struck_s
    return {"first token after s": first_s, **recovery(world, allowance_s=1.0)}


@row(
    "2",
    "kill -9 of a worker while it decodes, at a random token",
    "no gap, no repeat; the pause is lease, sweep and a prefill",
    is_quick=True,
)
async def killed_in_decoding(world: World) -> Evidence:
    load = world.load
    load.ask_many(12)
    await load.flows(num_tokens=world.dice.randint(1, 60))
    victim = world.busiest_worker()
    world.strike(f"kill -9 {victim.name}", min_flowing=8)
    victim.kill()
    await load.ended()
    require_ends(load.transcripts)
    return {**await require_some_resumed(world), **recovery(world)}


async def _kill_at(world: World, place: str) -> Evidence:
    """One worker dies at a failpoint, in the middle of the load."""
    load = world.load
    doomed = await world.start_worker("doomed", "--failpoints", f"{place}=kill@{world.dice.randint(2, 12)}")
    load.ask_many(6)
    while doomed.is_running:
        load.ask_many(3, num_tokens=world.dice.randint(40, 120))
        await asyncio.sleep(0.1)
    world.strike(f"{doomed.name} died at {place}", min_flowing=3)
    await load.ended()
    require_ends(load.transcripts)
    return recovery(world)


@row("2a", "kill -9 of a worker between a claim and its first step", "the claimed jobs run elsewhere, from the start")
async def killed_after_a_claim(world: World) -> Evidence:
    return await _kill_at(world, "worker.claimed")


@row("2b", "kill -9 of a worker with tokens that are not logged", "nobody saw them; they are computed again, the same")
async def killed_before_a_push(world: World) -> Evidence:
    return await _kill_at(world, "worker.pushing")


@row("2c", "kill -9 of a worker that has logged tokens and does not know it", "they are seen once")
async def killed_after_a_push(world: World) -> Evidence:
    return await _kill_at(world, "worker.pushed")


async def _exits_by_itself(world: World, script: Script, *, within_s: float) -> Evidence:
    """A worker whose engine fails ends itself, and what it held goes on elsewhere."""
    load = world.load
    load.ask_many(10)
    await load.flows()
    load.ask(script=script, at=world.dice.randint(1, 40), num_tokens=60)
    await until(lambda: list(world.folder.glob("once-*")), "the script to act")
    acted_s = world.strike(f"{script.name} in a step", min_flowing=4)

    def ended_workers() -> list[ServiceProcess]:
        return [worker for worker in world.workers.values() if not worker.is_running]

    await until(ended_workers, f"a worker to end after {script.name}", timeout_s=within_s)
    exited_s = time.monotonic() - acted_s
    dead, *_ = ended_workers()
    world.note(f"{dead.name} ended")
    if await dead.wait() <= 0:
        raise AssertionError("the worker ended as if all were well")
    await load.ended()
    require_ends(load.transcripts)
    return {"exit after s": exited_s, **await require_some_resumed(world), **recovery(world, allowance_s=within_s)}


@row(
    "15",
    "the device is lost: a CUDA error that stays",
    "the process ends with an error within 5 s; its jobs go on elsewhere",
)
async def device_is_lost(world: World) -> Evidence:
    return await _exits_by_itself(world, Script.DEVICE_LOST, within_s=5.0)


@row(
    "14",
    "the device has no memory left for a step, three times",
    "the younger half waits, the step is tried again; no process ends, no job moves, no token differs",
    # One worker: a step that has one sequence only has no half.
    shape=Shape(workers=1),
    is_quick=True,
)
async def out_of_memory(world: World) -> Evidence:
    load = world.load
    load.ask_many(10, num_tokens=300)
    await load.flows()
    for _ in range(3):
        cramped = load.ask(script=Script.OUT_OF_MEMORY, at=world.dice.randint(1, 20), num_tokens=60)
        await until((world.folder / f"once-{world.job_id(cramped)}-0").exists, "the script to act")
        world.strike("no memory for a step", min_flowing=8)
    await load.ended()
    require_ends(load.transcripts)
    steps = await world.metric("oasst_worker_out_of_memory_total")
    resumed = await world.metric("oasst_worker_resumed_jobs_total")
    if steps < 3 or resumed or not all(worker.is_running for worker in world.workers.values()):
        raise AssertionError(f"{steps:g} steps had no memory, {resumed:g} jobs went elsewhere")
    preempted = await world.metric("oasst_worker_preemptions_total")
    return {"steps without memory": steps, "sequences preempted": preempted, **recovery(world)}


@row(
    "14b", "the device has no memory left, not even for the smallest step", "the process ends; its jobs go on elsewhere"
)
async def no_memory_at_all(world: World) -> Evidence:
    return await _exits_by_itself(world, Script.NO_MEMORY, within_s=5.0)


@row(
    "18",
    "a step that does not end",
    "the watchdog ends the process; its jobs go on elsewhere",
    shape=Shape(worker_options=("--step-limit-s", "1.5")),
)
async def step_hangs(world: World) -> Evidence:
    return await _exits_by_itself(world, Script.HANG, within_s=12.0)


@row(
    "16",
    "logits of one row that are not finite",
    "that request fails with NUMERIC; its batch mates do not notice",
    is_quick=True,
)
async def logits_are_not_finite(world: World) -> Evidence:
    load = world.load
    mates = load.ask_many(8)
    await load.flows()
    sick = load.ask(script=Script.NOT_FINITE, at=world.dice.randint(0, 30), num_tokens=40)
    await load.ended([sick])
    world.strike("a row failed", min_flowing=4)
    await load.ended()
    require_ends(mates)
    if sick.end != "NUMERIC" or sick.num_seen != sick.prompt.at:
        raise AssertionError(f"the sick request ended as {sick.end} after {sick.num_seen} tokens")
    return {"failed": 1, "mates unharmed": len(mates)}


@row(
    "17",
    "a prompt that kills whoever computes it",
    "three workers die of it at most, then it is dead and refused; everybody else's requests finish",
)
async def prompt_kills(world: World) -> Evidence:
    load = world.load
    async with world.supervised() as deaths, load.kept_up(8, num_tokens=60):
        await until(lambda: len(load.flowing) >= 6, "6 streams to flow")
        world.strike("a prompt that kills", min_flowing=6)
        sick = load.ask(script=Script.POISON)
        await load.ended([sick])
        await until(lambda: len(load.flowing) >= 6, "6 streams to flow")
        num_deaths = len(deaths)
        again = load.ask(prompt=sick.prompt)
        await load.ended([again])
    require_ends([sick], "POISON")
    require_ends([again], "POISON")
    require_ends([each for each in load.transcripts if each not in (sick, again)])
    if not 1 <= len(deaths) <= 3 or again.accepted or len(deaths) != num_deaths:
        raise AssertionError(f"{len(deaths)} workers died, {len(deaths) - num_deaths} after the prompt was known")
    world.expected_keys.add(f"{world.root}:dead")
    return {"workers lost": len(deaths), "requests of others": len(load.transcripts) - 2}


@row(
    "20",
    "a worker stands still for longer than its lease, then goes on",
    "its jobs go on elsewhere; every push of its own is refused",
    is_quick=True,
)
async def zombie_returns(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=300)
    await load.flows(num_tokens=world.dice.randint(1, 40))
    zombie = world.busiest_worker()
    world.strike(f"SIGSTOP {zombie.name}", min_flowing=8)
    zombie.pause()
    # Until its jobs are another's, which a lease and a sweep make them.
    others = [worker for worker in world.workers.values() if worker is not zombie]

    async def resumed() -> float:
        return sum([await worker.metric("oasst_worker_resumed_jobs_total") for worker in others])

    await until(resumed, "its jobs to go on elsewhere")
    world.strike(f"SIGCONT {zombie.name}", min_flowing=4)
    zombie.resume()
    await load.ended()
    require_ends(load.transcripts)
    fenced = await zombie.metric("oasst_worker_fenced_pushes_total")
    if not fenced:
        raise AssertionError("no push of the zombie was refused by its fence")
    return {"pushes refused": fenced, **recovery(world)}
