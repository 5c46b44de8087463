"""What callers are told of our errors."""

import grpc
import pytest
from oasst_gateway.errors import ChatFailedError
from oasst_gateway.status import status_of
from oasst_jobs import JobState, PoisonedPromptError, QueueUnavailableError, UnavailableReason
from oasst_jobs.outcomes import outcome_of


def test_a_prompt_that_kills_its_workers_has_one_code_whether_it_ran_or_is_refused() -> None:
    dead = outcome_of(JobState.FAILED, None, prompt_tokens=1, end_position=0)
    assert dead is not None
    statuses = [status_of(ChatFailedError(dead.failed)), status_of(PoisonedPromptError())]
    assert {(status.code, status.reason) for status in statuses} == {(grpc.StatusCode.ABORTED, "POISON")}


@pytest.mark.parametrize("reason", UnavailableReason)
def test_why_the_queue_is_away_is_told_and_no_more_than_is_known(reason: UnavailableReason) -> None:
    status = status_of(QueueUnavailableError(reason, "told to the log alone"))
    assert (status.code, status.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_UNAVAILABLE")
    assert status.metadata == {"cause": reason}
    assert status.retry_after_s is not None
    assert "lost" not in status.message
    assert ("cannot be reached" in status.message) == (reason is UnavailableReason.UNREACHABLE)
