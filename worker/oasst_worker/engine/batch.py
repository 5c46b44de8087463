"""What one step computes, and what it gave: the words between the engine and its executor."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from oasst_worker.engine.scoring import ScoringSequence, Target, TargetScore
from oasst_worker.engine.sequence import Sequence

__all__ = [
    "Batch",
    "Chunk",
    "Computed",
    "Executor",
    "Launched",
    "LookaheadExecutor",
    "OutOfDeviceMemoryError",
    "Sample",
    "Scores",
    "TokenLogprob",
]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens [start, end) of one sequence, whose keys and values this step computes, and guesses of the next.

        |  computed  |<- start .. end ->|<- drafts ->|
        |<--------- token_ids --------->|

    A chunk with drafts draws at its last token and at each draft, as if the drafts before had been drawn.
    """

    sequence: Sequence
    start: int
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the step, drafts included."""
        return self.end - self.start + len(self.drafts)

    @property
    def token_ids(self) -> list[int]:
        """Of its rows, drafts included; 0 for a token that is still being drawn."""
        known = self.sequence.token_ids[self.start : self.end]
        return [*known, *(0 for _ in range(self.end - self.start - len(known))), *self.drafts]

    @property
    def num_draws(self) -> int:
        return 1 + len(self.drafts) if self.draws else 0

    @property
    def draws(self) -> bool:
        """The chunk ends with the sequence's last token, or the one being drawn, so the next one is drawn."""
        return self.end >= self.sequence.num_tokens and not isinstance(self.sequence, ScoringSequence)

    @property
    def decodes(self) -> bool:
        """It is one generated token, drafts aside."""
        return self.end - self.start == 1 and self.start >= self.sequence.num_prompt_tokens

    @property
    def num_results(self) -> int:
        """What an executor gives for the chunk: a sample for each draw, or scores, or nothing."""
        return self.num_draws or bool(self.targets)

    @property
    def targets(self) -> Items[Target]:
        """What is scored by the logits of its tokens."""
        if not isinstance(self.sequence, ScoringSequence):
            return ()
        return tuple(self.sequence.targets(self.start, self.end))


@dataclass(frozen=True, slots=True)
class Batch:
    """All chunks of one step, at most one per sequence."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A drawn token's log-probability by the raw logits, and the most likely tokens with theirs, best first."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """What a chunk that draws gave: a token, or None if its logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """What a chunk with targets gave: one score for each, or None if some of its logits were not finite."""

    of_targets: Items[TargetScore] | None


class OutOfDeviceMemoryError(RuntimeError):
    """The device has no memory left for a batch. It is as it was before, and can compute a smaller one."""


class Executor(Protocol):
    """Computes batches. The engine calls it from one thread."""

    @property
    def num_blocks(self) -> int:
        """Blocks of KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Positions in a block."""
        ...

    @property
    def prefill_tile(self) -> int:
        """A chunk that ends inside a prompt ends at a multiple of this.

        So the tiles of a prompt are the same however it is cut into chunks, and so are its bits.
        """
        ...

    @property
    def is_position_exact(self) -> bool:
        """A position's keys and values have the same bits however they are computed: prompt or generated, in any chunk.

        Otherwise only whole tiles of prompts are used again by others.
        """
        ...

    def execute(self, batch: Batch) -> Items[Sample | Scores]:
        """Keys and values of every chunk are in the cache.

        Returns, in order, the samples of each chunk that draws (one, and one for each draft, each drawn as if the
        drafts before it were the sequence's tokens) and scores for each that has targets.

        Raises:
            OutOfDeviceMemoryError: if a smaller batch may succeed. Nothing is drawn; what was written is written again.
        """
        ...


class Launched(Protocol):
    """A batch that is being computed."""

    def wait(self) -> Items[Sample | Scores | None]:
        """What `Executor.execute` returns, once it is there; to be called once, and in the order of launches.

        None stands for what was drawn behind another token than its sequence got: that is to be computed again.

        Raises:
            OutOfDeviceMemoryError: as `Executor.execute`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """A batch whose results were there at once."""

    results: Items[Sample | Scores]

    def wait(self) -> Items[Sample | Scores]:
        return self.results


@runtime_checkable
class LookaheadExecutor(Executor, Protocol):
    """An executor whose device computes while the host goes on."""

    @property
    def looks_ahead(self) -> bool:
        """A batch behind the one that is being computed saves time."""
        ...

    def launch(self, batch: Batch) -> Launched:
        """As `execute`, without waiting for it."""
        ...

    def launch_behind(self, batch: Batch, before: Launched) -> Launched:
        """As `launch`, where every chunk is the token that the batch before draws for its sequence."""
        ...
