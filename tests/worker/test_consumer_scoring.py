"""Jobs that score, from a real queue through the loop and back."""

import math
from collections.abc import Sequence

import pytest
from oasst.jobs.v1.job_pb2 import Job
from oasst.v1.scoring_pb2 import ItemScore, ScoreItem
from oasst_jobs import JOB_VERSION, LogSnapshot, job_id_for
from oasst_worker.engine import Target
from scripted_worker import MAX_POSITIONS, MODEL, VOCAB_SIZE, expected_text, make_job, scripted_score
from waiting import until
from watched_queue import choice_text

Item = tuple[Sequence[int], int]  # Token ids, and how many of them are context.

# The second and third are one sequence of the engine, and so are not the others.
ITEMS: list[Item] = [
    ([1, 2, 3, 4], 2),
    ([1, 2, 6, 8], 2),
    ([1, 2, 6, 9], 2),
    ([1, 2, 6, 9], 3),
    ([5, 5], 1),
]


def make_scoring(request_id: str, items: Sequence[Item] = ITEMS, *, token_logprobs: bool = True) -> Job:
    return Job(
        version=JOB_VERSION,
        job_id=job_id_for("tenant", request_id),
        tenant="tenant",
        model=MODEL,
        request_id=request_id,
        score_items=[ScoreItem(token_ids=ids, context_length=length) for ids, length in items],
        score_token_logprobs=token_logprobs,
    )


def expected(items: Sequence[Item] = ITEMS) -> list[tuple[list[float], bool]]:
    """Of each item, its tokens' log-probabilities, and whether greedy decoding would give them."""
    scores = [
        [scripted_score(Target(position - 1, ids[position])) for position in range(length, len(ids))]
        for ids, length in items
    ]
    return [([score.logprob for score in each], all(score.is_best for score in each)) for each in scores]


def scores_of(log: LogSnapshot) -> list[ItemScore]:
    return [score for entry in log.entries for score in entry.scores]


def check(log: LogSnapshot, items: Sequence[Item] = ITEMS) -> None:
    scores = scores_of(log)
    assert log.outcome.HasField("finished")
    assert log.end_position == len(items)
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in expected(items)]
    for score, (logprobs, _) in zip(scores, expected(items), strict=True):
        assert score.logprob == pytest.approx(sum(logprobs))
        assert list(score.token_logprobs) == pytest.approx(logprobs)


async def test_a_job_is_scored_item_by_item_in_order(queue, start_worker):
    worker = start_worker()
    log = await queue.ended(await queue.submit(make_scoring("one")))
    check(log)
    assert log.outcome.finished.usage.prompt_tokens == sum(len(ids) for ids, _ in ITEMS)
    assert worker.registry.get_sample_value("oasst_worker_scored_tokens_total") == 8


async def test_logprobs_of_tokens_come_only_where_they_are_wanted(queue, start_worker):
    start_worker()
    log = await queue.ended(await queue.submit(make_scoring("sums", token_logprobs=False)))
    assert [list(score.token_logprobs) for score in scores_of(log)] == [[]] * len(ITEMS)


async def test_an_item_may_have_one_token_more_than_the_model_has_positions(queue, start_worker):
    start_worker()
    items = [([2] * (MAX_POSITIONS + 1), 1), ([2] * (MAX_POSITIONS + 1), MAX_POSITIONS)]
    check(await queue.ended(await queue.submit(make_scoring("long", items))), items)


