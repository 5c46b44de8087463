"""A whole service whose every part can be broken: Valkey, workers and gateways as processes, links between them."""

import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis.exceptions
from link import Link, linked
from oasst_client import AsyncClient, new_request_id
from oasst_jobs import JobState, QueueClient, connect, job_id_for
from valkey_server import ValkeyServer, free_port

from faults.checker import Transcript, queue_defects, stream_defects
from faults.cluster import Cluster, clustered
from faults.load import Load
from faults.machine import Clock, SmallDisk
from faults.processes import ServiceProcess
from faults.standby import Standby, replicating, watched_by_sentinel
from faults.verifiable import MODEL, MODEL_FOLDER

__all__ = ["DefectError", "Shape", "Step", "World"]

_TESTS = Path(__file__).parent.parent
_WORKER = Path(__file__).parent / "verifiable_worker.py"
_TENANT = "default"
_BALLAST_BYTES = 16 * 1024


class DefectError(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a world is made of."""

    workers: int = 2
    gateways: int = 2
    step_s: float = 0.01
    # Above the two seconds after which a sweep takes silence for a stall of everything.
    lease_s: float = 2.5
    worker_options: tuple[str, ...] = ()
    gateway_options: tuple[str, ...] = ()
    valkey_options: tuple[str, ...] = ()
    # Whether the queue's server has a replica, and whether a sentinel puts that in its place when it is gone.
    has_standby: bool = False
    has_sentinel: bool = False
    # Above one each has a server of its own, and these are a cluster.
    shards: int = 1
    # Size of a disk of its own for the queue's server; None for the machine's.
    disk_mib: int | None = None
    # Whose wall clock the world can set: "worker", "gateway", "valkey".
    clocks: frozenset[str] = frozenset()
    # Whether workers write down each step.
    has_ledgers: bool = True
    # A folder whose packages the processes use instead of ours.
    packages: Path | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A step of one worker's engine, as its ledger has it."""

    worker: str
    at_s: float
    # Sequence id, start and end of the tokens computed, index of the token drawn or None.
    chunks: tuple[tuple[str, int, int, int | None], ...]


class World:
    """Everything there is in one run of one fault."""

    def __init__(self, folder: Path, shape: Shape, dice: random.Random) -> None:
        self.folder = folder
        self.shape = shape
        self.dice = dice
        self.workers: dict[str, ServiceProcess] = {}
        self.gateways: dict[str, ServiceProcess] = {}
        self.clock = Clock(folder / "clock")
        self.disk = SmallDisk(folder / "disk")
        self.valkey_port = free_port() if shape.has_standby else 0
        self.valkey = self._make_valkey()
        self.standby: Standby | None = None
        self.cluster: Cluster | None = None
        # Where processes find the queue if not over links.
        self._direct_url = ""
        # What happened when, for whoever has to find out why a run failed.
        self.history: list[tuple[float, str]] = []
        self.load: Load
        self.queue: QueueClient
        # Whether accepted requests may be gone, and whether indexes may need repairs.
        self.has_lost_data = False
        self.has_broken_indexes = False
        # Keys that stay although the queue is at rest.
        self.expected_keys: set[str] = set()
        # One for each process, by its name; those of gateways to their callers are named `to` and the gateway.
        self.links: dict[str, Link] = {}
        self._exits = AsyncExitStack()
        self._floor: set[str] = set()

    def _make_valkey(self) -> ValkeyServer:
        prefix, options = self.clock.prefix if "valkey" in self.shape.clocks else (), self.shape.valkey_options
        if self.shape.disk_mib is not None:
            prefix, options = self.disk.prefix(self.shape.disk_mib), (*options, "--dir", str(self.disk.folder))
        if self.shape.has_standby:
            options = (*options, "--bind", "127.0.0.1", "--port", str(self.valkey_port))
        return ValkeyServer(self.folder, *options, prefix=prefix)

    # --- Making and ending it

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, shape: Shape, dice: random.Random) -> AsyncIterator["World"]:
        """A world that serves. Its streams are checked when the context is left without an error.

        Raises:
            DefectError: if a promise was broken.
        """
        world = cls(folder, shape, dice)
        async with world._exits:
            try:
                await world._start()
                yield world
                await world._check()
            except BaseException as error:
                world.note(f"{type(error).__name__}: {error}")
                world._keep_history()
                raise

    async def _start(self) -> None:
        self._connect(await self._start_queue())
        await self._redis.ping()  # The connection stays: later there may be none to be had.
        async with asyncio.TaskGroup() as starts:
            for index in range(self.shape.workers):
                starts.create_task(self.start_worker(f"worker-{index}"))
            for index in range(self.shape.gateways):
                starts.create_task(self.start_gateway(f"gateway-{index}"))
        client = await self._exits.enter_async_context(AsyncClient(self.address))
        self.load = Load(client, self.dice)
        self._exits.push_async_callback(self.load.close)
        await self._warm_up()

    async def _start_queue(self) -> str:
        """The queue's servers answer. Returns the URL that leads to whichever holds it."""
        if self.shape.shards > 1:
            self.cluster = await self._exits.enter_async_context(clustered(self.folder, self.shape.shards))
            self._direct_url = self.cluster.url
            return self._direct_url
        self.valkey.start()
        self._exits.callback(self.valkey.kill)
        if self.shape.has_standby:
            to_primary = await self._link("replication", f"127.0.0.1:{self.valkey_port}")
            self.standby = await self._exits.enter_async_context(
                replicating(self.folder / "standby", to_primary.address)
            )
        if self.shape.has_sentinel:
            self._direct_url = await self._exits.enter_async_context(watched_by_sentinel(self.folder, self.valkey_port))
        return self._direct_url or self.valkey.url

    async def _warm_up(self) -> None:
        """Connections are up, the functions are loaded, and it is known which keys a queue at rest has."""
        warm = self.load.ask_many(2 * self.shape.gateways, num_tokens=2)
        await self.load.ended(warm)
        self._refuse_defects(defect for transcript in warm for defect in stream_defects(transcript))
        self.load.transcripts.clear()
        self._floor = await self._lasting_keys()

    def _connect(self, url: str) -> None:
        self._redis = connect(url)
        self._exits.push_async_callback(self._redis.aclose)
        self.queue = QueueClient(self._redis, num_shards=self.shape.shards)

    async def start_worker(
        self, name: str, *options: str, step_s: float | None = None, packages: Path | None = None
    ) -> ServiceProcess:
        """A worker of this name serves, linked to the queue; with these packages instead of the world's."""
        shape = self.shape
        command = [
            *(sys.executable, str(_WORKER), "--step-s", str(shape.step_s if step_s is None else step_s)),
            *(("--ledger", str(self.folder / f"{name}.ledger")) if shape.has_ledgers else ()),
            *("--", "--worker-id", name),
            *("--redis-url", await self._queue_url(name), "--metrics-listen", "127.0.0.1:0"),
            *("--queue-shards", str(shape.shards), "--lease-s", str(shape.lease_s)),
            *(*shape.worker_options, *options),
        ]
        self.workers[name] = await self._run(name, "worker", command, packages)
        return self.workers[name]

    async def start_gateway(self, name: str, *options: str, packages: Path | None = None) -> ServiceProcess:
        """A gateway of this name serves, linked to queue and callers; at its old address if it was there before."""
        command = [
            *(sys.executable, "-m", "oasst_gateway", "--model", str(MODEL_FOLDER), "--model-name", MODEL),
            *("--gateway-id", name, "--redis-url", await self._queue_url(name), "--listen", "127.0.0.1:0"),
            *("--metrics-listen", "127.0.0.1:0", "--resume-secret", "the same on all gateways"),
            *("--queue-shards", str(self.shape.shards)),
            *(*self.shape.gateway_options, *options),
        ]
        self.gateways[name] = gateway = await self._run(name, "gateway", command, packages)
        to_gateway = await self._link(f"to {name}", gateway.listen)
        to_gateway.target = gateway.listen
        return gateway

    async def _queue_url(self, name: str) -> str:
        """Where this process finds the queue: over a link of its own, or by asking a sentinel or a cluster."""
        if self._direct_url:
            return self._direct_url
        link = await self._link(name, str(self.folder / "valkey.sock"))
        return f"redis://{link.address}/0"

    async def _link(self, name: str, target: str) -> Link:
        if name not in self.links:
            self.links[name] = await self._exits.enter_async_context(linked(target))
        return self.links[name]

    async def _run(self, name: str, role: str, command: list[str], packages: Path | None) -> ServiceProcess:
        log = self.folder / f"{name}.log"
        paths = [str(path) for path in (packages or self.shape.packages, _TESTS) if path]
        environment = {"PYTHONPATH": os.pathsep.join(paths)}
        if role in self.shape.clocks:
            environment |= self.clock.environment
        process = await ServiceProcess.start(name, command, log=log, environment=environment)
        self._exits.push_async_callback(process.end)
        return process

    async def fail_over(self) -> None:
        """The primary is gone for good, and its replica stands in its place, alone."""
        self.valkey.kill()
        await self.standby.promote()
        for name in (*self.workers, *self.gateways):
            self.links[name].target = self.standby.socket
        self._connect(self.standby.server.url)

    async def add_replica(self) -> None:
        """Who stands in for the primary has a replica again."""
        await self._exits.enter_async_context(
            replicating(self.folder / "second-standby", f"127.0.0.1:{self.standby.port}")
        )

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[list[str]]:
        """Workers that die are replaced as long as the context is open; gives the names of those that died."""
        deaths: list[str] = []

        async def replace_dead() -> None:
            while True:
                for name in [name for name, worker in self.workers.items() if not worker.is_running]:
                    self.note(f"{name} died")
                    deaths.append(name)
                    del self.workers[name]
                    await self.start_worker(f"worker-{len(deaths)}-after-{name}"[:60])
                await asyncio.sleep(0.05)

        supervisor = asyncio.create_task(replace_dead())
        try:
            yield deaths
        finally:
            supervisor.cancel()
            await asyncio.wait([supervisor])

    @property
    def root(self) -> str:
        """What every key of the queue begins with."""
        return self.queue.shards[0].keys.root

    @property
    def address(self) -> str:
        """Of all gateways, through their links."""
        return ",".join(link.address for name, link in self.links.items() if name.startswith("to "))

    def note(self, event: str) -> float:
        """The history has it; returns the time."""
        now_s = time.monotonic()
        self.history.append((now_s, event))
        return now_s

    def strike(self, event: str, *, min_flowing: int = 1) -> float:
        """The fault happens now, and it meets at least so many streams in the middle. Returns the time."""
        num_flowing = len(self.load.flowing)
        if num_flowing < min_flowing:
            raise self.load.missed(f"{event}: only {num_flowing} streams flow, {min_flowing} should")
        return self.note(f"{event}; {num_flowing} streams flowing")

    # --- Looking at it

    def steps(self, *workers: str) -> list[Step]:
        """Every step the workers' engines took so far, in time; without names those of all workers."""
        steps = []
        for ledger in self.folder.glob("*.ledger"):
            if not workers or ledger.stem in workers:
                lines = ledger.read_text().split("\n")[:-1]  # What stands behind the last is not whole.
                steps += [_read_step(ledger.stem, line) for line in lines]
        return sorted(steps, key=lambda step: step.at_s)

    def times_drawn(self) -> Counter[tuple[str, int]]:
        """How often each token was computed: sequence id and index of the token."""
        return Counter((chunk[0], chunk[3]) for step in self.steps() for chunk in step.chunks if chunk[3] is not None)

    def longest_standstill_s(self) -> float:
        """The longest time between two steps of an engine that had a sequence to go on with."""
        longest_s = 0.0
        for name in {step.worker for step in self.steps()}:
            for before, after in itertools.pairwise(self.steps(name)):
                if {chunk[0] for chunk in before.chunks} & {chunk[0] for chunk in after.chunks}:
                    longest_s = max(longest_s, after.at_s - before.at_s)
        return longest_s

    def busiest_worker(self) -> ServiceProcess:
        """The running worker with most sequences in its last step."""
        last = {step.worker: len(step.chunks) for step in self.steps() if self.workers[step.worker].is_running}
        return self.workers[max(last, key=lambda name: last[name])]

    async def busiest_gateway(self) -> ServiceProcess:
        """The running gateway with most streams."""
        running = [gateway for gateway in self.gateways.values() if gateway.is_running]
        streams = {each.name: await each.metric("oasst_gateway_requests_in_flight") for each in running}
        return self.gateways[max(streams, key=lambda name: streams[name])]

    def job_id(self, transcript: Transcript) -> str:
        return job_id_for(_TENANT, transcript.request_id)

    def shard_number(self, transcript: Transcript) -> int:
        return self.queue.shard_number(self.job_id(transcript))

    def new_request_id(self, shard: int) -> str:
        """An id whose request goes to this shard."""
        ids = (new_request_id() for _ in itertools.count())
        return next(each for each in ids if self.queue.shard_number(job_id_for(_TENANT, each)) == shard)

    async def state(self, transcript: Transcript) -> JobState | None:
        """Where the request is in its life; None if the queue does not know it."""
        snapshot = await self.queue.status(self.job_id(transcript))
        return None if snapshot is None else snapshot.state

    async def num_logged(self, transcript: Transcript) -> int | None:
        """How many of the request's tokens the queue holds; None if it does not know the request."""
        log = await self.queue.read(self.job_id(transcript), 0)
        return None if log is None else log.end_position

    async def job_number(self, transcript: Transcript, field: str) -> int:
        """What the queue has in this field of the request's job; 0 if it has none."""
        job_id = self.job_id(transcript)
        return int(await self._redis.hget(f"{self.queue.shard_of(job_id).keys.root}:job:{job_id}", field) or 0)

    async def job_versions(self) -> Counter[int]:
        """How many jobs there are of each version."""
        keys = [f"{self.root}:job:{self.job_id(transcript)}" for transcript in self.load.transcripts]
        return Counter([int(await self._redis.hget(key, "version")) for key in keys])

    async def metric(self, name: str, **labels: str) -> float:
        """The metric's sum over all processes that run."""
        processes = [*self.workers.values(), *self.gateways.values()]
        values = await asyncio.gather(*(each.metric(name, **labels) for each in processes if each.is_running))
        return sum(values)

    async def queue_info(self) -> dict[str, int]:
        """What the queue's server tells of its memory."""
        return await self._redis.info("memory")

    # --- Doing to the queue what no client of ours does

    async def fill_memory(self) -> None:
        """The queue's server holds more than it may, and refuses whatever takes memory."""
        await self._redis.config_set("maxmemory", 1)

    async def free_memory(self) -> None:
        """Undoes `fill_memory`."""
        await self._redis.config_set("maxmemory", 0)

    async def empty_queue(self) -> None:
        """The queue's server has lost everything."""
        await self._redis.execute_command("FLUSHALL")
        await self._redis.execute_command("FUNCTION", "FLUSH")
        self.has_lost_data = True

    async def write_until_refused(self) -> None:
        """The queue's server cannot write any more: its disk is full."""
        with suppress(redis.exceptions.ResponseError):
            for index in itertools.count():
                await self._redis.set(f"ballast:{index}", bytes(_BALLAST_BYTES), px=60_000)

    async def drop_from_waiting(self, transcripts: Sequence[Transcript]) -> None:
        """These requests wait, but are not in line; and something that is no request is."""
        self.has_broken_indexes = True
        waiting = f"{self.root}:waiting:{MODEL}"
        await self._redis.zrem(waiting, *(self.job_id(transcript) for transcript in transcripts))
        for index in (waiting, f"{self.root}:leases", f"{self.root}:deadlines"):
            await self._redis.zadd(index, {"nobody": 2**50})

    @asynccontextmanager
    async def hoarded_connections(self, num_connections: int = 64) -> AsyncIterator[None]:
        """Connections to the queue's server are held by nobody in particular, as many as it gives."""
        path = str(self.folder / "valkey.sock")
        writers = [(await asyncio.open_unix_connection(path))[1] for _ in range(num_connections)]
        try:
            yield
        finally:
            for writer in writers:
                writer.close()

    # --- Checking it

    async def _check(self) -> None:
        transcripts = self.load.transcripts
        await self.load.ended()
        self._refuse_defects(defect for transcript in transcripts for defect in stream_defects(transcript))
        states = {each.request_id: await self.state(each) for each in transcripts if each.accepted}
        if self.has_lost_data:
            states = {request_id: state for request_id, state in states.items() if state is not None}
        self._refuse_defects(queue_defects(transcripts, states))
        await self._come_to_rest()

    def _refuse_defects(self, defects: Iterator[str] | list[str]) -> None:
        found = list(defects)
        for defect in found:
            self.note(f"DEFECT {defect}")
        if found:
            raise DefectError(f"{len(found)} defects, the first: {found[0]}")

    async def _come_to_rest(self) -> None:
        """No key is left but those of a queue at rest and those that go by themselves; no engine holds anything."""
        left: set[str] = set()
        busy = 1.0
        for _ in range(100):
            left = await self._lasting_keys() - self._floor - self.expected_keys
            busy = await self.metric("oasst_worker_running_sequences")
            busy += await self.metric("oasst_worker_waiting_sequences")
            if not left and not busy:
                break
            await asyncio.sleep(0.1)
        else:
            raise DefectError(f"at rest, {len(left)} keys stay for ever ({sorted(left)[:3]}), {busy:g} sequences run")
        repairs = await self.metric("oasst_worker_reconcile_repairs_total")
        if repairs and not self.has_broken_indexes:
            raise DefectError(f"the queue disagreed with itself: {repairs:g} repairs")

    async def _lasting_keys(self) -> set[str]:
        """Keys that do not go by themselves."""
        keys = await self._redis.keys("*")
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.pttl(key)
            left_ms = await pipeline.execute()
        return {key.decode() for key, ms in zip(keys, left_ms, strict=True) if ms == -1}

    def _keep_history(self) -> None:
        began_s = self.history[0][0] if self.history else 0.0
        lines = [{"s": round(at_s - began_s, 4), "event": event} for at_s, event in self.history]
        for transcript in self.load.transcripts if hasattr(self, "load") else ():
            told = [(round(at_s - began_s, 4), repr(event)) for at_s, event in transcript.events]
            lines.append({"request": transcript.request_id, "end": transcript.end, "events": told})
        (self.folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_step(worker: str, line: str) -> Step:
    entry = json.loads(line)
    return Step(worker, entry["s"], tuple(tuple(chunk) for chunk in entry["chunks"]))
