"""Two scorers asked the same in turn, ours as it is, the other at several batch sizes, of which its best counts."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bench.turns import Ratio, paired_ratio, take_turns, timed

__all__ = ["BATCH_SIZES", "BatchSizes", "compare_batch_sizes"]

BATCH_SIZES = (1, 4, 16)

_Asked = TypeVar("_Asked")
_Scores = TypeVar("_Scores")


@dataclass(frozen=True)
class BatchSizes:
    """Seconds for the same work, the medians of the rounds."""

    ours_s: float
    theirs_s: dict[int, float]  # By batch size.
    ratios: dict[int, Ratio]  # Of each of these to ours.

    @property
    def best(self) -> int:
        """The batch size at which the other is fastest."""
        return min(self.theirs_s, key=lambda size: self.theirs_s[size])

    @property
    def best_s(self) -> float:
        return self.theirs_s[self.best]

    @property
    def ratio(self) -> Ratio:
        """To ours, at its best."""
        return self.ratios[self.best]


def compare_batch_sizes(
    ours: Callable[[_Asked], _Scores],
    theirs: Callable[[_Asked, int], _Scores],
    ask: Callable[[int], _Asked],
    rounds: int,
) -> tuple[BatchSizes, list[tuple[_Scores, _Scores]]]:
    """How long both took, and the scores of both beside each other, of each round and batch size.

    `ask` says what is scored in a round: never the same twice, or the worker would use again what it computed before.
    """
    asked = {number: ask(number) for number in range(-1, rounds)}
    scorers: dict[int | None, Callable[[_Asked], _Scores]] = {None: ours}
    for size in BATCH_SIZES:
        scorers[size] = lambda of_round, size=size: theirs(of_round, size)
    turns = take_turns(
        {scorer: lambda number, score=score: timed(lambda: score(asked[number])) for scorer, score in scorers.items()},
        rounds,
    )
    seconds = {scorer: [took_s for took_s, _ in of_one] for scorer, of_one in turns.items()}
    sizes = BatchSizes(
        statistics.median(seconds[None]),
        {size: statistics.median(seconds[size]) for size in BATCH_SIZES},
        {size: paired_ratio(seconds[size], seconds[None]) for size in BATCH_SIZES},
    )
    pairs = [
        (our_scores, their_scores)
        for size in BATCH_SIZES
        for (_, our_scores), (_, their_scores) in zip(turns[None], turns[size], strict=True)
    ]
    return sizes, pairs
