"""What a worker may claim, by the jobs it holds: no more than fits, so that the rest waits where the queue is fair."""

from collections.abc import Collection
from dataclasses import dataclass

from oasst_worker.held import HeldJob
from oasst_worker.scoring import ScoringJob

__all__ = ["LOOKAHEAD_TOKENS", "Room", "room_for_chats", "room_for_scoring"]

# KV cache kept free for the next tokens of each running choice, so that a claim does not preempt at once.
LOOKAHEAD_TOKENS = 64
# More tokens than any job asks for: an idle worker takes the next job whatever its size.
_ANY_SIZE = 2**50
_SCORING_JOBS = 4  # Held at once.


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker can take in."""

    jobs: int
    tokens: int
    choices: int
    is_idle: bool = False


_ROOM_OF_IDLE = Room(jobs=1, tokens=_ANY_SIZE, choices=_ANY_SIZE, is_idle=True)


def room_for_chats(jobs: Collection[HeldJob], *, free_slots: int, kv_tokens: int, block_size: int) -> Room | None:
    """What may be claimed to generate beside these jobs; None for nothing.

    An idle worker takes one job whatever its size: so one that can never fit is told so, and one that needs the whole
    worker gets it. Beside a job that is to run alone nothing is claimed.
    """
    if not jobs:
        return _ROOM_OF_IDLE
    if _has_solo(jobs):
        return None
    tokens = kv_tokens - sum(job.kv_tokens_expected(LOOKAHEAD_TOKENS, block_size=block_size) for job in jobs)
    return Room(jobs=free_slots, tokens=tokens, choices=free_slots) if free_slots > 0 and tokens > 0 else None


def room_for_scoring(jobs: Collection[HeldJob]) -> Room | None:
    """What may be claimed to score beside these jobs; None for nothing.

    A few small requests at a time, and the next ones only once they have ended: whatever is to run alone then finds an
    idle worker, and what is lost with a worker is little.
    """
    if _has_solo(jobs) or any(isinstance(job, ScoringJob) for job in jobs):
        return None
    return Room(jobs=_SCORING_JOBS, tokens=_ANY_SIZE, choices=_ANY_SIZE, is_idle=not jobs)


def _has_solo(jobs: Collection[HeldJob]) -> bool:
    return any(job.claimed.is_solo for job in jobs)
