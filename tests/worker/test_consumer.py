"""Jobs from a real queue through the loop and back: nothing lost, nothing twice, nothing kept too long."""

import asyncio
import functools
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from google.rpc import code_pb2
from oasst.jobs.v1.job_pb2 import LogEntry
from oasst.v1.generation_pb2 import FINISH_REASON_LENGTH, Delta
from oasst_jobs import (
    ClaimedJob,
    Claimer,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    connect,
)
from oasst_worker.engine import Engine, Sequence
from oasst_worker.intake import Intake, ResumedChoice
from oasst_worker.loop import StepWatchdog
from running_worker import RunningWorker
from scripted_worker import MODEL, ScriptedExecutor, expected_text, make_job
from sick_shards import FIRST_SHARD, PartlyAway, SlowlyLosingClaims
from valkey_server import ValkeyServer
from waiting import until
from watched_queue import Queue, choice_text

# For who renews so often, or tries so often to reach the queue, that a test can wait for it.
HASTY_LEASE_S = 0.4


async def test_a_job_is_generated_logged_and_told_of(queue, start_worker):
    start_worker()
    job_id = await queue.submit(make_job("one", prompt_tokens=5, max_new_tokens=20))
    log = await queue.ended(job_id)
    finished = log.outcome.finished
    assert choice_text(log) == expected_text(job_id, 20)
    assert [finish.reason for finish in finished.finishes] == [FINISH_REASON_LENGTH]
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 20)
    assert finished.timings.decode.ToNanoseconds() > 0


async def test_every_choice_of_a_job_is_logged_with_its_logprobs(queue, start_worker):
    start_worker()
    job_id = await queue.submit(make_job("many", n=3, logprobs=1))
    log = await queue.ended(job_id)
    assert [choice_text(log, choice) for choice in range(3)] == [
        expected_text(job_id, 16, choice) for choice in range(3)
    ]
    assert [finish.choice for finish in log.outcome.finished.finishes] == [0, 1, 2]
    assert log.outcome.finished.usage.completion_tokens == log.end_position == 48
    deltas = [delta for entry in log.entries for delta in entry.deltas]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    assert deltas[0].logprobs[0].alternatives[0].token_id == deltas[0].token_ids[0]


