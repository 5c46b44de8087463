"""The checker sees what it is there to see: each way in which a stream or the queue can break its promise."""

import pytest
from oasst_client import Accepted, ChoiceFinish, Delta, Finished, FinishReason, QueueStatus, Timings, Usage
from oasst_jobs import JobState

from faults.checker import FINISHED, Transcript, queue_defects, stream_defects
from faults.verifiable import Prompt, foretell, text_of

PROMPT, SEED, NUM_TOKENS = Prompt(7), 11, 6
TOKENS = foretell(PROMPT, seed=SEED, choice=0, num_tokens=NUM_TOKENS)
ACCEPTED = Accepted("r", QueueStatus(0, None), 8, 0, SEED, "secret")
ENDED = Finished((ChoiceFinish(0, FinishReason.LENGTH),), Usage(), Timings())


def delta(start: int, stop: int, *, tokens: tuple[int, ...] = TOKENS, text: str | None = None) -> Delta:
    ids = tokens[start:stop]
    return Delta(choice=0, position=start, text=text_of(ids) if text is None else text, token_ids=ids)


def told(*events: object, end: str | None = FINISHED) -> Transcript:
    transcript = Transcript("r", PROMPT, SEED, NUM_TOKENS, end=end)
    transcript.events.extend(enumerate(events))
    return transcript


def test_a_right_stream_has_no_defect() -> None:
    assert stream_defects(told(ACCEPTED, delta(0, 2), delta(2, 6), ENDED)) == []


def test_a_stream_that_an_error_broke_off_has_no_defect() -> None:
    assert stream_defects(told(ACCEPTED, delta(0, 2), end="NUMERIC")) == []


@pytest.mark.parametrize(
    ("transcript", "defect"),
    [
        (told(ACCEPTED, delta(0, 2), end=None), "has no end after 2 tokens"),
        (told(ACCEPTED, delta(0, 2), delta(3, 6), ENDED), "choice 0 goes on at 3 after 2 tokens"),
        (told(ACCEPTED, delta(0, 3), delta(2, 6), ENDED), "choice 0 goes on at 2 after 3 tokens"),
        (told(ACCEPTED, delta(0, 6, tokens=TOKENS[::-1]), ENDED), "choice 0 has a wrong token at 0 of 6"),
        (told(ACCEPTED, delta(0, 6, text="else"), ENDED), "choice 0 has another text than its tokens"),
        (told(ACCEPTED, delta(0, 5), ENDED), "choice 0 finished with 5 of 6 tokens"),
        (told(ACCEPTED, delta(0, 6)), "ended as FINISHED with 0 finished events"),
        (told(ACCEPTED, delta(0, 6), ENDED, ENDED), "goes on after its end"),
        (told(ACCEPTED, delta(0, 6), ENDED, end="CANCELLED"), "ended as CANCELLED with 1 finished events"),
        (told(delta(0, 6), ENDED), "begins with Delta"),
        (told(ACCEPTED, ACCEPTED, delta(0, 6), ENDED), "was accepted more than once"),
    ],
)
def test_a_wrong_stream_is_told_from_a_right_one(transcript: Transcript, defect: str) -> None:
    assert f"r: {defect}" in stream_defects(transcript)


@pytest.mark.parametrize(
    ("state", "defect"),
    [
        (None, "was accepted and is lost"),
        (JobState.RUNNING, "is still running"),
        (JobState.CANCELLED, "its caller saw it finish, but it is cancelled"),
    ],
)
def test_a_request_that_the_queue_lost_or_forgot_to_end_is_noticed(state: JobState | None, defect: str) -> None:
    assert f"r: {defect}" in queue_defects([told(ACCEPTED, delta(0, 6), ENDED)], {"r": state})
    assert queue_defects([told(ACCEPTED, delta(0, 6), ENDED)], {"r": JobState.FINISHED}) == []
