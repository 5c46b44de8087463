"""Jobs, log entries and outcomes as tests need them."""

from collections.abc import AsyncIterator

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2, scoring_pb2
from oasst_jobs import JOB_VERSION, Subscription, job_id_for

__all__ = [
    "MODEL",
    "failed",
    "finished",
    "logged_text",
    "make_entry",
    "make_job",
    "make_scores",
    "make_scoring_job",
    "news_of",
]

MODEL = "tiny-pythia"


def make_job(
    request_id: str,
    *,
    prompt_tokens: int = 4,
    max_new_tokens: int = 16,
    n: int = 1,
    model: str = MODEL,
    priority: chat_pb2.Priority = chat_pb2.PRIORITY_NORMAL,
    version: int = JOB_VERSION,
    tenant: str = "tenant",
) -> job_pb2.Job:
    return job_pb2.Job(
        version=version,
        job_id=job_id_for(tenant, request_id),
        tenant=tenant,
        model=model,
        prompt_token_ids=range(prompt_tokens),
        limits=generation_pb2.GenerationLimits(max_new_tokens=max_new_tokens),
        n=n,
        priority=priority,
        request_id=request_id,
    )


def make_scoring_job(
    request_id: str, *, num_items: int = 3, item_tokens: int = 4, tenant: str = "tenant", token_logprobs: bool = False
) -> job_pb2.Job:
    """Items whose tokens are 1, 2, ..., the last of them the continuation."""
    item = scoring_pb2.ScoreItem(token_ids=range(1, item_tokens + 1), context_length=item_tokens - 1)
    return job_pb2.Job(
        version=JOB_VERSION,
        job_id=job_id_for(tenant, request_id),
        tenant=tenant,
        model=MODEL,
        priority=chat_pb2.PRIORITY_BULK,
        request_id=request_id,
        score_items=[item] * num_items,
        score_token_logprobs=token_logprobs,
    )


def make_scores(start: int, stop: int) -> job_pb2.LogEntry:
    """What scoring the items from `start` to `stop` logs; item i has the log-probability -i."""
    scores = [scoring_pb2.ItemScore(logprob=-index) for index in range(start, stop)]
    return job_pb2.LogEntry(end_position=stop, scores=scores)


def make_entry(start: int, stop: int) -> job_pb2.LogEntry:
    """What generating the tokens from `start` to `stop` logs; token i is i and reads "i "."""
    tokens = range(start, stop)
    text = "".join(f"{token} " for token in tokens)
    return job_pb2.LogEntry(
        end_position=stop, deltas=[generation_pb2.Delta(position=start, text=text, token_ids=tokens)]
    )


def logged_text(entries: list[job_pb2.LogEntry]) -> str:
    return "".join(delta.text for entry in entries for delta in entry.deltas)


async def news_of(subscription: Subscription) -> AsyncIterator[job_pb2.LogEntry | job_pb2.Outcome]:
    """All that a reader is told, one by one. Nothing comes behind the outcome."""
    while True:
        taken = await subscription.take()
        for news in taken:
            yield news
            if isinstance(news, job_pb2.Outcome):
                assert news is taken[-1]
                return


def finished(completion_tokens: int = 0) -> job_pb2.Outcome:
    return job_pb2.Outcome(finished=chat_pb2.Finished(usage=chat_pb2.Usage(completion_tokens=completion_tokens)))


def failed(reason: str) -> job_pb2.Outcome:
    return job_pb2.Outcome(failed=chat_pb2.Failed(code=13, reason=reason, message="it did not work"))
