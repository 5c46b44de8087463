"""A job that generates: its choices' tokens become its log."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from oasst.jobs.v1.job_pb2 import LogEntry
from oasst.v1.chat_pb2 import Finished, Usage
from oasst.v1.generation_pb2 import Delta, TokenAlternative, TokenLogprob
from oasst_jobs import ClaimedJob

from oasst_worker import engine
from oasst_worker.choice import ChoiceOutput
from oasst_worker.held import HeldJob
from oasst_worker.intake import ResumedChoice
from oasst_worker.spans import JobSpans

__all__ = ["GeneratingJob"]


@dataclass(slots=True)
class _Unlogged:
    """What no item has carried yet of a choice."""

    position: int  # Of the first token.
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[engine.TokenLogprob] = field(default_factory=list)

    def delta(self, choice: int) -> Delta:
        return Delta(
            choice=choice,
            position=self.position,
            text="".join(self.texts),
            token_ids=self.token_ids,
            # The text of a single token is its own.
            text_lengths=map(len, self.texts) if len(self.texts) > 1 else (),
            logprobs=map(_wire_logprob, self.logprobs),
        )


class GeneratingJob(HeldJob):
    """Its positions are the tokens of all its choices."""

    def __init__(self, claimed: ClaimedJob, choices: Sequence[ResumedChoice], spans: JobSpans, *, now_s: float) -> None:
        running = [resumed for resumed in choices if resumed.finish is None]
        super().__init__(claimed, [resumed.choice for resumed in running], spans, now_s=now_s)
        self._num_cached_tokens: int | None = None  # Of the choice that found the fewest.
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        # Generated so far, for each choice that still runs.
        self._num_tokens = {resumed.choice: resumed.num_logged_tokens for resumed in running}
        self._unlogged: dict[int, _Unlogged] = {}  # By choice index.
        self._finishes = {resumed.choice.index: resumed.finish for resumed in choices if resumed.finish is not None}

    @property
    def prefill_s(self) -> float | None:
        """From the claim to this worker's first token; None before it."""
        return None if self._first_token_s is None else self._first_token_s - self._claimed_s

    @property
    def decode_s(self) -> float | None:
        """From this worker's first token to its last."""
        if self._first_token_s is None or self._last_token_s is None:
            return None
        return self._last_token_s - self._first_token_s

    @property
    def has_ended(self) -> bool:
        return self.failed is not None or not self._num_tokens

    @property
    def has_news(self) -> bool:
        return bool(self._unlogged) or self.has_ended

    def kv_tokens_expected(self, lookahead_tokens: int, *, block_size: int) -> int:
        job = self.claimed.job
        most_tokens, least_tokens = job.limits.max_new_tokens, job.limits.min_new_tokens
        expected_tokens = (
            len(job.prompt_token_ids) + min(max(num_tokens + lookahead_tokens, least_tokens), most_tokens)
            for num_tokens in self._num_tokens.values()
        )
        return sum((-(-num_tokens // block_size) + 1) * block_size for num_tokens in expected_tokens)

    def take(self, output: ChoiceOutput, *, now_s: float) -> None:
        if output.part not in self._num_tokens:
            return
        if output.error is not None:
            self._fail(output.error)
            self._num_tokens.clear()
            return
        if output.token_id is not None:
            self._take_token(output, output.token_id, now_s)
        if output.finish is not None:
            self._finishes[output.part.index] = output.finish
            del self._num_tokens[output.part]

    def end_spans(self, outcome: str) -> None:
        self.spans.end(
            outcome,
            first_token_s=self._first_token_s,
            last_token_s=self._last_token_s,
            usage=self._usage(),
            finishes=[self._finishes[index] for index in sorted(self._finishes)],
            error=None if self.failed is None else self.failed.reason,
        )

    def _take_token(self, output: ChoiceOutput, token_id: int, now_s: float) -> None:
        position = self._num_tokens[output.part]
        self._num_tokens[output.part] += 1
        self.num_new_tokens += 1
        cached_tokens = output.part.num_cached_tokens
        if self._num_cached_tokens is None or cached_tokens < self._num_cached_tokens:
            self._num_cached_tokens = cached_tokens
        self._first_token_s = self._first_token_s or now_s
        self._last_token_s = now_s
        index = output.part.index
        unlogged = self._unlogged.get(index)
        if unlogged is None:
            unlogged = self._unlogged[index] = _Unlogged(position)
        unlogged.token_ids.append(token_id)
        unlogged.texts.append(output.text)
        if output.logprob is not None:
            unlogged.logprobs.append(output.logprob)

    def _next_entry(self) -> LogEntry | None:
        if not self._unlogged:
            return None
        num_tokens = sum(len(unlogged.token_ids) for unlogged in self._unlogged.values())
        deltas = [unlogged.delta(index) for index, unlogged in self._unlogged.items()]
        self._unlogged.clear()
        return LogEntry(end_position=self._end_position + num_tokens, deltas=deltas)

    def _finished(self) -> Finished:
        finishes = [self._finishes[index] for index in sorted(self._finishes)]
        timings = self._timings(prefill_s=self.prefill_s or 0.0, decode_s=self.decode_s or 0.0)
        return Finished(finishes=finishes, usage=self._usage(), timings=timings)

    def _usage(self) -> Usage:
        job = self.claimed.job
        return Usage(
            prompt_tokens=len(job.prompt_token_ids),
            cached_tokens=self._num_cached_tokens or 0,
            completion_tokens=self._end_position,
            dropped_turns=job.dropped_turns,
        )


def _wire_logprob(logprob: engine.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        logprob=logprob.logprob,
        alternatives=[TokenAlternative(token_id=token_id, logprob=value) for token_id, value in logprob.alternatives],
    )
