"""What a worker may claim beside the jobs it holds."""

import pytest
from oasst_jobs import ClaimedJob
from oasst_telemetry import NO_TRACER
from oasst_worker.generating import GeneratingJob
from oasst_worker.held import HeldJob
from oasst_worker.room import LOOKAHEAD_TOKENS, Room, room_for_chats, room_for_scoring
from oasst_worker.scoring import ScoringJob
from oasst_worker.spans import JobSpans
from scripted_worker import make_intake, make_job

BLOCK_SIZE = 16
# A chat of 4 prompt tokens and many to come keeps what it is expected to need in whole blocks, and another.
CHAT_TOKENS = 16 * ((4 + LOOKAHEAD_TOKENS) // 16 + 2)


def claim(*, is_solo: bool) -> ClaimedJob:
    return ClaimedJob(
        job_id="job",
        fence="1-claim",
        job=make_job("job", max_new_tokens=500),
        log=[],
        end_position=0,
        attempt=1,
        waited_ms=0,
        is_solo=is_solo,
    )


def chat(*, is_solo: bool = False) -> HeldJob:
    claimed = claim(is_solo=is_solo)
    return GeneratingJob(claimed, make_intake().accept(claimed), JobSpans(NO_TRACER, claimed), now_s=0.0)


def scoring(*, is_solo: bool = False) -> HeldJob:
    claimed = claim(is_solo=is_solo)
    return ScoringJob(claimed, (), JobSpans(NO_TRACER, claimed), now_s=0.0)


@pytest.mark.parametrize(
    ("jobs", "free_slots", "kv_tokens", "room"),
    [
        ([chat()], 3, 1000, Room(jobs=3, tokens=1000 - CHAT_TOKENS, choices=3)),
        ([chat(), chat(), scoring()], 2, 1000, Room(jobs=2, tokens=1000 - 2 * CHAT_TOKENS, choices=2)),
        ([chat()], 0, 1000, None),
        ([chat()], 3, CHAT_TOKENS, None),
        ([scoring()], 4, 1000, Room(jobs=4, tokens=1000, choices=4)),
        ([chat(is_solo=True)], 3, 1000, None),
        ([scoring(is_solo=True)], 4, 1000, None),
    ],
    ids=["beside one", "beside several", "no slot", "no cache", "beside scoring", "beside solo", "beside solo scoring"],
)
def test_as_many_chats_are_claimed_as_fit(jobs: list[HeldJob], free_slots: int, kv_tokens: int, room: Room | None):
    assert room_for_chats(jobs, free_slots=free_slots, kv_tokens=kv_tokens, block_size=BLOCK_SIZE) == room


def test_an_idle_worker_takes_one_chat_of_any_size():
    room = room_for_chats([], free_slots=4, kv_tokens=64, block_size=BLOCK_SIZE)
    assert room is not None
    assert room.is_idle
    assert room.jobs == 1
    assert min(room.tokens, room.choices) > 10**12


@pytest.mark.parametrize(
    ("jobs", "is_any", "is_idle"),
    [
        ([], True, True),
        ([chat()], True, False),
        ([chat(), scoring()], False, False),
        ([chat(is_solo=True)], False, False),
    ],
    ids=["idle", "beside a chat", "while it scores", "beside solo"],
)
def test_a_few_jobs_are_claimed_to_score_and_the_next_once_those_have_ended(
    jobs: list[HeldJob], is_any: bool, is_idle: bool
):
    room = room_for_scoring(jobs)
    assert (room is not None) is is_any
    assert (room is not None and room.is_idle) is is_idle
