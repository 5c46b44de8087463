"""Workers die, hang, lose answers and give back; Redis dies too. Every reader still sees one whole, right stream.

Token i of a job is a function of the job and i alone, so two workers that run a job one after the other must continue
each other's text, and any gap, repeat or stale write shows in what the readers collected.
"""

import asyncio
import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import redis.asyncio
import redis.exceptions
from job_samples import MODEL, make_job, news_of
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_jobs import (
    ClaimedJob,
    Claimer,
    Inbox,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueLimits,
    QueueUnavailableError,
    Reconciler,
    Submitter,
    Sweeper,
    TenantPolicy,
    connect,
)

LEASE_MS = 150
NUM_WORKERS = 5
GATEWAYS = ("gateway-1", "gateway-2")
POLICIES = {"a": TenantPolicy(weight=0.5), "b": TenantPolicy(), "c": TenantPolicy(weight=4.0)}


def length_of(job_id: str) -> int:
    return 3 + int(job_id[:4], 16) % 25


def token_of(job_id: str, position: int) -> int:
    return int(hashlib.sha256(f"{job_id} {position}".encode()).hexdigest()[:4], 16)


def entry_of(job_id: str, start: int, stop: int) -> job_pb2.LogEntry:
    tokens = [token_of(job_id, position) for position in range(start, stop)]
    text = "".join(f"{token} " for token in tokens)
    return job_pb2.LogEntry(
        end_position=stop, deltas=[generation_pb2.Delta(position=start, text=text, token_ids=tokens)]
    )


class LossyRedis(redis.asyncio.Redis):
    """Loses some calls before and some answers after they were carried out, and repeats some calls."""

    dice: random.Random
    loss = 0.03

    async def execute_command(self, *command: object, **options: object) -> object:
        if self.dice.random() < self.loss:
            raise redis.exceptions.ConnectionError("call lost")
        reply = await super().execute_command(*command, **options)
        if command[0] == "FCALL" and self.dice.random() < self.loss:
            reply = await super().execute_command(*command, **options)
        if self.dice.random() < self.loss:
            raise redis.exceptions.ConnectionError("answer lost")
        return reply


@dataclass
class SimulatedWorker:
    """A worker and its successors: one that dies is followed by another, with another id and no memory."""

    client: QueueClient
    name: str
    dice: random.Random
    events: Counter[str]
    held: dict[str, tuple[ClaimedJob, int]] = field(default_factory=dict)

    async def run(self) -> None:
        life = 0
        while True:
            life += 1
            claimer = Claimer(self.client, worker_id=f"{self.name}-{life}", model=MODEL, lease_ms=LEASE_MS)
            self.held.clear()
            while self.dice.random() > 0.02:
                await self.step(claimer)
            self.events["deaths"] += 1

    async def step(self, claimer: Claimer) -> None:
        if len(self.held) < 8 and not any(claimed.is_solo for claimed, _ in self.held.values()):
            room = 8 - len(self.held)
            with contextlib.suppress(QueueUnavailableError):
                for claimed in await claimer.claim(max_jobs=room, max_tokens=100_000, is_idle=not self.held):
                    self.check_log(claimed)
                    self.held[claimed.job_id] = (claimed, claimed.end_position)
        if self.dice.random() < 0.04:
            await asyncio.sleep(2 * LEASE_MS / 1000)
            self.events["pauses"] += 1
        if self.held and self.dice.random() < 0.03:
            await self.give_back(claimer)
        if not self.held:
            with contextlib.suppress(QueueUnavailableError):
                await claimer.wait_for_work(0.01)
            return
        items = [self.next_item(claimed, position) for claimed, position in self.held.values()]
        self.settle(items, await self.push_until_answered(claimer, items))
        await asyncio.sleep(self.dice.random() * 0.004)

    def check_log(self, claimed: ClaimedJob) -> None:
        logged = [token for entry in claimed.log for delta in entry.deltas for token in delta.token_ids]
        assert logged == [token_of(claimed.job_id, position) for position in range(claimed.end_position)]

    async def give_back(self, claimer: Claimer) -> None:
        job_id = self.dice.choice(sorted(self.held))
        with contextlib.suppress(QueueUnavailableError):
            await claimer.release([self.held[job_id][0]])
        del self.held[job_id]
        self.events["releases"] += 1

    def next_item(self, claimed: ClaimedJob, position: int) -> PushItem:
        job_id, length = claimed.job_id, length_of(claimed.job_id)
        stop = min(length, position + self.dice.randint(0, 3))
        outcome = job_pb2.Outcome(finished=chat_pb2.Finished()) if stop == length else None
        entry = entry_of(job_id, position, stop) if stop > position else None
        return PushItem(job_id, claimed.fence, position, entry, outcome)

    async def push_until_answered(self, claimer: Claimer, items: list[PushItem]) -> list[PushStatus]:
        while True:
            try:
                return await claimer.push(items)
            except QueueUnavailableError:
                self.events["repeated pushes"] += 1
                await asyncio.sleep(0.002)

    def settle(self, items: list[PushItem], statuses: list[PushStatus]) -> None:
        for item, status in zip(items, statuses, strict=True):
            self.events[status.name] += 1
            if status is not PushStatus.OK or item.outcome is not None:
                del self.held[item.job_id]
            elif item.entry is not None:
                self.held[item.job_id] = (self.held[item.job_id][0], item.entry.end_position)


async def until_answered(call: Callable[[], Awaitable[object]]) -> None:
    while True:
        try:
            await call()
        except QueueUnavailableError:
            await asyncio.sleep(0.002)
        else:
            return


