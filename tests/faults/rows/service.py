"""The service is restarted, asked to stop, watched and short of resources."""

import asyncio
import shutil
from pathlib import Path

import oasst_jobs
from oasst_jobs import JOB_VERSION

from faults.load import until
from faults.proofs import recovery, require_ends, tokens_computed_again
from faults.table import Evidence, row
from faults.world import Shape, World

__all__ = ["few_files", "killed_in_drain", "replaced_by_the_next_release", "rolling_restart_of_workers", "scraped"]


@row(
    "32a",
    "both workers are replaced, one after the other, under load",
    "no request fails, nobody waits for a lease",
    shape=Shape(worker_options=("--drain-s", "0.3")),
)
async def rolling_restart_of_workers(world: World) -> Evidence:
    load = world.load
    async with load.kept_up(10, num_tokens=60):
        for name in list(world.workers):
            leaving = world.workers[name]
            await until(lambda: len(load.flowing) >= 6, "6 streams to flow")
            world.strike(f"SIGTERM {name}, a new one starts", min_flowing=6)
            leaving.terminate()
            await world.start_worker(f"new-{name}")
            if await leaving.wait() != 0:
                raise AssertionError(f"{name} did not end well")
    require_ends(load.transcripts)
    again = tokens_computed_again(world)
    longest_s = max(transcript.longest_pause_s() for transcript in load.transcripts)
    if longest_s > world.shape.lease_s:
        raise AssertionError(f"a stream paused for {longest_s:.1f} s")
    return {
        "requests": len(load.transcripts),
        "tokens computed again": again,
        "longest pause s": longest_s,
    }


@row(
    "31",
    "the fleet is replaced, under load, by a release whose jobs the old workers do not know",
    "no request fails: old workers leave the new jobs to the new ones, which run both",
    shape=Shape(worker_options=("--drain-s", "0.3"), gateway_options=("--drain-grace-s", "0.2")),
)
async def replaced_by_the_next_release(world: World) -> Evidence:
    load = world.load
    packages = _make_next_release(world.folder / "next")
    async with load.kept_up(10, num_tokens=60):
        # Workers of both releases are there when the first new job comes, and when the last old one does.
        for name in ("worker-0", "gateway-0", "gateway-1", "worker-1"):
            await until(lambda: len(load.flowing) >= 6, "6 streams to flow")
            world.strike(f"{name} is replaced", min_flowing=6)
            leaving = (world.workers if name in world.workers else world.gateways)[name]
            leaving.terminate()
            if name in world.workers:
                await world.start_worker(f"new-{name}", packages=packages)
            if await leaving.wait() != 0:
                raise AssertionError(f"{name} did not end well")
            if name in world.gateways:
                await world.start_gateway(name, packages=packages)
    require_ends(load.transcripts)
    versions = await world.job_versions()
    old, new = versions[JOB_VERSION], versions[JOB_VERSION + 1]
    if not old or not new:
        raise AssertionError(f"there were {old} old jobs and {new} new ones")
    return {"old jobs": old, "new jobs": new, "tokens computed again": tokens_computed_again(world)}


def _make_next_release(folder: Path) -> Path:
    """`folder` holds the package of the queue with a new version of the job, and of the functions."""
    original = Path(oasst_jobs.__file__).parent
    copy = shutil.copytree(original, folder / original.name, ignore=shutil.ignore_patterns("__pycache__"))
    module, line = copy / "functions.py", f"\nJOB_VERSION = {JOB_VERSION}\n"
    text = module.read_text()
    if line not in text:
        raise ValueError("the version of jobs is not where it was")
    module.write_text(text.replace(line, f"\nJOB_VERSION = {JOB_VERSION + 1}\n"))
    with (copy / "functions.lua").open("a") as functions:
        functions.write("-- The next release.\n")
    return folder


@row(
    "33",
    "kill -9 of a worker that was asked to stop and gives its jobs back",
    "as if it had never been asked: its jobs go on elsewhere",
    shape=Shape(worker_options=("--drain-s", "0.2")),
)
async def killed_in_drain(world: World) -> Evidence:
    load = world.load
    load.ask_many(12, num_tokens=200)
    await load.flows(num_tokens=world.dice.randint(1, 40))
    leaving = world.busiest_worker()
    world.strike(f"SIGTERM, then kill -9 of {leaving.name}", min_flowing=8)
    leaving.terminate()
    await asyncio.sleep(world.dice.uniform(0.0, 0.25))
    leaving.kill()
    await load.ended()
    require_ends(load.transcripts)
    return recovery(world)


@row(
    "34",
    "metrics of every process are read many times a second",
    "a page takes no time; streams do not notice",
    is_timed=True,
)
async def scraped(world: World) -> Evidence:
    load = world.load
    await load.ended(load.ask_many(12, num_tokens=150))
    began_s = world.note("12 streams, unwatched")
    await load.ended(load.ask_many(12, num_tokens=150))
    usual_s = world.note("12 streams, watched") - began_s
    watched = load.ask_many(12, num_tokens=150)
    pages_s: list[float] = []
    began_s = world.note("scraping")
    while any(transcript.end is None for transcript in watched):
        for process in (*world.workers.values(), *world.gateways.values()):
            asked_s = world.note(f"GET /metrics of {process.name}")
            await process.get("/metrics")
            pages_s.append(world.note("read") - asked_s)
        await asyncio.sleep(0.05)
    watched_s = max(transcript.ended_s for transcript in watched) - began_s
    require_ends(load.transcripts)
    pages_s.sort()
    p99_s = pages_s[len(pages_s) * 99 // 100]
    if watched_s > 1.3 * usual_s + 0.2:
        raise AssertionError(f"streams took {watched_s:.2f} s while metrics were read, {usual_s:.2f} s otherwise")
    return {
        "pages": len(pages_s),
        "99 of 100 pages within s": p99_s,
        "streams took s": watched_s,
        "instead of s": usual_s,
    }


@row(
    "38",
    "the queue's server takes no more than 40 connections, and others hold all that are free",
    "who finds no connection is told or waits; all goes on once there are some",
    shape=Shape(valkey_options=("--maxclients", "40")),
)
async def few_files(world: World) -> Evidence:
    load = world.load
    running = load.ask_many(8, num_tokens=200)
    await load.flows(running)
    world.strike("every free connection of the queue's server is taken", min_flowing=6)
    async with world.hoarded_connections():
        crowd = load.ask_many(8, num_tokens=20)
        await load.ended([*running, *crowd])
    require_ends(running)
    require_ends(crowd, "FINISHED", "QUEUE_UNAVAILABLE")
    after = load.ask_many(6, num_tokens=20)
    await load.ended(after)
    require_ends(after)
    told = sum(transcript.end != "FINISHED" for transcript in crowd)
    return {"running ones finished": len(running), "of those that came": len(crowd), "were told": told}
