"""Who is blamed when workers die: suspects first, then alone on a worker, then dead. And how the dead come back."""

import asyncio

import pytest
import redis.asyncio
from google.rpc import code_pb2
from job_samples import MODEL, finished, make_entry, make_job
from oasst_jobs import (
    ClaimedJob,
    Claimer,
    JobState,
    PoisonedPromptError,
    PushItem,
    PushStatus,
    QueueClient,
    Reconciler,
    Submitter,
    Sweeper,
    SweepReport,
)
from oasst_jobs.__main__ import main


class Workers:
    """Workers that die. Each has a name of its own."""

    def __init__(
        self, client: QueueClient, redis_client: redis.asyncio.Redis, submitter: Submitter, sweeper: Sweeper
    ) -> None:
        self._client = client
        self._redis = redis_client
        self._root = client.shards[0].keys.root
        self._submitter = submitter
        self._sweeper = sweeper
        self._number = 0

    def start(self) -> Claimer:
        self._number += 1
        return Claimer(self._client, worker_id=f"worker-{self._number}", model=MODEL)

    async def lose(self, *claims: ClaimedJob) -> SweepReport:
        """The worker of these jobs is silent for longer than their leases."""
        await self._redis.zadd(f"{self._root}:leases", {claimed.job_id: 1 for claimed in claims})
        return await self._sweeper.sweep()

    async def charge(self, job_id: str) -> int:
        return int(await self._redis.hget(f"{self._root}:job:{job_id}", "charge") or 0)

    async def state(self, job_id: str) -> JobState:
        snapshot = await self._submitter.status(job_id)
        assert snapshot is not None
        return snapshot.state


@pytest.fixture
def workers(client: QueueClient, redis_client: redis.asyncio.Redis, submitter: Submitter, sweeper: Sweeper) -> Workers:
    return Workers(client, redis_client, submitter, sweeper)


async def submit(submitter: Submitter, *request_ids: str) -> None:
    for request_id in request_ids:
        await submitter.submit(make_job(request_id), digest=b"digest", timeout_ms=None)


async def push(claimer: Claimer, claimed: ClaimedJob, start: int, stop: int, *, ends: bool = False) -> None:
    outcome = finished(stop) if ends else None
    item = PushItem(claimed.job_id, claimed.fence, start, make_entry(start, stop), outcome)
    assert await claimer.push([item]) == [PushStatus.OK]


async def kill_with(workers: Workers, submitter: Submitter, request_id: str) -> str:
    """The job kills three workers before its first token; its id. Each id has a prompt of its own."""
    job = make_job(request_id, prompt_tokens=len(request_id))
    await submitter.submit(job, digest=b"digest", timeout_ms=None, grace_ms=1_000)
    job_id = job.job_id
    for loss in (1, 2, 3):
        [claimed] = await workers.start().claim(max_jobs=1, max_tokens=1000, is_idle=True)
        assert (claimed.job_id, claimed.attempt, claimed.is_solo) == (job_id, loss, loss == 3)
        report = await workers.lose(claimed)
        assert report == (SweepReport(requeued=1) if loss < 3 else SweepReport(poisoned=1))
    return job_id


async def test_a_job_that_killed_three_workers_is_dead(submitter: Submitter, claimer: Claimer, workers) -> None:
    job_id = await kill_with(workers, submitter, "poison")
    snapshot = await submitter.status(job_id)
    assert snapshot is not None
    assert snapshot.state is JobState.FAILED
    assert snapshot.outcome is not None
    assert (snapshot.outcome.failed.code, snapshot.outcome.failed.reason) == (code_pb2.ABORTED, "POISON")
    assert await claimer.claim(max_jobs=1, max_tokens=1000, is_idle=True) == []


async def test_only_jobs_without_a_token_from_the_lost_worker_are_suspects(submitter: Submitter, workers) -> None:
    await submit(submitter, "innocent", "suspect")
    worker = workers.start()
    innocent, suspect = await worker.claim(max_jobs=2, max_tokens=1000)
    await push(worker, innocent, 0, 1)
    assert await workers.lose(innocent, suspect) == SweepReport(requeued=2)
    assert (await workers.charge(innocent.job_id), await workers.charge(suspect.job_id)) == (0, 4)