async def test_all_jobs_of_a_step_go_in_one_push(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(0)
    job_ids = [await queue.submit(make_job(f"job {index}")) for index in range(8)]
    await until(lambda: worker.consumer.num_sequences == 8)
    worker.executor.allow(math.inf)
    for job_id in job_ids:
        assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    assert max(worker.claimer.push_sizes) == 8
    assert len(worker.claimer.push_sizes) <= worker.executor.num_steps + 8


async def test_while_a_push_is_under_way_later_steps_are_merged_into_the_next(queue, start_worker):
    worker = start_worker()
    worker.claimer.may_push.clear()
    job_id = await queue.submit(make_job("merged", max_new_tokens=6))
    await until(lambda: worker.executor.num_steps == 6)
    worker.claimer.may_push.set()
    log = await queue.ended(job_id)
    assert choice_text(log) == expected_text(job_id, 6)
    assert len(log.entries) <= 2


async def test_tokens_that_come_faster_than_anyone_reads_are_pushed_together(queue, start_worker):
    start_worker()
    started_s = asyncio.get_running_loop().time()
    job_id = await queue.submit(make_job("quick", max_new_tokens=900))
    log = await queue.ended(job_id)
    elapsed_s = asyncio.get_running_loop().time() - started_s
    assert choice_text(log) == expected_text(job_id, 900)
    # The first token and the end do not wait.
    assert len(log.entries) <= elapsed_s / 0.02 + 3
    assert len(log.entries[0].deltas[0].token_ids) < 900


async def test_a_token_drawn_soon_after_a_push_does_not_wait_for_the_step_after_it(queue, start_worker):
    now_s = [0.0]
    worker = start_worker(lease_s=3600, clock=lambda: now_s[0])
    worker.executor.allow(1)
    job_id = await queue.submit(make_job("early"))
    await until(lambda: worker.num_pushes == 1)
    worker.executor.allow(1)
    await until(lambda: worker.consumer.num_generated_tokens == 2)
    now_s[0] += 0.02
    await until(lambda: worker.num_pushes == 2)
    assert choice_text(await queue.log(job_id)) == expected_text(job_id, 2)


async def test_another_worker_goes_on_where_a_dead_one_stopped(queue, start_worker):
    first = start_worker("first")
    first.executor.allow(5)
    job_id = await queue.submit(make_job("resumed", n=2, stop=["zzz"], max_new_tokens=40))
    await until(lambda: first.executor.num_steps == 5 and first.num_pushes > 0)
    await first.die()
    logged = (await queue.log(job_id)).end_position
    await queue.lose_lease(job_id)

    second = start_worker("second")
    log = await queue.ended(job_id)
    assert 0 < logged < 80
    assert [choice_text(log, choice) for choice in range(2)] == [
        expected_text(job_id, 40, choice) for choice in range(2)
    ]
    assert log.outcome.finished.usage.completion_tokens == 80
    assert second.registry.get_sample_value("oasst_worker_resumed_jobs_total") == 1


async def test_a_job_whose_log_is_complete_gets_its_outcome_without_a_step(queue, start_worker):
    job_id = await queue.submit(make_job("complete", max_new_tokens=3))
    dying = Claimer(queue.client, worker_id="dying", model=MODEL)
    [claimed] = await dying.claim(max_jobs=1, max_tokens=1000)
    entry = LogEntry(end_position=3, deltas=[Delta(token_ids=[1, 2, 3], text="abc")])
    assert await dying.push([PushItem(job_id, claimed.fence, 0, entry)]) == [PushStatus.OK]
    await dying.release([claimed])

    worker = start_worker()
    log = await queue.ended(job_id)
    assert choice_text(log) == "abc"
    assert [finish.reason for finish in log.outcome.finished.finishes] == [FINISH_REASON_LENGTH]
    assert worker.executor.num_steps == 0


async def test_a_worker_that_lost_its_lease_drops_the_job_and_shows_nothing(queue, start_worker):
    first = start_worker("first")
    first.executor.allow(3)
    job_id = await queue.submit(make_job("fenced"))
    await until(lambda: first.executor.num_steps == 3)
    first.claimer.may_push.clear()
    first.consumer.drain(3600)  # So that it does not claim the job again.
    await until(lambda: not first.claimer.is_claiming)
    await queue.lose_lease(job_id)
    start_worker("second")
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)

    first.claimer.may_push.set()
    first.executor.allow(4)  # One more token, which is refused; nothing else would be pushed but a renewal.
    await first.task
    assert first.jobs_by("fenced") == 1
    assert choice_text(await queue.log(job_id)) == expected_text(job_id, 16)


async def test_a_worker_that_claims_its_own_lost_job_again_goes_on_from_the_log(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(3)
    job_id = await queue.submit(make_job("own", max_new_tokens=30))
    await until(lambda: worker.executor.num_steps == 3)
    worker.claimer.may_push.clear()
    await queue.lose_lease(job_id)
    await until(lambda: worker.jobs_by("fenced") == 1)
    worker.claimer.may_push.set()
    worker.executor.allow(math.inf)
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 30)


async def test_a_job_without_news_keeps_its_lease(queue, start_worker):
    worker = start_worker(lease_s=HASTY_LEASE_S)
    worker.executor.allow(0)
    job_id = await queue.submit(make_job("slow"))
    await until(lambda: worker.consumer.num_sequences == 1)
    for _ in range(3):  # Each time a third of the lease that it takes itself to have.
        await until(functools.partial(_lasts_longer_than, queue, job_id, await queue.lease_ends_ms(job_id)))
    worker.executor.allow(math.inf)
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    assert worker.jobs_by("finished") == 1


async def _lasts_longer_than(queue: Queue, job_id: str, ends_ms: float) -> bool:
    return await queue.lease_ends_ms(job_id) > ends_ms


async def test_a_lease_counts_from_the_first_try_of_a_claim_whose_answer_was_lost(queue):
    losing = SlowlyLosingClaims(connection_pool=queue.client.redis.connection_pool)
    losing.silence_s = 1100
    worker = RunningWorker(QueueClient(losing), "worker", lease_s=3000, clock=losing.clock)
    worker.executor.allow(0)
    job_id = await queue.submit(make_job("kept"))
    await until(lambda: worker.claimer.push_sizes == [1])  # A third of the lease has passed: it is renewed at once.
    worker.executor.allow(math.inf)
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    assert (losing.num_lost, worker.claimed, worker.jobs_by("fenced")) == (1, 1, 0)
    await worker.die()


