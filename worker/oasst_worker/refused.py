"""A job that this worker cannot run: it has failed before anything of it was computed."""

from oasst.v1.chat_pb2 import Failed, Usage
from oasst_jobs import ClaimedJob, num_prompt_tokens

from oasst_worker.held import HeldJob
from oasst_worker.spans import JobSpans

__all__ = ["RefusedJob"]


class RefusedJob(HeldJob):
    """Held until the queue has heard why."""

    def __init__(self, claimed: ClaimedJob, failed: Failed, spans: JobSpans, *, now_s: float) -> None:
        super().__init__(claimed, (), spans, now_s=now_s)
        self.failed = failed

    @property
    def outcome(self) -> str:
        return "refused"

    @property
    def has_ended(self) -> bool:
        return True

    @property
    def has_news(self) -> bool:
        return True

    def _usage(self) -> Usage:
        tokens = num_prompt_tokens(self.claimed.job)
        return Usage(prompt_tokens=tokens, completion_tokens=self.claimed.end_position)
