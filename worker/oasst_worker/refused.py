"""A job that this worker cannot run: it has failed before anything of it was computed."""

from typing import Any

from oasst.jobs.v1.job_pb2 import LogEntry
from oasst.v1.chat_pb2 import Failed, Finished, Usage
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

    def kv_tokens_expected(self, lookahead_tokens: int, *, block_size: int) -> int:
        return 0

    def take(self, output: Any, *, now_s: float) -> None:  # Any: there is none.
        """It has no parts that give any."""

    def _next_entry(self) -> LogEntry | None:
        return None

    def _finished(self) -> Finished:
        raise NotImplementedError("a refused job has failed")

    def _usage(self) -> Usage:
        tokens = num_prompt_tokens(self.claimed.job)
        return Usage(prompt_tokens=tokens, completion_tokens=self.claimed.end_position)