async def test_suspects_are_judged_alike_whichever_lease_lapses_first(submitter: Submitter, workers) -> None:
    await submit(submitter, "innocent", "suspect")
    worker = workers.start()
    innocent, suspect = await worker.claim(max_jobs=2, max_tokens=1000)
    await push(worker, innocent, 0, 1)
    await workers.lose(suspect)
    await workers.lose(innocent)
    assert (await workers.charge(innocent.job_id), await workers.charge(suspect.job_id)) == (0, 4)


async def test_without_a_suspect_every_job_is_charged_a_little(submitter: Submitter, workers) -> None:
    await submit(submitter, "a", "b")
    worker = workers.start()
    claims = await worker.claim(max_jobs=2, max_tokens=1000)
    for claimed in claims:
        await push(worker, claimed, 0, 1)
    await workers.lose(*claims)
    assert [await workers.charge(claimed.job_id) for claimed in claims] == [1, 1]


async def test_a_token_from_the_next_worker_clears_a_job(submitter: Submitter, workers) -> None:
    await submit(submitter, "cleared")
    [claimed] = await workers.start().claim(max_jobs=1, max_tokens=1000)
    await workers.lose(claimed)
    heir = workers.start()
    [claimed] = await heir.claim(max_jobs=1, max_tokens=1000)
    await heir.push([PushItem(claimed.job_id, claimed.fence, 0)])
    assert await workers.charge(claimed.job_id) == 4
    await push(heir, claimed, 0, 1)
    assert await workers.charge(claimed.job_id) == 0


async def test_a_job_that_was_released_is_charged_nothing_and_suspected_no_more(submitter: Submitter, workers) -> None:
    await submit(submitter, "released", "other")
    worker = workers.start()
    released, other = await worker.claim(max_jobs=2, max_tokens=1000)
    await push(worker, other, 0, 1)
    await worker.release([released])
    await workers.lose(other)
    assert (await workers.charge(released.job_id), await workers.charge(other.job_id)) == (0, 1)


async def make_solo(workers: Workers, submitter: Submitter, request_id: str) -> str:
    await submit(submitter, request_id)
    for _ in range(2):
        [claimed] = await workers.start().claim(max_jobs=1, max_tokens=1000)
        await workers.lose(claimed)
    return make_job(request_id).job_id


async def test_after_two_losses_a_job_is_given_to_an_idle_worker_only_and_alone(submitter: Submitter, workers) -> None:
    job_id = await make_solo(workers, submitter, "solo")
    await submit(submitter, "other")
    worker = workers.start()
    assert [claimed.job.request_id for claimed in await worker.claim(max_jobs=2, max_tokens=1000)] == ["other"]
    await submit(submitter, "third")
    [claimed] = await workers.start().claim(max_jobs=2, max_tokens=1000, is_idle=True)
    assert (claimed.job_id, claimed.is_solo) == (job_id, True)


async def test_a_job_that_runs_alone_well_finishes_like_any_other(submitter: Submitter, workers) -> None:
    job_id = await make_solo(workers, submitter, "solo")
    worker = workers.start()
    [claimed] = await worker.claim(max_jobs=1, max_tokens=1000, is_idle=True)
    await push(worker, claimed, 0, 3, ends=True)
    assert await workers.state(job_id) is JobState.FINISHED


async def test_a_job_that_dies_alone_is_charged_even_in_the_middle(submitter: Submitter, workers) -> None:
    job_id = await make_solo(workers, submitter, "solo")
    worker = workers.start()
    [claimed] = await worker.claim(max_jobs=1, max_tokens=1000, is_idle=True)
    await push(worker, claimed, 0, 3)
    assert await workers.lose(claimed) == SweepReport(poisoned=1)
    assert await workers.state(job_id) is JobState.FAILED


