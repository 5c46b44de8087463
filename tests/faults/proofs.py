"""What rows demand of a world after their fault, and the figures that show it."""

from collections.abc import Iterable

from faults.checker import FINISHED, Transcript
from faults.load import FaultMissedError
from faults.world import World

__all__ = ["recovery", "require_ends", "require_none_taken_away", "require_some_resumed", "tokens_computed_again"]

# How late after its lease a dead worker's job is going on: a sweep comes each second, and two cores are few.
_SWEEP_S = 3.0


def require_ends(transcripts: Iterable[Transcript], *allowed: str) -> None:
    """Every stream ended in one of these ways; FINISHED if none is named."""
    ends = {transcript.end for transcript in transcripts}
    if not ends <= set(allowed or (FINISHED,)):
        raise AssertionError(f"streams ended as {sorted(map(str, ends))}")


def recovery(world: World, *, allowance_s: float = 0.0) -> dict[str, float]:
    """How long the longest pause was that a caller saw, which a lease and a sweep bound."""
    longest_s = max(transcript.longest_pause_s() for transcript in world.load.transcripts)
    limit_s = world.shape.lease_s + _SWEEP_S + allowance_s
    if longest_s > limit_s:
        raise AssertionError(f"a stream paused for {longest_s:.1f} s, {limit_s:.1f} s is the limit")
    return {"longest pause s": longest_s, "tokens computed again": tokens_computed_again(world)}


def tokens_computed_again(world: World) -> int:
    drawn = world.times_drawn()
    return sum(drawn.values()) - len(drawn)


async def require_some_resumed(world: World) -> dict[str, float]:
    """At least one job went on at another worker."""
    resumed = await world.metric("oasst_worker_resumed_jobs_total")
    if not resumed:
        raise AssertionError("no job was resumed: the fault met nothing")
    return {"resumed jobs": resumed}


async def require_none_taken_away(world: World) -> dict[str, float]:
    """No worker that lived lost a job, and no token was computed twice.

    A worker that the machine itself kept from running was not healthy: such a run tells nothing.
    """
    fenced = await world.metric("oasst_worker_fenced_pushes_total")
    again = tokens_computed_again(world)
    if fenced or again:
        message = f"healthy workers lost {fenced:g} jobs, {again} tokens were computed again"
        still_s = world.longest_standstill_s()
        if still_s > world.shape.lease_s / 2:
            raise FaultMissedError(f"{message}; one had stood still for {still_s:.1f} s")
        raise AssertionError(message)
    return {"jobs taken from live workers": 0, "tokens computed again": 0}
