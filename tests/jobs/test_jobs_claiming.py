"""Which jobs a worker gets, in which order, and how it gives them back."""

import asyncio
import secrets
from itertools import chain

import pytest
import redis.asyncio
from job_samples import MODEL, failed, make_entry, make_job
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import (
    JOB_VERSION,
    Claimer,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueUnavailableError,
    Submitter,
    Sweeper,
)
from sick_shards import PartlyAway
from waiting import until

BULK, NORMAL, HIGH = chat_pb2.PRIORITY_BULK, chat_pb2.PRIORITY_NORMAL, chat_pb2.PRIORITY_HIGH


async def submit(submitter: Submitter, *jobs: job_pb2.Job, timeout_ms: int | None = None) -> None:
    for job in jobs:
        await submitter.submit(job, digest=b"digest", timeout_ms=timeout_ms)


async def claim_ids(claimer: Claimer, *, max_jobs: int = 100, max_tokens: int = 100_000) -> list[str]:
    return [claimed.job.request_id for claimed in await claimer.claim(max_jobs=max_jobs, max_tokens=max_tokens)]


async def test_a_claim_brings_all_that_is_needed_to_run_the_job(submitter: Submitter, claimer: Claimer) -> None:
    job = make_job("whole")
    await submit(submitter, job, timeout_ms=60_000)
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)

    assert claimed.job == job
    assert (claimed.job_id, claimed.end_position, claimed.attempt) == (job.job_id, 0, 1)
    assert claimed.log == []
    assert 0 <= claimed.waited_ms < 10_000


async def test_the_more_urgent_go_first_and_equals_by_arrival(submitter: Submitter, claimer: Claimer) -> None:
    order = [("b1", BULK), ("n1", NORMAL), ("h1", HIGH), ("n2", NORMAL), ("b2", BULK), ("h2", HIGH)]
    await submit(submitter, *(make_job(request_id, priority=priority) for request_id, priority in order))
    assert await claim_ids(claimer) == ["h1", "h2", "n1", "n2", "b1", "b2"]


async def test_a_claim_takes_no_more_jobs_than_asked_for(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(5)))
    assert await claim_ids(claimer, max_jobs=2) == ["0", "1"]
    assert await claim_ids(claimer, max_jobs=0) == []
    assert await claim_ids(claimer, max_jobs=9) == ["2", "3", "4"]


async def test_a_job_that_does_not_fit_is_passed_over(submitter: Submitter, claimer: Claimer) -> None:
    await submit(
        submitter,
        make_job("small", prompt_tokens=10, max_new_tokens=10),
        make_job("large", prompt_tokens=10, max_new_tokens=20, n=4),
        make_job("tiny", prompt_tokens=1, max_new_tokens=1),
    )
    assert await claim_ids(claimer, max_tokens=20 + 89) == ["small", "tiny"]
    assert await claim_ids(claimer, max_tokens=89) == []
    assert await claim_ids(claimer, max_tokens=90) == ["large"]


async def test_choices_need_room_as_well(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, make_job("wide", n=4), make_job("narrow"))
    [narrow] = await claimer.claim(max_jobs=3, max_tokens=10_000, max_choices=3)
    assert narrow.job.request_id == "narrow"
    [wide] = await claimer.claim(max_jobs=3, max_tokens=10_000, max_choices=4)
    assert wide.job.request_id == "wide"


async def passed_over_for(redis_client: redis.asyncio.Redis, client: QueueClient, job: job_pb2.Job, ms: int) -> None:
    """The job was first passed over so long ago."""
    await redis_client.hincrby(f"{client.shards[0].keys.root}:job:{job.job_id}", "passed_over_ms", -ms)