async def read_whole(inbox: Inbox, submitter: Submitter, job: job_pb2.Job, timeout_ms: int | None) -> job_pb2.Outcome:
    """Submits the job and checks its stream to the end."""
    position = 0
    async with inbox.subscribe(job.job_id) as subscription:
        policy = POLICIES[job.tenant]
        await until_answered(lambda: submitter.submit(job, digest=b"digest", timeout_ms=timeout_ms, policy=policy))
        async for news in news_of(subscription):
            if isinstance(news, job_pb2.Outcome):
                outcome = news
                break
            assert news == entry_of(job.job_id, position, news.end_position)
            position = news.end_position
    if outcome.HasField("finished"):
        assert position == length_of(job.job_id)
    return outcome


@contextlib.asynccontextmanager
async def background(*calls: Awaitable[None]) -> AsyncIterator[None]:
    """Runs calls beside the block; one that fails fails the block."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def cancel_some(submitter: Submitter, job_ids: list[str], dice: random.Random) -> None:
    for job_id in dice.sample(job_ids, len(job_ids) // 10):
        await asyncio.sleep(dice.random() * 0.02)
        await until_answered(lambda job_id=job_id: submitter.cancel(job_id))
    await asyncio.Event().wait()


async def kill_now_and_then(valkey, dice: random.Random, events: Counter[str]) -> None:
    for _ in range(2):
        await asyncio.sleep(0.3 + dice.random() * 0.3)
        await asyncio.to_thread(valkey.restart)
        events["kills of Redis"] += 1
    await asyncio.Event().wait()


# Seed, jobs, shards, and whether Redis dies as well. The long runs are for `make fuzz`.
QUICK_RUNS = [(1, 250, 1, False), (2, 250, 3, False), (3, 150, 1, True), (4, 150, 2, True)]
LONG_RUNS = [(seed, 300, 1 + seed % 3, seed % 2 == 0) for seed in range(11, 51)]


@pytest.mark.parametrize(
    ("seed", "num_jobs", "num_shards", "dies"),
    [*QUICK_RUNS, *(pytest.param(*run, marks=pytest.mark.fuzz) for run in LONG_RUNS)],
)
async def test_every_stream_is_whole_whatever_dies(
    valkey, seed: int, num_jobs: int, num_shards: int, dies: bool
) -> None:
    dice = random.Random(seed)
    redis_client = connect(valkey.url)
    lossy = LossyRedis(connection_pool=redis_client.connection_pool)
    lossy.dice = dice
    client = QueueClient(lossy, num_shards=num_shards)
    await until_answered(client.check_server)

    inboxes = {gateway: Inbox(client, gateway_id=gateway, recheck_s=0.3) for gateway in GATEWAYS}
    limits = QueueLimits(max_waiting_jobs=10_000, retention_s=60)
    submitters = {gateway: Submitter(client, gateway_id=gateway, limits=limits) for gateway in GATEWAYS}
    events: Counter[str] = Counter()
    workers = [SimulatedWorker(client, f"worker-{number}", dice, events) for number in range(NUM_WORKERS)]
    sweepers = [Sweeper(client, interval_s=0.03, stall_s=0.25) for _ in range(2)]
    reconciler = Reconciler(client, interval_s=0.02)
    jobs = [
        make_job(
            f"{seed}-{number}",
            prompt_tokens=1 + number,  # Each its own: a prompt that was poison is refused.
            max_new_tokens=100,
            priority=dice.choice(chat_pb2.Priority.values()),
            tenant=dice.choice(sorted(POLICIES)),
        )
        for number in range(num_jobs)
    ]

    async with (
        background(
            *(inbox.run() for inbox in inboxes.values()),
            *(worker.run() for worker in workers),
            *(sweeper.run() for sweeper in sweepers),
            reconciler.run(),
            cancel_some(submitters["gateway-1"], [job.job_id for job in jobs], dice),
            *([kill_now_and_then(valkey, dice, events)] if dies else []),
        ),
        asyncio.timeout(60),
    ):
        readings = []
        for number, job in enumerate(jobs):
            timeout_ms = 30 if number % 20 == 0 else None
            for gateway in GATEWAYS if number % 4 == 0 else GATEWAYS[number % 2 :][:1]:
                readings.append(read_whole(inboxes[gateway], submitters[gateway], job, timeout_ms))
        outcomes = await asyncio.gather(*readings)

    ends = Counter(outcome.failed.reason or "FINISHED" for outcome in outcomes)
    assert set(ends) <= {"FINISHED", "CANCELLED", "DEADLINE_EXCEEDED", "POISON"}, ends
    assert ends["FINISHED"] > num_jobs / 2, (ends, events)
    assert events["deaths"] > 0
    assert events["repeated pushes"] > 0
    # A kill is followed by an amnesty, which may spare every worker that hung.
    assert events["kills of Redis" if dies else "FENCED"] > 0

    # What the readers saw is what is stored, once and for all, and no index remembers any of it.
    assert reconciler.num_repairs == 0
    plain = QueueClient(redis_client, num_shards=num_shards)
    for job in jobs:
        log = await plain.read(job.job_id, 0)
        assert log is not None
        assert log.state.is_terminal
        assert log.state is not JobState.FINISHED or log.end_position == length_of(job.job_id)
    left = {key.decode().split(":")[2] for key in await redis_client.keys()}
    expire = {"log", "flows", "claim", "suspects", "wake", "updates", "versions", "dead", "poison"}
    assert left <= {"job", "counters", *expire}
    await redis_client.aclose()
