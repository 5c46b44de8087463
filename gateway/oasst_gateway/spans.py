"""How a chat is told in a trace, by the names of OpenTelemetry's conventions where they have one.

caller's span
  oasst.v1.ChatService/ChatStream   the RPC; "first token" is marked in it
    submit                          the call that queued the job
      queue, chat, prefill, decode  the worker's: oasst_worker/spans.py
"""

from collections.abc import Iterator
from contextlib import contextmanager

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_jobs import num_prompt_tokens
from oasst_telemetry import NO_TRACE, Attributes, Span, SpanKind, TraceContext

__all__ = ["describe_chat", "describe_end", "describe_score", "submitting", "trace_of"]


def trace_of(job: job_pb2.Job) -> TraceContext:
    """Where the job was submitted; nowhere if nobody traces."""
    return TraceContext.parse(job.traceparent, job.tracestate) if job.traceparent else NO_TRACE


@contextmanager
def submitting(job: job_pb2.Job, span: Span) -> Iterator[None]:
    """What workers do for the job is caused by its submission, which is a part of `span`."""
    part = span.child(
        "submit",
        kind=SpanKind.PRODUCER,
        attributes={"messaging.operation.type": "send", "messaging.message.id": job.job_id},
    )
    job.traceparent, job.tracestate = part.context.traceparent, part.context.tracestate
    error = None
    try:
        yield
    except BaseException as failure:
        error = type(failure).__name__
        raise
    finally:
        part.end(error=error)


def describe_chat(job: job_pb2.Job) -> Attributes:
    """What the RPC's span tells of the chat that it opened."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "oasst",
        "gen_ai.request.model": job.model,
        "gen_ai.response.id": job.request_id,
        "gen_ai.usage.input_tokens": len(job.prompt_token_ids),
        "oasst.job.id": job.job_id,
    }


def describe_score(job: job_pb2.Job) -> Attributes:
    """What the RPC's span tells of a request to score."""
    return {
        "gen_ai.operation.name": "score",
        "gen_ai.provider.name": "oasst",
        "gen_ai.request.model": job.model,
        "gen_ai.usage.input_tokens": num_prompt_tokens(job),
        "oasst.job.id": job.job_id,
        "oasst.job.items": len(job.score_items),
    }


def describe_end(finished: chat_pb2.Finished) -> Attributes:
    """What it tells once the chat has finished."""
    return {
        "gen_ai.usage.output_tokens": finished.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": finished.usage.cached_tokens,
        "gen_ai.response.finish_reasons": [
            generation_pb2.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
            for finish in finished.finishes
        ],
    }