async def test_a_cancelled_job_leaves_the_engine(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(3)
    job_id = await queue.submit(make_job("cancelled", max_new_tokens=900))
    await until(lambda: worker.executor.num_steps == 3)
    await queue.client.cancel(job_id)
    worker.executor.allow(math.inf)
    await until(lambda: worker.jobs_by("cancelled") == 1)
    await until(lambda: worker.loop.load.num_running == 0)
    assert worker.executor.num_steps < 900


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.EXPIRED])
async def test_what_ended_frees_its_blocks_within_two_steps_of_the_push_that_tells_it(queue, start_worker, state):
    worker = start_worker()
    worker.executor.allow(0)
    ended, other = make_job("ended", n=3, max_new_tokens=900), make_job("other", max_new_tokens=900)
    await queue.submit(ended)
    await queue.submit(other)
    await until(lambda: worker.consumer.num_sequences == 4)
    worker.executor.allow(3)
    await until(lambda: worker.loop.load.num_running == 4)
    await until(lambda: worker.executor.num_steps == 3)
    if state is JobState.CANCELLED:
        await queue.client.cancel(ended.job_id)
    else:
        await queue.expire(ended.job_id)

    worker.executor.allow(1)  # Its tokens are pushed, and the answer is that it has ended.
    await until(lambda: worker.jobs_by(state.value) == 1)
    worker.executor.allow(2)
    await until(lambda: worker.executor.num_steps == 6)
    await until(lambda: worker.loop.load.num_running == 1)
    assert worker.executor.num_steps == 6
    assert worker.loop.load.kv_tokens_used <= 2 * ScriptedExecutor.block_size


async def test_a_choice_whose_logits_are_not_finite_fails_its_job_alone(queue, start_worker):
    worker = start_worker()
    bad, good = make_job("bad", n=2, max_new_tokens=900), make_job("good")
    worker.executor.broken.add(f"{bad.job_id}/1")
    worker.executor.allow(2)
    await queue.submit(bad)
    await queue.submit(good)
    failed = (await queue.ended(bad.job_id)).outcome.failed
    assert (failed.code, failed.reason) == (code_pb2.INTERNAL, "NUMERIC")
    worker.executor.allow(math.inf)
    assert choice_text(await queue.ended(good.job_id)) == expected_text(good.job_id, 16)
    await until(lambda: worker.loop.load.num_running == 0)
    assert worker.executor.num_steps < 100  # The other choice of the failed job went with it.


async def test_a_job_that_is_not_valid_fails_alone(queue, start_worker):
    worker = start_worker()
    bad, good = make_job("bad"), make_job("good")
    bad.sampling.temperature = math.nan
    await queue.submit(bad)
    await queue.submit(good)
    failed = (await queue.ended(bad.job_id)).outcome.failed
    assert (failed.reason, failed.usage.prompt_tokens) == ("INVALID_JOB", 4)
    assert choice_text(await queue.ended(good.job_id)) == expected_text(good.job_id, 16)
    assert (worker.jobs_by("refused"), worker.jobs_by("failed")) == (1, 0)


async def test_a_refused_job_that_the_queue_has_not_heard_of_holds_up_no_claim(queue, start_worker):
    worker = start_worker()
    worker.claimer.may_push.clear()
    bad, good = make_job("bad"), make_job("good")
    bad.sampling.temperature = math.nan
    await queue.submit(bad)
    await until(lambda: worker.claimed == 1)
    await queue.submit(good)
    await until(lambda: worker.claimed == 2)
    await queue.client.cancel(bad.job_id)
    worker.claimer.may_push.set()
    assert choice_text(await queue.ended(good.job_id)) == expected_text(good.job_id, 16)
    assert (worker.jobs_by("refused"), worker.jobs_by("cancelled")) == (0, 1)


