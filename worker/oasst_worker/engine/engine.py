"""The engine: schedule, execute, update, every step.

Where the device computes by itself, the next step is launched before this one is waited for.
"""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from oasst_worker.engine.batch import (
    Batch,
    Chunk,
    Computed,
    Executor,
    Launched,
    LookaheadExecutor,
    OutOfDeviceMemoryError,
    Sample,
    Scores,
    TokenLogprob,
)
from oasst_worker.engine.blocks import BlockPool
from oasst_worker.engine.params import GenerationParams
from oasst_worker.engine.scheduler import Scheduler
from oasst_worker.engine.scoring import ScoringSequence, TargetScore
from oasst_worker.engine.sequence import Sequence

__all__ = ["Engine", "EngineConfig", "FinishReason", "ScoreOutput", "TokenOutput", "finish_reason"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    eos_token_id: int
    max_positions: int  # Prompt and generated tokens of one sequence.
    max_sequences: int = 32  # Running at once.
    step_tokens: int = 512  # Budget of one step, decoding and prefill together.
    max_slowdown: float = 1.7  # A few prompts make a step of sequences that decode at most so many times as long.
    speculate: int = 0  # The most tokens guessed ahead for one sequence in a step; 0 guesses none.


class FinishReason(Enum):
    """Why a sequence ended inside the engine."""

    END_OF_TEXT = "end_of_text"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What a step gave one sequence: a token, and the end of the sequence if this was its last."""

    sequence_id: str
    token_id: int | None  # None with FinishReason.ERROR only.
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """A sequence was scored, or could not be."""

    sequence_id: str
    # For each of its continuations, the scores of the continuation's tokens; empty with an error.
    continuations: Items[Items[TargetScore]]
    error: str | None = None


_NOT_FINITE = "the logits are not finite numbers"

# So many steps are waited for before the next is launched, after the device had no memory for one behind another.
_STEPS_ALONE = 64


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that has begun."""

    batch: Batch
    launched: Launched
    started_s: float


class Engine:
    """Continuous batching over an executor. Not thread-safe: one thread owns it.

    engine.add(Sequence("a", prompt_ids=[1, 2, 3], params=GenerationParams(max_new_tokens=16)))
    while engine.has_work():
        for output in engine.step():
            ...
    """

    def __init__(
        self, executor: Executor, config: EngineConfig, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`clock` tells seconds, by which it learns what steps cost.

        Raises:
            StepBudgetError: if a step of the configured size is too small.
        """
        self.config = config
        self._executor = executor
        self._lookahead = executor if isinstance(executor, LookaheadExecutor) and executor.looks_ahead else None
        self._clock = clock
        self._scheduler = Scheduler(
            BlockPool(executor.num_blocks, executor.block_size),
            max_sequences=config.max_sequences,
            step_tokens=config.step_tokens,
            prefill_tile=executor.prefill_tile,
            is_position_exact=executor.is_position_exact,
            max_slowdown=config.max_slowdown,
            speculate=config.speculate,
        )
        self._sequences: dict[str, Sequence] = {}
        self.last_batch = Batch(())
        self._ahead: _Step | None = None  # Launched behind the last one that was waited for.
        self._num_alone = 0  # Steps until one is launched ahead again.
        self._ended_s = float("-inf")  # When that was.
        # Batches that the device had no memory for.
        self.num_out_of_memory = 0

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def max_sequences(self) -> int:
        return self._scheduler.max_sequences

    @property
    def kv_tokens_used(self) -> int:
        return self._scheduler.kv_tokens_used

    @property
    def kv_tokens_total(self) -> int:
        return self._scheduler.kv_tokens_total

    @property
    def block_size(self) -> int:
        """Positions in a block of KV cache."""
        return self._executor.block_size

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all sequences that ever ran."""
        return self._scheduler.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Those among them whose keys and values were in the cache already."""
        return self._scheduler.num_cached_tokens

    @property
    def num_drafted_tokens(self) -> int:
        """Tokens guessed ahead, of all sequences that ever ran."""
        return self._scheduler.speculator.num_drafted

    @property
    def num_accepted_tokens(self) -> int:
        """Those among them that were right."""
        return self._scheduler.speculator.num_accepted

    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """The sequence waits for its first step.

        Raises:
            ValueError: if its id is taken, or it could never end within the model's positions or the KV cache.
        """
        params = sequence.params
        longest = sequence.num_prompt_tokens + params.max_new_tokens
        if sequence.sequence_id in self._sequences:
            raise ValueError(f"sequence {sequence.sequence_id} is in the engine already")
        if sequence.num_output_tokens >= params.max_new_tokens and not isinstance(sequence, ScoringSequence):
            raise ValueError(f"sequence {sequence.sequence_id} has all {params.max_new_tokens} tokens already")
        if longest > self.config.max_positions:
            raise ValueError(f"{longest} tokens do not fit the model's {self.config.max_positions} positions")
        if longest > self.kv_tokens_total:
            raise ValueError(f"{longest} tokens do not fit the KV cache of {self.kv_tokens_total}")
        self._sequences[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)

    def remove(self, sequence_id: str) -> None:
        """The sequence is gone and its blocks are free; an unknown id changes nothing."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> list[TokenOutput | ScoreOutput]:
        """One turn. Sequences that finished in it are removed already.

        Raises:
            OutOfDeviceMemoryError: if the device has no memory even for the smallest batch.
        """
        step, self._ahead = self._ahead or self._launch(), None
        self.last_batch = step.batch if step else Batch(())
        if step is None:
            return []
        self._ahead = self._launch_behind(step)
        try:
            results = step.launched.wait()
        except OutOfDeviceMemoryError as error:
            self._ahead = None
            self._shrink(step.batch, error)
            return []
        now_s = self._clock()
        self._scheduler.record_seconds(step.batch, now_s - max(step.started_s, self._ended_s))
        self._ended_s = now_s
        outputs = self._update(step.batch, results)
        if not self._sequences:
            self._ahead = None
        return outputs

    def _launch(self) -> _Step | None:
        """The next step has begun; None if there is none to take."""
        while (batch := self._scheduler.schedule()).chunks:
            started_s = self._clock()
            try:
                if self._lookahead:
                    return _Step(batch, self._lookahead.launch(batch), started_s)
                return _Step(batch, Computed(self._executor.execute(batch)), started_s)
            except OutOfDeviceMemoryError as error:
                self._shrink(batch, error)
        return None

    def _launch_behind(self, step: _Step) -> _Step | None:
        """What follows the step has begun, if that is known already and there is memory for both."""
        if self._lookahead is None:
            return None
        if self._num_alone:
            self._num_alone -= 1
            return None
        batch = self._scheduler.schedule_behind(step.batch)
        if not batch.chunks:
            return None
        started_s = self._clock()
        try:
            return _Step(batch, self._lookahead.launch_behind(batch, step.launched), started_s)
        except OutOfDeviceMemoryError as error:
            self.num_out_of_memory += 1
            self._num_alone = _STEPS_ALONE
            logger.warning("no memory for a step behind another sequences=%d: %s", len(batch.chunks), error)
            return None

    def _shrink(self, failed: Batch, error: OutOfDeviceMemoryError) -> None:
        self.num_out_of_memory += 1
        logger.warning("no memory for a step sequences=%d tokens=%d: %s", len(failed.chunks), failed.num_tokens, error)
        if not self._scheduler.shrink(failed):
            raise error

    def _update(self, batch: Batch, results: Items[Sample | Scores | None]) -> list[TokenOutput | ScoreOutput]:
        self._scheduler.record_good_step()
        of_chunks = iter(results)
        outputs: list[TokenOutput | ScoreOutput] = []
        for chunk in batch.chunks:
            num_results = chunk.num_results
            given = [result for result in islice(of_chunks, num_results) if result is not None]
            if len(given) < num_results or not self._is_current(chunk):
                continue
            if chunk.draws:
                outputs += self._take_samples(chunk, given)
                continue
            self._scheduler.record_computed(chunk)
            if given and (output := self._take_scores(chunk, given[0])) is not None:
                outputs.append(output)
        return outputs

    def _is_current(self, chunk: Chunk) -> bool:
        """The sequence has not ended or been preempted since the chunk was launched."""
        sequence = chunk.sequence
        return self._sequences.get(sequence.sequence_id) is sequence and sequence.num_computed == chunk.start

    def _take_scores(self, chunk: Chunk, scores: Sample | Scores) -> ScoreOutput | None:
        """Keeps the chunk's scores; tells them all once the sequence has ended."""
        sequence = chunk.sequence
        if not isinstance(sequence, ScoringSequence) or not isinstance(scores, Scores):
            raise TypeError(f"sequence {sequence.sequence_id} was to be scored, not drawn from")
        if scores.of_targets is None:
            self._scheduler.forget(sequence)
            self.remove(sequence.sequence_id)
            return ScoreOutput(sequence.sequence_id, (), error=_NOT_FINITE)
        for target, score in zip(chunk.targets, scores.of_targets, strict=True):
            sequence.take(target, score)
        if not sequence.has_ended:
            return None
        self.remove(sequence.sequence_id)
        return ScoreOutput(sequence.sequence_id, sequence.continuation_scores())

    def _take_samples(self, chunk: Chunk, samples: Items[Sample | Scores]) -> list[TokenOutput]:
        """Appends what was drawn, as far as the drafts were right; a sequence that ends by it is gone."""
        sequence = chunk.sequence
        outputs = list(self._append(chunk, samples))
        self._scheduler.record_computed(chunk, num_accepted=len(outputs) - 1)
        if outputs[-1].error is not None:
            self._scheduler.forget(sequence)
        if outputs[-1].finish is not None:
            self.remove(sequence.sequence_id)
        return outputs

    def _append(self, chunk: Chunk, samples: Items[Sample | Scores]) -> Iterator[TokenOutput]:
        sequence = chunk.sequence
        # A draft that is right is the token it was drawn as, and the sample behind it was drawn after the right tokens.
        for sample, draft in zip(samples, (*chunk.drafts, None), strict=True):
            if not isinstance(sample, Sample):
                raise TypeError(f"sequence {sequence.sequence_id} was to be drawn from, not scored")
            if sample.token_id is None:
                yield TokenOutput(sequence.sequence_id, None, finish=FinishReason.ERROR, error=_NOT_FINITE)
                return
            sequence.append(sample.token_id)
            finish = finish_reason(
                sequence.params,
                sample.token_id,
                num_output_tokens=sequence.num_output_tokens,
                eos_token_id=self.config.eos_token_id,
            )
            yield TokenOutput(sequence.sequence_id, sample.token_id, sample.logprob, finish)
            if finish is not None or sample.token_id != draft:
                return


def finish_reason(
    params: GenerationParams, token_id: int, *, num_output_tokens: int, eos_token_id: int
) -> FinishReason | None:
    """Why a sequence ends with `token_id` as the last of its `num_output_tokens`; None if it goes on."""
    if token_id in params.stop_token_ids and num_output_tokens > params.min_new_tokens:
        return FinishReason.STOP_TOKEN
    if token_id == eos_token_id and not params.ignore_eos:
        return FinishReason.END_OF_TEXT
    if num_output_tokens >= params.max_new_tokens:
        return FinishReason.LENGTH
    return None
