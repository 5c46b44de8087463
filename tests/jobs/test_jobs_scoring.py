"""What is to be scored waits in a queue of its own, and is kept like anything else."""

import pytest
from job_samples import MODEL, finished, make_job, make_scores, make_scoring_job
from oasst.jobs.v1 import job_pb2
from oasst_jobs import (
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueFullError,
    QueueLimits,
    Reconciler,
    Submitter,
    TenantFullError,
    TenantPolicy,
    job_size,
)
from waiting import until


async def submit(submitter: Submitter, job: job_pb2.Job, **options):
    return await submitter.submit(job, digest=job.job_id.encode(), timeout_ms=None, **options)


async def claim_all(claimer, *, is_scoring: bool) -> list[str]:
    claimed = await claimer.claim(max_jobs=100, max_tokens=10**6, is_scoring=is_scoring)
    return [each.job.request_id for each in claimed]


def test_a_job_that_scores_is_as_large_as_its_items_and_their_scores():
    assert job_size(make_scoring_job("a", num_items=3, item_tokens=4)) == 3 * 4 + 3


async def test_whoever_asks_for_chats_gets_none_to_score_and_the_other_way_round(submitter, claimer):
    await submit(submitter, make_scoring_job("score"))
    await submit(submitter, make_job("chat"))
    assert await claim_all(claimer, is_scoring=False) == ["chat"]
    assert await claim_all(claimer, is_scoring=False) == []
    assert await claim_all(claimer, is_scoring=True) == ["score"]


async def test_no_number_of_jobs_to_score_stands_before_a_chat(submitter, client):
    for number in range(20):
        await submit(submitter, make_scoring_job(f"score-{number}", num_items=200))
    submitted = await submit(submitter, make_job("chat"), max_tokens_ahead=0)
    assert (submitted.queue_position, submitted.tokens_ahead) == (0, 0)
    load = await client.load(MODEL)
    assert (load.waiting_jobs, load.waiting_tokens) == (1, job_size(make_job("chat")))
    assert (load.waiting_scoring_jobs, load.waiting_scoring_tokens) == (20, 20 * 1000)


async def test_what_waits_to_be_scored_counts_against_its_own_limits_only(client: QueueClient):
    submitter = Submitter(client, gateway_id="gateway", limits=QueueLimits(max_waiting_jobs=2))
    for number in range(2):
        await submit(submitter, make_scoring_job(f"score-{number}"))
    with pytest.raises(QueueFullError):
        await submit(submitter, make_scoring_job("one more"))
    policy = TenantPolicy(max_waiting_jobs=2)
    for number in range(2):
        await submit(submitter, make_job(f"chat-{number}"), policy=policy)


async def test_a_tenant_has_a_share_of_its_own_to_score(submitter):
    policy = TenantPolicy(max_waiting_jobs=1)
    await submit(submitter, make_scoring_job("score"), policy=policy)
    await submit(submitter, make_job("chat"), policy=policy)
    with pytest.raises(TenantFullError):
        await submit(submitter, make_scoring_job("another"), policy=policy)


async def test_tenants_take_turns_in_being_scored(submitter, claimer):
    for number in range(3):
        await submit(submitter, make_scoring_job(f"many-{number}", tenant="many"))
    await submit(submitter, make_scoring_job("one", tenant="one"))
    assert (await claim_all(claimer, is_scoring=True)).index("one") == 1


async def test_the_log_holds_the_scores_as_they_came_then_the_end(submitter, claimer):
    job = make_scoring_job("score")
    await submit(submitter, job)
    (claimed,) = await claimer.claim(max_jobs=1, max_tokens=100, is_scoring=True)
    items = [
        PushItem(job.job_id, claimed.fence, 0, make_scores(0, 2)),
        PushItem(job.job_id, claimed.fence, 2, make_scores(2, 3), finished()),
    ]
    assert await claimer.push(items) == [PushStatus.OK] * 2
    log = await submitter.read(job.job_id)
    assert log is not None
    assert [score.logprob for entry in log.entries for score in entry.scores] == [0, -1, -2]
    assert (log.state, log.end_position) == (JobState.FINISHED, 3)


async def test_another_worker_goes_on_after_the_last_item_that_was_scored(submitter, hasty_claimer, claimer, sweeper):
    job = make_scoring_job("score")
    await submit(submitter, job)
    (first,) = await hasty_claimer.claim(max_jobs=1, max_tokens=100, is_scoring=True)
    await hasty_claimer.push([PushItem(job.job_id, first.fence, 0, make_scores(0, 2), renews=False)])

    async def is_lost() -> bool:
        return bool((await sweeper.sweep()).requeued)

    await until(is_lost)
    (second,) = await claimer.claim(max_jobs=1, max_tokens=100, is_scoring=True)
    assert (second.end_position, second.attempt) == (2, 2)
    assert [score.logprob for entry in second.log for score in entry.scores] == [0, -1]
    late = PushItem(job.job_id, first.fence, 2, make_scores(2, 3))
    assert await hasty_claimer.push([late]) == [PushStatus.FENCED]


async def test_the_same_request_again_is_the_same_job(submitter, claimer):
    job = make_scoring_job("score")
    assert (await submit(submitter, job)).is_new
    assert not (await submit(submitter, job)).is_new
    assert await claim_all(claimer, is_scoring=True) == ["score"]


async def test_a_cancelled_job_is_not_scored(submitter, claimer):
    job = make_scoring_job("score")
    await submit(submitter, job)
    assert await submitter.cancel(job.job_id) is JobState.CANCELLED
    assert await claim_all(claimer, is_scoring=True) == []


async def test_the_reconciler_finds_nothing_to_repair(client, submitter, claimer):
    for number in range(3):
        await submit(submitter, make_scoring_job(f"score-{number}"))
        await submit(submitter, make_job(f"chat-{number}"))
    await claimer.claim(max_jobs=1, max_tokens=100, is_scoring=True)
    reconciler = Reconciler(client)
    await reconciler.walk()
    assert reconciler.num_repairs == 0