async def test_the_event_loop_runs_while_a_log_is_replayed(queue, start_worker, monkeypatch):
    replaying, has_run = threading.Event(), threading.Event()
    accept = Intake.accept

    def accept_slowly(intake: Intake, claimed: ClaimedJob) -> list[ResumedChoice]:
        replaying.set()
        assert has_run.wait(timeout=5)
        return accept(intake, claimed)

    monkeypatch.setattr(Intake, "accept", accept_slowly)
    start_worker()
    job_id = await queue.submit(make_job("long"))
    await until(replaying.is_set)
    has_run.set()
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)


async def test_a_part_that_the_engine_does_not_take_is_no_step_of_its_watchdog(queue, start_worker, monkeypatch):
    steps_s: list[float] = []
    monkeypatch.setattr(StepWatchdog, "record", lambda watchdog, step_s: steps_s.append(step_s))
    start_worker()
    monkeypatch.setattr(Engine, "add", refuse)
    assert (await queue.ended(await queue.submit(make_job("refused")))).outcome.failed.reason == "INTERNAL"
    assert steps_s == []


def refuse(engine: Engine, sequence: Sequence) -> None:
    raise ValueError("not this one")


async def test_a_job_that_never_fits_the_worker_fails_and_blocks_nobody(queue, start_worker):
    start_worker(kv_tokens=256)
    await queue.submit(big := make_job("big", prompt_tokens=300))
    await queue.submit(small := make_job("small"))
    assert (await queue.ended(big.job_id)).outcome.failed.reason == "EXCEEDS_KV_CACHE"
    assert choice_text(await queue.ended(small.job_id)) == expected_text(small.job_id, 16)


async def test_jobs_for_which_there_is_no_slot_wait_in_the_queue(queue, start_worker):
    worker = start_worker(max_sequences=2)
    worker.executor.allow(0)
    job_ids = [await queue.submit(make_job(f"job {index}")) for index in range(5)]
    await until(lambda: worker.consumer.num_sequences == 2)
    assert (await queue.client.load(MODEL)).waiting_jobs == 3
    worker.executor.allow(math.inf)
    for job_id in job_ids:
        assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)


async def test_jobs_for_which_there_is_no_kv_cache_wait_in_the_queue(queue, start_worker):
    worker = start_worker(kv_tokens=304)
    worker.executor.allow(0)
    job_ids = [await queue.submit(make_job(f"job {index}", prompt_tokens=100)) for index in range(3)]
    await until(lambda: worker.consumer.num_sequences == 2)
    assert (await queue.client.load(MODEL)).waiting_jobs == 1
    worker.executor.allow(math.inf)
    for job_id in job_ids:
        assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)


async def test_small_jobs_for_which_there_is_no_block_of_kv_cache_wait_in_the_queue(queue, start_worker):
    worker = start_worker(kv_tokens=256, max_sequences=16)
    worker.executor.allow(0)
    job_ids = [await queue.submit(make_job(f"job {index}", max_new_tokens=8)) for index in range(16)]
    await until(lambda: worker.consumer.num_sequences > 1)
    worker.executor.allow(4)
    await until(lambda: worker.loop.load.num_running == worker.claimed > 4)
    assert worker.loop.load.num_waiting == 0
    assert (await queue.client.load(MODEL)).waiting_jobs == 16 - worker.claimed
    worker.executor.allow(math.inf)
    for job_id in job_ids:
        assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 8)


async def test_a_job_with_more_choices_than_slots_are_free_waits_its_turn(queue, start_worker):
    worker = start_worker(max_sequences=4)
    worker.executor.allow(0)
    first = await queue.submit(make_job("first", n=3))
    await until(lambda: worker.consumer.num_sequences == 3)
    second = await queue.submit(make_job("second", n=2))
    third = await queue.submit(make_job("third"))
    await until(lambda: worker.consumer.num_sequences == 4)
    assert await queue.state(second) is JobState.WAITING
    worker.executor.allow(math.inf)
    for job_id, n in ((first, 3), (second, 2), (third, 1)):
        log = await queue.ended(job_id)
        assert [choice_text(log, choice) for choice in range(n)] == [expected_text(job_id, 16, i) for i in range(n)]