async def test_one_worker_keeps_itself_for_a_job_that_was_passed_over_for_long(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    large = make_job("large", max_new_tokens=500)
    await submit(submitter, large, *(make_job(str(number)) for number in range(6)))
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == ["0"]
    await passed_over_for(redis_client, client, large, 3_000)

    other = Claimer(client, worker_id="worker-2", model=MODEL)
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == []
    assert await claim_ids(other, max_jobs=1, max_tokens=100) == ["1"]
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == []
    assert await claim_ids(claimer, max_jobs=2, max_tokens=520) == ["large"]
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == ["2"]


async def test_a_worker_that_no_longer_asks_is_not_waited_for(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    large = make_job("large", max_new_tokens=500)
    await submit(submitter, large, make_job("small"))
    await claim_ids(claimer, max_jobs=1, max_tokens=10)
    await passed_over_for(redis_client, client, large, 3_000)
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == []

    other = Claimer(client, worker_id="worker-2", model=MODEL)
    await redis_client.hincrby(f"{client.shards[0].keys.root}:job:{large.job_id}", "kept_until_ms", -10_000)
    assert await claim_ids(other, max_jobs=1, max_tokens=100) == []
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == ["small"]


async def test_a_job_that_came_back_may_be_passed_over_anew(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    large = make_job("large", max_new_tokens=500)
    await submit(submitter, large, make_job("small"))
    await claim_ids(claimer, max_jobs=1, max_tokens=10)
    await passed_over_for(redis_client, client, large, 3_000)
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await claimer.release([claimed])
    assert await claim_ids(claimer, max_jobs=1, max_tokens=100) == ["small"]


async def test_jobs_of_another_model_are_left_alone(
    submitter: Submitter, client: QueueClient, claimer: Claimer
) -> None:
    await submit(submitter, make_job("theirs", model="other"), make_job("ours"))
    assert await claim_ids(claimer) == ["ours"]
    other = Claimer(client, worker_id="worker-2", model="other")
    assert await claim_ids(other) == ["theirs"]


async def test_jobs_of_a_newer_version_are_passed_over(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, make_job("newer", version=JOB_VERSION + 1), make_job("known"))
    assert await claim_ids(claimer) == ["known"]


async def test_two_workers_never_get_the_same_job(submitter: Submitter, client: QueueClient) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(40)))
    workers = [Claimer(client, worker_id=f"worker-{number}", model=MODEL) for number in range(8)]
    claims = await asyncio.gather(*(claim_ids(worker, max_jobs=5) for worker in workers))
    assert sorted(chain.from_iterable(claims), key=int) == [str(number) for number in range(40)]


async def test_a_repeated_claim_gets_the_same_jobs_again(submitter: Submitter, client: QueueClient) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(3)))
    claim_id = secrets.token_hex(8)

    async def claim() -> list[tuple[str, str]]:
        replies, _ = await client.shards[0].claim(
            "worker-1",
            claim_id,
            model=MODEL,
            lease_ms=10_000,
            max_jobs=2,
            max_tokens=1000,
            max_choices=8,
            tokens_per_choice=0,
            is_idle=False,
        )
        return [(reply.job_id, reply.fence) for reply in replies]

    first = await claim()
    assert len(first) == 2
    assert await claim() == first


class _LosesOneReply(redis.asyncio.Redis):
    """Carries one claim out, then acts as if the connection had gone before the answer."""

    has_lost = False

    async def execute_command(self, *command: object, **options: object) -> object:
        reply = await super().execute_command(*command, **options)
        if not self.has_lost and "claim" in str(command[1]):
            self.has_lost = True
            raise redis.exceptions.ConnectionError("reply lost")
        return reply


async def test_a_claim_whose_answer_was_lost_is_found_by_the_next(
    submitter: Submitter, redis_client: redis.asyncio.Redis
) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(3)))
    lossy = QueueClient(_LosesOneReply(connection_pool=redis_client.connection_pool))
    claimer = Claimer(lossy, worker_id="worker-1", model=MODEL)
    with pytest.raises(QueueUnavailableError):
        await claimer.claim(max_jobs=2, max_tokens=1000)
    assert await claim_ids(claimer, max_jobs=2) == ["0", "1"]
    assert await claim_ids(claimer, max_jobs=2) == ["2"]


async def test_an_overdue_job_is_not_claimed_but_expires(submitter: Submitter, claimer: Claimer) -> None:
    overdue = make_job("overdue")
    await submit(submitter, overdue, timeout_ms=0)
    await submit(submitter, make_job("in time"), timeout_ms=60_000)
    assert await claim_ids(claimer) == ["in time"]

    snapshot = await submitter.status(overdue.job_id)
    assert snapshot is not None
    assert snapshot.state is JobState.EXPIRED
    assert snapshot.outcome is not None
    assert snapshot.outcome.failed.reason == "DEADLINE_EXCEEDED"


