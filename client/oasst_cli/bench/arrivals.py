"""When requests are sent. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

__all__ = ["ClosedLoad", "Load", "OpenLoad"]


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """Requests come by themselves, however the service fares.

    Gaps between them are drawn from a gamma distribution. Burstiness 1 is a Poisson process; more than 1 comes in
    bursts, less than 1 more evenly, and 0 at even gaps. It is the square of the gaps' coefficient of variation.
    """

    rate_per_s: float
    burstiness: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.rate_per_s:g}/s"

    @property
    def level(self) -> float:
        return self.rate_per_s

    @property
    def level_unit(self) -> str:
        return "requests per second"

    def due_times_s(self, random: Random) -> Iterator[float]:
        """Seconds from the start, without end; the first request comes at once."""
        due_s, mean_gap_s = 0.0, 1 / self.rate_per_s
        while True:
            yield due_s
            if self.burstiness:
                due_s += random.gammavariate(1 / self.burstiness, mean_gap_s * self.burstiness)
            else:
                due_s += mean_gap_s


@dataclass(frozen=True, slots=True)
class ClosedLoad:
    """So many callers, each sending its next request when the one before has ended."""

    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.concurrency} at once"

    @property
    def level(self) -> float:
        return self.concurrency

    @property
    def level_unit(self) -> str:
        return "requests at once"


Load = OpenLoad | ClosedLoad