async def test_a_job_that_is_to_run_alone_does(queue, start_worker):
    job_id = await queue.submit(make_job("alone", max_new_tokens=30))
    for number in range(2):
        dying = Claimer(queue.client, worker_id=f"dying-{number}", model=MODEL)
        assert len(await dying.claim(max_jobs=1, max_tokens=1000)) == 1
        await queue.lose_lease(job_id)

    worker = start_worker()
    worker.executor.allow(3)
    await until(lambda: worker.executor.num_steps == 3)
    beside = await queue.submit(make_job("beside"))
    await until(lambda: worker.consumer.num_sequences == 1)
    worker.executor.allow(math.inf)
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 30)
    assert choice_text(await queue.ended(beside)) == expected_text(beside, 16)
    assert worker.registry.get_sample_value("oasst_worker_batch_size_bucket", {"le": "1.0"}) == 46


async def test_a_worker_that_dies_in_a_step_is_blamed_on_what_was_new_in_it(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(5)
    old = await queue.submit(make_job("old", max_new_tokens=40))
    await until(lambda: worker.executor.num_steps == 5)
    new = await queue.submit(make_job("new"))
    await until(lambda: worker.consumer.num_sequences == 2)
    await worker.die()
    for job_id in (old, new):
        await queue.lose_lease(job_id)
    [claim] = [claim for claim in await _claim_all(queue) if claim.job_id == new]
    assert claim.attempt == 2
    assert await queue.charge(new) == 4
    assert await queue.charge(old) == 0


async def _claim_all(queue: Queue) -> list[ClaimedJob]:
    return await Claimer(queue.client, worker_id="heir", model=MODEL).claim(max_jobs=9, max_tokens=10_000)


async def test_an_idle_worker_takes_a_job_with_more_choices_than_it_has_slots(queue, start_worker):
    start_worker(max_sequences=2)
    job_id = await queue.submit(make_job("wide", n=5))
    log = await queue.ended(job_id)
    assert [choice_text(log, choice) for choice in range(5)] == [expected_text(job_id, 16, index) for index in range(5)]


async def test_nothing_is_lost_while_the_queue_is_away(queue, start_worker, valkey: ValkeyServer):
    worker = start_worker()
    worker.executor.allow(3)
    job_id = await queue.submit(make_job("kept", max_new_tokens=1000))
    await until(lambda: worker.executor.num_steps == 3)
    valkey.kill()
    worker.executor.allow(math.inf)
    await until(lambda: not worker.consumer.queue_is_reachable)
    await until(lambda: worker.loop.step_in_progress is None)
    assert worker.executor.num_steps < 1000  # The bound of 8, and what was taken along until a push was due.
    valkey.start()
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 1000)
    await until(lambda: worker.consumer.queue_is_reachable)


@asynccontextmanager
async def running_on_two_shards(valkey_url: str) -> AsyncIterator[tuple[Queue, PartlyAway, RunningWorker, list[str]]]:
    """A worker with three tokens of each of its jobs, of which some are in either shard."""
    connection = connect(valkey_url)
    queue = Queue(QueueClient(connection, num_shards=2))
    lame = PartlyAway(connection_pool=connection.connection_pool)
    client = QueueClient(lame, num_shards=2)
    worker = RunningWorker(client, "worker", lease_s=HASTY_LEASE_S, max_sequences=16)
    worker.executor.allow(3)
    job_ids = [await queue.submit(make_job(f"job {number}", max_new_tokens=200)) for number in range(8)]
    await until(lambda: worker.consumer.num_sequences == 8)
    await until(lambda: worker.executor.num_steps == 3)
    assert {client.shard_number(job_id) for job_id in job_ids} == {0, 1}
    yield queue, lame, worker, job_ids
    await worker.die()
    await connection.aclose()


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_shard_that_is_away_costs_the_others_nothing(valkey_url, hangs):
    async with running_on_two_shards(valkey_url) as (queue, lame, worker, job_ids):
        lame.away, lame.hangs = FIRST_SHARD, hangs
        present = [job_id for job_id in job_ids if queue.client.shard_number(job_id) == 1]
        for _ in range(3):  # Their leases are renewed, again and again.
            await until(functools.partial(_lasts_longer_than, queue, present[0], await queue.lease_ends_ms(present[0])))
        worker.executor.allow(math.inf)
        for job_id in present:
            assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 200)
        lame.away = None
        lame.released.set()
        for job_id in job_ids:
            assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 200)
        await until(lambda: worker.jobs_by("finished") == 8)