async def test_a_job_whose_bytes_are_no_job_fails_and_takes_no_other_with_it(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    broken = make_job("broken")
    await submit(submitter, broken, make_job("sound"))
    await redis_client.hset(f"{client.shards[0].keys.root}:job:{broken.job_id}", "job", b"\xff\xff")
    assert await claim_ids(claimer) == ["sound"]

    log = await client.read(broken.job_id, 0)
    assert log is not None
    assert log.state is JobState.FAILED
    assert log.outcome is not None
    assert log.outcome.failed.reason == "MALFORMED_JOB"


async def test_a_claim_that_could_not_be_read_to_its_end_is_made_again(
    submitter: Submitter, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    lame = PartlyAway(connection_pool=redis_client.connection_pool)
    times_s = iter(range(100))
    claimer = Claimer(QueueClient(lame), worker_id="worker-1", model=MODEL, clock=lambda: float(next(times_s)))
    broken = make_job("broken")
    await submit(submitter, broken, make_job("sound"))
    await redis_client.hset(f"{client.shards[0].keys.root}:job:{broken.job_id}", "job", b"\xff\xff")
    lame.away = "oasst_push"
    with pytest.raises(QueueUnavailableError):
        await claimer.claim(max_jobs=2, max_tokens=1000)
    failed_s = next(times_s)
    lame.away = None
    [claimed] = await claimer.claim(max_jobs=2, max_tokens=1000)
    assert claimed.job.request_id == "sound"
    assert claimed.asked_s < failed_s  # Its lease may have begun then.


async def test_an_index_entry_without_a_job_is_cleared_away(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    waiting = f"{client.shards[0].keys.root}:waiting:{MODEL}"
    await redis_client.zadd(waiting, {"orphan": 0})
    await submit(submitter, make_job("sound"))
    assert await claim_ids(claimer) == ["sound"]
    assert await redis_client.exists(waiting) == 0


async def test_a_claimed_job_may_end_without_a_token(submitter: Submitter, claimer: Claimer) -> None:
    job = make_job("refused")
    await submit(submitter, job)
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    item = PushItem(claimed.job_id, claimed.fence, 0, outcome=failed("TOO_LARGE"))
    for _ in range(2):
        assert await claimer.push([item]) == [PushStatus.OK]

    snapshot = await submitter.status(job.job_id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.outcome) == (JobState.FAILED, failed("TOO_LARGE"))


async def test_released_jobs_take_their_old_places_and_are_charged_no_attempt(
    submitter: Submitter, claimer: Claimer
) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(4)))
    claims = await claimer.claim(max_jobs=3, max_tokens=1000)
    await claimer.push([PushItem(claims[1].job_id, claims[1].fence, 0, make_entry(0, 2))])
    await claimer.release(claims)
    await claimer.release(claims)

    again = await claimer.claim(max_jobs=9, max_tokens=1000)
    assert [claimed.job.request_id for claimed in again] == ["0", "1", "2", "3"]
    assert [claimed.attempt for claimed in again] == [1, 1, 1, 1]
    assert again[1].end_position == 2
    assert again[1].log == [make_entry(0, 2)]
    assert again[0].fence != claims[0].fence


async def test_whoever_released_a_job_cannot_write_to_it(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, make_job("released"))
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await claimer.release([claimed])
    item = PushItem(claimed.job_id, claimed.fence, 0, make_entry(0, 1))
    assert await claimer.push([item]) == [PushStatus.FENCED]
    [_] = await claimer.claim(max_jobs=1, max_tokens=1000)
    assert await claimer.push([item]) == [PushStatus.FENCED]


async def test_the_first_claim_alone_ends_the_wait(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, make_job("released"))
    [first] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await asyncio.sleep(0.02)
    await claimer.release([first])
    [second] = await claimer.claim(max_jobs=1, max_tokens=1000)
    assert second.waited_ms == first.waited_ms
    assert (first.is_first_claim, second.is_first_claim) == (True, False)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for work does so for longer than the test: only what it waits for, or its own timeout, ends that."""
    monkeypatch.setattr("oasst_jobs.functions.MAX_BLOCK_S", 30.0)


@pytest.mark.usefixtures("patient")
async def test_an_idle_worker_wakes_when_a_job_is_queued(submitter: Submitter, claimer: Claimer) -> None:
    waiting = asyncio.create_task(claimer.wait_for_work(60.0))
    await submit(submitter, make_job("wakes"))
    async with asyncio.timeout(10):
        await waiting
    assert await claim_ids(claimer) == ["wakes"]


@pytest.mark.usefixtures("patient")
async def test_each_idle_worker_wakes_while_there_is_work(submitter: Submitter, client: QueueClient) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(3)))

    async def work(worker: Claimer) -> list[str]:
        async with asyncio.timeout(10):
            await worker.wait_for_work(60.0)
        return await claim_ids(worker, max_jobs=1)

    workers = [Claimer(client, worker_id=f"worker-{number}", model=MODEL) for number in range(3)]
    claims = await asyncio.gather(*map(work, workers))
    assert sorted(chain.from_iterable(claims)) == ["0", "1", "2"]


@pytest.mark.usefixtures("patient")
async def test_waiting_for_work_ends_with_its_timeout(claimer: Claimer) -> None:
    async with asyncio.timeout(10):
        await claimer.wait_for_work(0.01)
        await claimer.wait_for_work(0)


async def test_the_wake_list_stays_short_and_expires(
    submitter: Submitter, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(10)))
    assert await redis_client.llen(client.shards[0].keys.wake(MODEL)) == 1
    assert await redis_client.pttl(client.shards[0].keys.wake(MODEL)) > 0


def test_a_lease_longer_than_any_honest_one_is_refused(client: QueueClient) -> None:
    for lease_ms in (0, 120_001):
        with pytest.raises(ValueError, match="lease"):
            Claimer(client, worker_id="worker-1", model=MODEL, lease_ms=lease_ms)


async def test_a_requeued_job_comes_before_those_that_arrived_later(
    submitter: Submitter, claimer: Claimer, hasty_claimer: Claimer, sweeper: Sweeper
) -> None:
    await submit(submitter, make_job("early"))
    await hasty_claimer.claim(max_jobs=1, max_tokens=1000)
    await submit(submitter, make_job("late"))

    async def is_requeued() -> bool:
        return (await sweeper.sweep()).requeued == 1

    await until(is_requeued)
    assert await claim_ids(claimer) == ["early", "late"]
