"""A sequence that generates nothing: how likely its own tokens are, each after those before it."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from oasst_worker.engine.params import GenerationParams
from oasst_worker.engine.sequence import Sequence

__all__ = ["ScoringSequence", "Target", "TargetScore"]

_NOTHING_TO_GENERATE = GenerationParams(max_new_tokens=0)


@dataclass(frozen=True, slots=True)
class Target:
    """A token that is scored, and the position whose logits say how likely it is: the one before its own."""

    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class TargetScore:
    """What the raw logits say of a target."""

    logprob: float
    is_best: bool  # No token is more likely; of equals it has the lowest id.


class ScoringSequence(Sequence):
    """A context and its continuations, which differ in their last token alone: it is scored and never fed.

        |<-------------- fed -------------->|
        |     context    |  continuation    | last
                        |<-- targets' rows->|

    Its tokens to compute are a prompt's. What a step scores is kept here, so that a preemption repeats it and no more.
    """

    __slots__ = ("_scores", "first_position", "last_ids")

    def __init__(
        self,
        sequence_id: str,
        token_ids: Items[int],
        context_length: int,
        last_ids: Iterable[int],
        *,
        salt: bytes = b"",
    ) -> None:
        """`token_ids` are those that are fed, of which the first `context_length` are context; `last_ids` has one token
        for each continuation.

        Raises:
            ValueError: if the context is empty, or more than what is fed.
        """
        if not 1 <= context_length <= len(token_ids):
            raise ValueError(f"of {len(token_ids)} fed tokens {context_length} cannot be context")
        super().__init__(sequence_id, token_ids, _NOTHING_TO_GENERATE, salt=salt)
        # The first whose logits are wanted.
        self.first_position = context_length - 1
        self.last_ids = tuple(last_ids)
        self._scores: dict[Target, TargetScore] = {}

    @property
    def num_reusable(self) -> int:
        """The logits of the context's last token are wanted, so that it is always computed."""
        return self.first_position

    @property
    def has_ended(self) -> bool:
        """Everything is computed, and scored."""
        return self.num_computed == self.num_tokens

    def targets(self, start: int, end: int) -> Iterator[Target]:
        """What the logits of the positions [start, end) score."""
        token_ids = self.token_ids
        for position in range(max(start, self.first_position), end):
            if position + 1 < self.num_tokens:
                yield Target(position, token_ids[position + 1])
            else:
                yield from (Target(position, token_id) for token_id in self.last_ids)

    def take(self, target: Target, score: TargetScore) -> None:
        """The target has been scored, perhaps not for the first time."""
        self._scores[target] = score

    def continuation_scores(self) -> list[tuple[TargetScore, ...]]:
        """For each of `last_ids`, the scores of its continuation's tokens. The sequence has ended."""
        last = self.num_tokens - 1
        shared = tuple(self._scores[target] for target in self.targets(0, last))
        return [(*shared, self._scores[Target(last, token_id)]) for token_id in self.last_ids]