async def test_a_queue_is_away_while_a_shard_takes_no_push_whatever_else_it_answers(valkey_url, caplog):
    async with running_on_two_shards(valkey_url) as (queue, lame, worker, _):
        lame.away = FIRST_SHARD
        await until(lambda: worker.num_errors("push") > 0)
        caplog.set_level("INFO")
        caplog.clear()
        for number in range(4):
            await queue.submit(make_job(f"later {number}"))
        await until(lambda: worker.claimed > 8)  # Claims are answered.
        assert not worker.consumer.queue_is_reachable
        assert not [record for record in caplog.records if record.message.startswith("queue")]
        lame.away = None
        await until(lambda: worker.consumer.queue_is_reachable)


async def test_while_no_push_is_answered_nothing_is_claimed(queue):
    lame = PartlyAway(connection_pool=queue.client.redis.connection_pool)
    worker = RunningWorker(QueueClient(lame), "worker", lease_s=HASTY_LEASE_S)
    lame.away = "oasst_push"
    first = await queue.submit(make_job("first"))
    await until(lambda: not worker.consumer.queue_is_reachable)
    second = await queue.submit(make_job("second"))
    num_errors = worker.num_errors("push")
    await until(lambda: worker.num_errors("push") >= num_errors + 3)
    assert not worker.consumer.queue_is_reachable
    assert worker.claimed == 1
    lame.away = None
    for job_id in (first, second):
        assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    assert worker.consumer.queue_is_reachable
    await worker.die()


async def test_a_drained_worker_finishes_its_jobs_and_claims_no_more(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(3)
    job_id = await queue.submit(make_job("last"))
    await until(lambda: worker.executor.num_steps == 3)
    worker.consumer.drain(3600)
    await until(lambda: not worker.claimer.is_claiming)
    later = await queue.submit(make_job("later"))
    worker.executor.allow(math.inf)
    await worker.task
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    assert await queue.state(later) is JobState.WAITING


async def test_jobs_that_outlast_the_drain_are_released_and_another_worker_goes_on_at_once(queue, start_worker):
    first = start_worker("first")
    first.executor.allow(3)
    job_id = await queue.submit(make_job("released"))
    await until(lambda: first.executor.num_steps == 3)
    first.consumer.drain(3600)
    first.consumer.drain(0)
    await first.task
    assert await queue.state(job_id) is JobState.WAITING
    assert first.jobs_by("released") == 1

    second = start_worker("second")
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    # It came to the first one from the queue, and to the second from the first.
    waits = [worker.registry.get_sample_value("oasst_worker_queue_wait_seconds_count") for worker in (first, second)]
    assert waits == [1, 0]


async def test_a_drained_worker_releases_what_it_claimed_and_never_heard_of(queue):
    losing = SlowlyLosingClaims(connection_pool=queue.client.redis.connection_pool)
    worker = RunningWorker(QueueClient(losing), "worker")
    losing.on_loss = lambda: worker.consumer.drain(3600)
    job_id = await queue.submit(make_job("unheard"))
    await worker.task
    assert (losing.num_lost, worker.claimed) == (1, 0)
    [claim] = await _claim_all(queue)
    assert (claim.job_id, claim.attempt) == (job_id, 1)
    await worker.die()


async def test_a_drained_worker_releases_its_jobs_of_the_shards_that_answer(valkey_url):
    async with running_on_two_shards(valkey_url) as (queue, lame, worker, job_ids):
        lame.away = FIRST_SHARD
        worker.consumer.drain(0)
        await worker.task
        states = {queue.client.shard_number(job_id): await queue.state(job_id) for job_id in job_ids}
        assert states == {0: JobState.RUNNING, 1: JobState.WAITING}
        num_present = sum(queue.client.shard_number(job_id) for job_id in job_ids)
        assert (worker.jobs_by("released"), worker.jobs_by("abandoned")) == (num_present, 8 - num_present)


async def test_a_drain_ends_even_if_the_queue_stays_away(queue, start_worker, valkey: ValkeyServer):
    worker = start_worker()
    worker.executor.allow(3)
    await queue.submit(make_job("stranded"))
    await until(lambda: worker.executor.num_steps == 3)
    valkey.kill()
    worker.consumer.drain(0)
    async with asyncio.timeout(10):
        await worker.task
