"""Framed updates are protobuf as anybody else would write it."""

import pytest
from job_samples import finished, make_entry
from oasst.jobs.v1 import job_pb2
from oasst_jobs.framing import update_head

ENTRY, OUTCOME = job_pb2.JobUpdate.ENTRY_FIELD_NUMBER, job_pb2.JobUpdate.OUTCOME_FIELD_NUMBER


@pytest.mark.parametrize("num_tokens", [1, 10, 40, 3000])
@pytest.mark.parametrize("start", [0, 127, 128, 70_000])
def test_updates_written_one_behind_the_other_are_a_batch(num_tokens: int, start: int) -> None:
    entry, outcome = make_entry(start, start + num_tokens), finished(num_tokens)
    entry_bytes, outcome_bytes = entry.SerializeToString(), outcome.SerializeToString()
    written = (
        update_head("job-1", start, field=ENTRY, length=len(entry_bytes))
        + entry_bytes
        + update_head("job-2", start + num_tokens, field=OUTCOME, length=len(outcome_bytes))
        + outcome_bytes
    )
    assert job_pb2.UpdateBatch.FromString(written) == job_pb2.UpdateBatch(
        updates=[
            job_pb2.JobUpdate(job_id="job-1", start_position=start, entry=entry),
            job_pb2.JobUpdate(job_id="job-2", start_position=start + num_tokens, outcome=outcome),
        ]
    )