async def test_a_job_that_loses_worker_after_worker_in_the_middle_ends_up_alone(submitter: Submitter, workers) -> None:
    await submit(submitter, "time bomb")
    for loss in range(8):
        worker = workers.start()
        [claimed] = await worker.claim(max_jobs=1, max_tokens=1000)
        await push(worker, claimed, loss, loss + 1)
        await workers.lose(claimed)
    assert await workers.start().claim(max_jobs=1, max_tokens=1000) == []
    [claimed] = await workers.start().claim(max_jobs=1, max_tokens=1000, is_idle=True)
    assert claimed.is_solo


async def test_the_dead_are_counted_listed_and_revived(submitter: Submitter, client: QueueClient, workers) -> None:
    first = await kill_with(workers, submitter, "first")
    second = await kill_with(workers, submitter, "another")
    assert (await submitter.load(MODEL)).dead_jobs == 2
    letters = await client.dead(10)
    assert {letter.job_id for letter in letters} == {first, second}
    assert all(0 <= letter.age_ms < 10_000 for letter in letters)
    assert letters[0].job.request_id in ("first", "another")
    assert len(await client.dead(1)) == 1

    assert await client.revive(first) is True
    assert await client.revive(first) is False
    assert (await submitter.load(MODEL)).dead_jobs == 1
    assert await Reconciler(client, interval_s=0.0).walk() == 0  # Nobody watches it, and nobody needs to.
    [claimed] = await workers.start().claim(max_jobs=2, max_tokens=1000)
    assert (claimed.job_id, claimed.attempt, claimed.is_solo) == (first, 1, False)


async def test_the_command_lists_the_dead_without_their_prompts_and_revives_one(
    submitter: Submitter, client: QueueClient, workers, valkey_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = await kill_with(workers, submitter, "first")
    assert await asyncio.to_thread(main, ["dead", "--redis-url", valkey_url]) == 0
    [line] = capsys.readouterr().out.splitlines()
    [letter] = await client.dead(1)
    assert line.startswith(f"job_id={job_id} died_s_ago=")
    assert line.endswith(f" model={MODEL} prompt_tokens={len(letter.job.prompt_token_ids)} tokens=0")

    revive = ["revive", job_id, "--redis-url", valkey_url]
    assert await asyncio.to_thread(main, revive) == 0
    assert capsys.readouterr().out == f"{job_id} waits again\n"
    assert (await submitter.load(MODEL)).waiting_jobs == 1
    assert await asyncio.to_thread(main, revive) == 1
    assert "was not set aside" in capsys.readouterr().err


async def test_only_the_dead_are_revived(submitter: Submitter, client: QueueClient) -> None:
    await submit(submitter, "alive")
    assert await client.revive(make_job("alive").job_id) is False
    assert await client.revive("unknown") is False
    await submitter.cancel(make_job("alive").job_id)
    assert await client.revive(make_job("alive").job_id) is False


async def test_a_dead_job_is_kept_for_longer_than_others_but_not_for_ever(
    submitter: Submitter, client: QueueClient, redis_client: redis.asyncio.Redis, workers
) -> None:
    job_id = await kill_with(workers, submitter, "dead")
    root = client.shards[0].keys.root
    assert 300_000 < await redis_client.pttl(f"{root}:job:{job_id}") <= 86_400_000
    await redis_client.zadd(f"{root}:dead", {job_id: 1})
    await Sweeper(client).sweep()
    assert (await submitter.load(MODEL)).dead_jobs == 0


async def test_a_poisoned_prompt_is_refused_to_its_tenant_for_a_while(
    submitter: Submitter, client: QueueClient, workers
) -> None:
    job_id = await kill_with(workers, submitter, "poison")
    again = make_job("the same prompt again", prompt_tokens=len("poison"))
    with pytest.raises(PoisonedPromptError):
        await submitter.submit(again, digest=b"digest", timeout_ms=None)
    others = [
        make_job("a", prompt_tokens=6, tenant="other"),
        make_job("b", prompt_tokens=5),
        make_job("c", prompt_tokens=6, model="other"),
    ]
    for other in others:
        assert (await submitter.submit(other, digest=b"digest", timeout_ms=None)).is_new
    assert await client.revive(job_id)
    assert (await submitter.submit(again, digest=b"digest", timeout_ms=None)).is_new
