"""Many values in calls that a server takes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

__all__ = ["batches"]

T = TypeVar("T")


def batches(values: Sequence[T], costs: Iterable[int], *, most: int, most_cost: int) -> Iterator[Sequence[T]]:
    """Runs of values, each of at most `most` values and `most_cost` in all; one value alone may cost more.

    >>> list(batches("abcdef", [1, 1, 1, 3, 9, 1], most=2, most_cost=4))
    ['ab', 'cd', 'e', 'f']
    """
    start, total = 0, 0
    for index, cost in enumerate(costs):
        if index > start and (index - start == most or total + cost > most_cost):
            yield values[start:index]
            start, total = index, 0
        total += cost
    if start < len(values):
        yield values[start:]
