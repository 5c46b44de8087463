"""What must hold of every stream and of the queue behind them, whatever broke meanwhile. Pure."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from oasst_client import Accepted, Delta, Event, Finished, FinishReason
from oasst_jobs import JobState

from faults.verifiable import Prompt, foretell, text_of

__all__ = ["FINISHED", "Transcript", "queue_defects", "stream_defects"]

# How a stream ended that was told to the end; any other end is the reason or the code of its error.
FINISHED = "FINISHED"


@dataclass
class Transcript:
    """One request, and all that its caller was told."""

    request_id: str
    prompt: Prompt
    seed: int
    num_tokens: int
    num_choices: int = 1
    # Each event with the time it came at.
    events: list[tuple[float, Event]] = field(default_factory=list)
    # FINISHED, the error's reason or code; None while the stream goes on.
    end: str | None = None
    # How often the stream was taken up again.
    num_resumes: int = 0
    # When a refusal told to come back.
    retry_after_s: float | None = None

    @property
    def ended_s(self) -> float:
        """When it was last told something."""
        return self.events[-1][0]

    @property
    def deltas(self) -> list[Delta]:
        return [event for _, event in self.events if isinstance(event, Delta)]

    @property
    def num_seen(self) -> int:
        """Tokens the caller has, over all choices."""
        return sum(len(delta.token_ids) for delta in self.deltas)

    @property
    def accepted(self) -> Accepted | None:
        return next((event for _, event in self.events if isinstance(event, Accepted)), None)

    @property
    def is_flowing(self) -> bool:
        """It has tokens and expects more."""
        return self.end is None and 0 < self.num_seen < self.num_choices * self.num_tokens

    def longest_pause_s(self) -> float:
        """Between two deltas."""
        times = [at_s for at_s, event in self.events if isinstance(event, Delta)]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


def stream_defects(transcript: Transcript) -> list[str]:
    """What is wrong with what one caller was told; empty for a right stream, whole or broken off by an error."""
    return [f"{transcript.request_id}: {defect}" for defect in _stream_defects(transcript)]


def _stream_defects(transcript: Transcript) -> Iterator[str]:
    if transcript.end is None:
        yield f"has no end after {transcript.num_seen} tokens"
    events = [event for _, event in transcript.events]
    if events and not isinstance(events[0], Accepted):
        yield f"begins with {type(events[0]).__name__}"
    if sum(isinstance(event, Accepted) for event in events) > 1:
        yield "was accepted more than once"
    yield from _end_defects(transcript, events)
    for choice in range(transcript.num_choices):
        yield from _choice_defects(transcript, choice)


def _end_defects(transcript: Transcript, events: Sequence[Event]) -> Iterator[str]:
    ends = [index for index, event in enumerate(events) if isinstance(event, Finished)]
    if (transcript.end == FINISHED) != bool(ends):
        yield f"ended as {transcript.end} with {len(ends)} finished events"
    if len(ends) > 1 or (ends and ends[0] != len(events) - 1):
        yield "goes on after its end"
    for finish in (finish for index in ends for finish in events[index].finishes):
        if finish.reason is not FinishReason.LENGTH:
            yield f"choice {finish.choice} ended by {finish.reason}"


def _choice_defects(transcript: Transcript, choice: int) -> Iterator[str]:
    deltas = [delta for delta in transcript.deltas if delta.choice == choice]
    seen: list[int] = []
    for delta in deltas:
        if delta.position != len(seen):
            yield f"choice {choice} goes on at {delta.position} after {len(seen)} tokens"
        seen += delta.token_ids
    expected = foretell(transcript.prompt, seed=transcript.seed, choice=choice, num_tokens=transcript.num_tokens)
    if tuple(seen) != expected[: len(seen)]:
        wrong = next(index for index, pair in enumerate(zip(seen, expected, strict=False)) if pair[0] != pair[1])
        yield f"choice {choice} has a wrong token at {wrong} of {len(seen)}"
        return
    text, whole_text = "".join(delta.text for delta in deltas), text_of(seen)
    if not whole_text.startswith(text) or (transcript.end == FINISHED and text != whole_text):
        yield f"choice {choice} has another text than its tokens"
    if transcript.end == FINISHED and len(seen) != transcript.num_tokens:
        yield f"choice {choice} finished with {len(seen)} of {transcript.num_tokens} tokens"


def queue_defects(transcripts: Sequence[Transcript], states: Mapping[str, JobState | None]) -> list[str]:
    """What is wrong between callers and queue; `states` has the state of each accepted request.

    Nothing accepted is lost or left in between: accepted = finished + cancelled + expired + failed.
    """
    defects = []
    for request_id, state in states.items():
        if state is None:
            defects.append(f"{request_id}: was accepted and is lost")
        elif not state.is_terminal:
            defects.append(f"{request_id}: is still {state}")
    for transcript in transcripts:
        state = states.get(transcript.request_id)
        if transcript.end == FINISHED and state not in (None, JobState.FINISHED):
            defects.append(f"{transcript.request_id}: its caller saw it finish, but it is {state}")
    return defects
