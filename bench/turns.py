"""Systems take turns, so that what else the machine does falls on all alike; ratios are taken round by round."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

__all__ = ["Ratio", "median_of", "paired_ratio", "take_turns", "timed", "turns"]

# Threads of the system before keep a processor busy for a while after its answer.
_PAUSE_S = 0.3

_Name = TypeVar("_Name")
_Result = TypeVar("_Result")
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Ratio:
    """Of pairs that were measured in the same round."""

    median: float
    least: float
    largest: float

    def __format__(self, spec: str) -> str:
        median, least, largest = (format(value, spec or ".2f") for value in (self.median, self.least, self.largest))
        return f"{median} ({least}-{largest})"

    def __str__(self) -> str:
        return format(self)


def turns(
    names: Sequence[_Name], rounds: int, *, warms_up: bool = True, pause_s: float = _PAUSE_S
) -> Iterator[tuple[int, _Name]]:
    """Each round's number and whose turn it is, after a pause. Another one is first each time; round -1 warms up."""
    for number in range(-1 if warms_up else 0, rounds):
        first = number % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            time.sleep(pause_s)
            yield number, name


def take_turns(
    systems: Mapping[_Name, Callable[[int], _Result]], rounds: int, *, pause_s: float = _PAUSE_S
) -> dict[_Name, list[_Result]]:
    """What each system gave in each round, whose number it is told; what the warm-up gave is left out."""
    given: dict[_Name, list[_Result]] = {name: [] for name in systems}
    for number, name in turns(list(systems), rounds, pause_s=pause_s):
        result = systems[name](number)
        if number >= 0:
            given[name].append(result)
    return given


def timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    """Seconds, and what the call returned."""
    started_s = time.perf_counter()
    result = call()
    return time.perf_counter() - started_s, result


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Of the first to the second, both in the order of their rounds."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def median_of(rows: Sequence[_Row]) -> _Row:
    """A row like these, whose numbers are the medians of theirs."""
    first: Any = rows[0]  # Any: some dataclass.
    numbers = {field.name: [getattr(row, field.name) for row in rows] for field in fields(first)}
    differing = {name: of_one for name, of_one in numbers.items() if len(set(of_one)) > 1}
    return replace(first, **{name: statistics.median(of_one) for name, of_one in differing.items()})
