"""How a job ended, for those ends that no worker wrote: they follow from the state alone."""

from google.rpc import code_pb2  # type: ignore[import-untyped]  # the package ships no types
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2

from oasst_jobs.records import JobState

__all__ = [
    "STREAM_DIVERGED",
    "diverged",
    "is_end_of_job",
    "lost",
    "malformed",
    "outcome_of",
    "state_of",
    "unreadable",
]

# Of readers who cannot go on. Their job may.
STREAM_DIVERGED = "STREAM_DIVERGED"
_UNREADABLE_LOG = "UNREADABLE_LOG"

_ENDS_WITHOUT_WORKER = {
    JobState.CANCELLED: (code_pb2.CANCELLED, "CANCELLED", "the request was cancelled"),
    JobState.EXPIRED: (code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the request's time ran out"),
    JobState.FAILED: (code_pb2.ABORTED, "POISON", "every worker that ran the request was lost"),
}


def outcome_of(
    state: JobState, written: bytes | None, *, prompt_tokens: int, end_position: int
) -> job_pb2.Outcome | None:
    """The outcome a worker wrote, else the one the state stands for; None while the job can still go on."""
    if written is not None:
        return job_pb2.Outcome.FromString(written)
    if not state.is_terminal:
        return None
    usage = chat_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=end_position)
    return _failed(*_ENDS_WITHOUT_WORKER[state], usage)


def state_of(outcome: job_pb2.Outcome) -> JobState:
    """The state a job is in once a worker has written this outcome."""
    return JobState.FINISHED if outcome.WhichOneof("outcome") == "finished" else JobState.FAILED


def malformed() -> job_pb2.Outcome:
    """Of a job whose stored bytes are no Job."""
    return _failed(code_pb2.INTERNAL, "MALFORMED_JOB", "the stored request cannot be read")


def lost() -> job_pb2.Outcome:
    """Of a job that is not stored: its retention is over, or Redis lost it."""
    return _failed(code_pb2.ABORTED, "JOB_LOST", "the request is no longer stored")


def diverged(seen_position: int, end_position: int) -> job_pb2.Outcome:
    """Of a stream whose log is shorter than what was seen of it: Redis lost part of it."""
    message = f"{seen_position} tokens were seen, but only {end_position} are stored"
    return _failed(code_pb2.ABORTED, STREAM_DIVERGED, message)


def unreadable() -> job_pb2.Outcome:
    """Of a stream whose log holds what its reader does not understand."""
    return _failed(code_pb2.INTERNAL, _UNREADABLE_LOG, "what is stored of the answer cannot be read")


def is_end_of_job(outcome: job_pb2.Outcome) -> bool:
    """Whether the job has ended, and not only what one reader can be told of it."""
    return outcome.failed.reason not in (STREAM_DIVERGED, _UNREADABLE_LOG)


def _failed(code: int, reason: str, message: str, usage: chat_pb2.Usage | None = None) -> job_pb2.Outcome:
    return job_pb2.Outcome(failed=chat_pb2.Failed(code=code, reason=reason, message=message, usage=usage))
