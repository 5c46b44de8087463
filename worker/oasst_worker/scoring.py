"""A job that scores: which items share a sequence in the engine, and how their scores become its log."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oasst.jobs.v1.job_pb2 import Job, LogEntry
from oasst.v1.chat_pb2 import Finished, Usage
from oasst.v1.scoring_pb2 import ItemScore
from oasst_jobs import ClaimedJob, num_prompt_tokens

from oasst_worker.engine import ScoreOutput, ScoringSequence, TargetScore
from oasst_worker.held import HeldJob
from oasst_worker.parts import PartError
from oasst_worker.spans import JobSpans

__all__ = ["ScoredRun", "ScoredRunOutput", "ScoringJob", "scored_runs"]


@dataclass(frozen=True, slots=True)
class ScoredRunOutput:
    """The scores of a run's items, or an error: it ends with its first output."""

    part: "ScoredRun"
    # For each item, those of its continuation's tokens; empty with an error.
    scores: Sequence[Sequence[TargetScore]] = ()
    error: PartError | None = None

    @property
    def has_ended(self) -> bool:
        return True


class ScoredRun:
    """Items that stand together and differ in their last token alone: one sequence in the engine."""

    __slots__ = ("first_item", "sequence")

    def __init__(self, first_item: int, sequence: ScoringSequence) -> None:
        self.first_item = first_item
        self.sequence = sequence

    def take(self, output: ScoreOutput) -> ScoredRunOutput:
        if output.error is not None:
            return self.fail(PartError("NUMERIC", output.error))
        return ScoredRunOutput(self, output.continuations)

    def fail(self, error: PartError) -> ScoredRunOutput:
        return ScoredRunOutput(self, error=error)


def scored_runs(claimed: ClaimedJob) -> Iterator[ScoredRun]:
    """The items behind those that are logged, in their order."""
    items = claimed.job.score_items
    start = claimed.end_position
    while start < len(items):
        head = items[start]
        fed_ids, stop = head.token_ids[:-1], start + 1
        while (
            stop < len(items)
            and items[stop].context_length == head.context_length
            and items[stop].token_ids[:-1] == fed_ids
        ):
            stop += 1
        last_ids = [item.token_ids[-1] for item in items[start:stop]]
        sequence_id = f"{claimed.job_id}/{start}"
        salt = claimed.job.cache_salt
        yield ScoredRun(start, ScoringSequence(sequence_id, fed_ids, head.context_length, last_ids, salt=salt))
        start = stop


class ScoringJob(HeldJob):
    """Its positions are its items. Their scores may come in any order, and are logged in the items' own."""

    def __init__(self, claimed: ClaimedJob, runs: Sequence[ScoredRun], spans: JobSpans, *, now_s: float) -> None:
        super().__init__(claimed, runs, spans, now_s=now_s)
        self.num_scored_tokens = 0  # By this worker.
        self._scored_s = now_s
        self._scores: dict[int, ItemScore] = {}  # By item: what no push has carried yet.
        self._num_missing = len(claimed.job.score_items) - claimed.end_position

    @property
    def has_ended(self) -> bool:
        return self.failed is not None or self._num_missing == 0

    @property
    def has_news(self) -> bool:
        return self._end_position in self._scores or self.has_ended

    def take(self, output: ScoredRunOutput, *, now_s: float) -> None:
        if self.failed is not None:
            return
        if output.error is not None:
            self._fail(output.error)
            return
        for item, scores in enumerate(output.scores, start=output.part.first_item):
            self._scores[item] = _item_score(scores, self.claimed.job)
            self.num_scored_tokens += len(scores)
        self._num_missing -= len(output.scores)
        self._scored_s = now_s

    def _next_entry(self) -> LogEntry | None:
        scores, end = [], self._end_position
        while end in self._scores:
            scores.append(self._scores.pop(end))
            end += 1
        return LogEntry(end_position=end, scores=scores) if scores else None

    def _finished(self) -> Finished:
        return Finished(usage=self._usage(), timings=self._timings(prefill_s=self._scored_s - self._claimed_s))

    def _usage(self) -> Usage:
        return Usage(prompt_tokens=num_prompt_tokens(self.claimed.job))


def _item_score(scores: Sequence[TargetScore], job: Job) -> ItemScore:
    logprobs = [score.logprob for score in scores]
    return ItemScore(
        logprob=sum(logprobs),
        is_greedy=all(score.is_best for score in scores),
        token_logprobs=logprobs if job.score_token_logprobs else None,
    )
