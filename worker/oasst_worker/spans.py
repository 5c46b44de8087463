"""How a job is told in a trace, by the names of OpenTelemetry's conventions for generative AI where they have one.

    submit         the gateway's: oasst_gateway/spans.py
      queue        from the job's arrival to its first claim
      chat MODEL   from a claim to the end, or the loss, of the job here; a job that lost its worker has several.
                   `score MODEL` for one that scores
        prefill    from the claim to this worker's first token
        decode     from there to its last

A span is exported when it ends. Of a worker that dies with a job only `queue` is seen; the next claim tells in its
`oasst.job.attempt` that there was one before, and in `oasst.job.resumed_tokens` how far it came.
"""

import time
from collections.abc import Callable, Sequence

from oasst.jobs.v1.job_pb2 import Job
from oasst.v1.chat_pb2 import Usage
from oasst.v1.generation_pb2 import ChoiceFinish, FinishReason
from oasst_jobs import ClaimedJob
from oasst_telemetry import NO_TRACE, Attributes, SpanKind, TraceContext, Tracer

__all__ = ["JobSpans"]


class JobSpans:
    """The spans of one claim, which begins now. Times are seconds of `clock`."""

    def __init__(self, tracer: Tracer, claimed: ClaimedJob, *, clock: Callable[[], float] = time.monotonic) -> None:
        job = claimed.job
        submitted = TraceContext.parse(job.traceparent, job.tracestate) if job.traceparent else NO_TRACE
        # Spans have times of the wall, all of them by one look at it: so a clock that is set does not part them.
        self._epoch_ns = time.time_ns() - int(clock() * 1e9)
        self._claimed_ns = self._wall_ns(clock())
        self._clock = clock
        self.log_fields = submitted.log_fields
        if claimed.is_first_claim:
            arrived_ns = self._claimed_ns - claimed.waited_ms * 1_000_000
            waiting = tracer.start("queue", kind=SpanKind.INTERNAL, parent=submitted, start_ns=arrived_ns)
            waiting.end(end_ns=self._claimed_ns)
        self._span = tracer.start(
            f"{_operation_of(job)} {job.model}", kind=SpanKind.CONSUMER, parent=submitted, start_ns=self._claimed_ns
        )
        if self._span.is_recorded:
            self._span.note(_describe_job(job) | _describe_claim(claimed))

    def end(
        self,
        outcome: str,
        *,
        first_token_s: float | None = None,
        last_token_s: float | None = None,
        usage: Usage | None = None,
        finishes: Sequence[ChoiceFinish] = (),
        error: str | None = None,
    ) -> None:
        """The job has left this worker: by this outcome, after these tokens."""
        if not self._span.is_recorded:
            return
        if first_token_s is not None and last_token_s is not None:
            first_ns, last_ns = self._wall_ns(first_token_s), self._wall_ns(last_token_s)
            self._span.child("prefill", start_ns=self._claimed_ns).end(end_ns=first_ns)
            self._span.child("decode", start_ns=first_ns).end(end_ns=last_ns)
        self._span.note({"oasst.job.outcome": outcome})
        if usage is not None:
            self._span.note(_describe_usage(usage))
        if finishes:
            self._span.note({"gen_ai.response.finish_reasons": [_reason_of(finish) for finish in finishes]})
        self._span.end(error=error, end_ns=self._wall_ns(self._clock()))

    def _wall_ns(self, clock_s: float) -> int:
        return self._epoch_ns + int(clock_s * 1e9)


def _operation_of(job: Job) -> str:
    return "score" if job.score_items else "chat"


def _describe_job(job: Job) -> dict[str, str | bool | int | float | Sequence[str]]:
    described: dict[str, str | bool | int | float | Sequence[str]] = {
        "gen_ai.operation.name": _operation_of(job),
        "gen_ai.provider.name": "oasst",
        "gen_ai.request.model": job.model,
        "gen_ai.response.model": job.model,
        "gen_ai.response.id": job.request_id,
    }
    if job.score_items:
        return described | {"oasst.job.items": len(job.score_items)}
    return described | _describe_generation(job)


def _describe_generation(job: Job) -> dict[str, str | bool | int | float | Sequence[str]]:
    sampling = job.sampling
    return {
        "gen_ai.request.max_tokens": job.limits.max_new_tokens,
        "gen_ai.request.choice.count": job.n,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }


def _describe_claim(claimed: ClaimedJob) -> dict[str, str | bool | int | float | Sequence[str]]:
    return {
        "messaging.operation.type": "process",
        "messaging.message.id": claimed.job_id,
        "oasst.job.id": claimed.job_id,
        "oasst.job.attempt": claimed.attempt,
        "oasst.job.resumed_tokens": claimed.end_position,
    }


def _describe_usage(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }


def _reason_of(finish: ChoiceFinish) -> str:
    return FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