async def test_a_chat_is_served_while_a_job_is_scored_and_ends_first(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(0)
    scoring_id = await queue.submit(make_scoring("slow", [([2] * 900, 1)] * 3))
    await until(lambda: worker.claimed == 1)
    chat_id = await queue.submit(make_job("quick", max_new_tokens=8))
    await until(lambda: worker.claimed == 2)
    worker.executor.allow(9)
    assert choice_text(await queue.ended(chat_id)) == expected_text(chat_id, 8)
    assert not (await queue.state(scoring_id)).is_terminal
    worker.executor.allow(math.inf)
    check(await queue.ended(scoring_id), [([2] * 900, 1)] * 3)


async def test_a_worker_that_waits_takes_what_comes_to_be_scored(queue, start_worker):
    start_worker()
    for number in range(3):
        check(await queue.ended(await queue.submit(make_scoring(f"job {number}"))))


async def test_what_is_to_be_scored_alone_comes_before_chats_that_came_later(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(0)
    await queue.submit(make_job("before", max_new_tokens=8))
    await until(lambda: worker.claimed == 1)
    alone = make_scoring("alone")
    # As after the loss of two workers, and passed over for long.
    await queue.client.redis.hset(f"oasst:{{0}}:job:{alone.job_id}", mapping={"charge": 8, "passed_over_ms": 1})
    await queue.submit(alone)
    await until(lambda: worker.claimer.keeps_itself_to_score)
    later_ids = [await queue.submit(make_job(f"later {number}", max_new_tokens=8)) for number in range(3)]
    worker.executor.allow(math.inf)
    check(await queue.ended(alone.job_id))
    for job_id in later_ids:
        assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 8)
    claimed_ms = [
        int(await queue.client.redis.hget(f"oasst:{{0}}:job:{job_id}", "claimed_ms"))
        for job_id in (alone.job_id, *later_ids)
    ]
    assert claimed_ms[0] == min(claimed_ms)


async def test_another_worker_goes_on_behind_the_last_logged_item(queue, start_worker):
    different = [([token, 4, 6], 1) for token in range(1, 41)]
    first = start_worker("first", step_tokens=24)
    first.executor.allow(1)
    job_id = await queue.submit(make_scoring("resumed", different))
    await until(lambda: queue_has_logged(queue, job_id))
    await first.die()
    logged = (await queue.log(job_id)).end_position
    await queue.lose_lease(job_id)

    second = start_worker("second")
    check(await queue.ended(job_id), different)
    assert 0 < logged < len(different)
    assert second.registry.get_sample_value("oasst_worker_scored_tokens_total") == 2 * (len(different) - logged)


async def queue_has_logged(queue, job_id: str) -> bool:
    return (await queue.log(job_id)).end_position > 0


async def test_logits_that_are_not_finite_fail_the_job_and_no_other(queue, start_worker):
    worker = start_worker()
    job = make_scoring("broken")
    worker.executor.broken.add(f"{job.job_id}/1")
    assert (await queue.ended(await queue.submit(job))).outcome.failed.reason == "NUMERIC"
    check(await queue.ended(await queue.submit(make_scoring("after it"))))


async def test_a_cancelled_job_leaves_the_engine(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(0)
    job_id = await queue.submit(make_scoring("cancelled", [([token] * 900, 1) for token in range(1, 9)]))
    await until(lambda: worker.claimed == 1)
    await queue.client.cancel(job_id)
    worker.executor.allow(math.inf)
    await until(lambda: worker.jobs_by("cancelled") == 1)
    await until(lambda: worker.loop.load.num_running + worker.loop.load.num_waiting == 0)


async def test_a_worker_asked_to_stop_gives_back_what_it_has_not_scored(queue, start_worker):
    worker = start_worker()
    worker.executor.allow(0)
    job_id = await queue.submit(make_scoring("released"))
    await until(lambda: worker.claimed == 1)
    worker.consumer.drain(0)
    await worker.task
    worker.executor.allow(math.inf)
    start_worker("second")
    check(await queue.ended(job_id))


@pytest.mark.parametrize(
    "item",
    [([1], 1), ([1, 2], 0), ([1, 2], 2), ([1, VOCAB_SIZE], 1), ([1] * (MAX_POSITIONS + 2), 1)],
    ids=["no continuation", "no context", "all context", "unknown token", "too long"],
)
async def test_what_would_hurt_the_engine_is_refused(queue, start_worker, item):
    start_worker()
    log = await queue.ended(await queue.submit(make_scoring("bad", [*ITEMS, item])))
    assert log.outcome.failed.reason == "INVALID_JOB"
