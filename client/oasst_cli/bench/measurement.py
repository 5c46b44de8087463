"""From what happened to each request to the figures of a load. Pure: times in, numbers out.

Times are seconds since the load began. A request's latencies count from when it was due, not from when it was sent,
so that a tool that falls behind shows it instead of hiding it.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from oasst_cli.bench.arrivals import Load

__all__ = [
    "METRICS",
    "Distribution",
    "Overhead",
    "RequestRecord",
    "Summary",
    "latencies_of",
    "summarize",
    "tokens_per_s_over_time",
]

_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What happened to one request."""

    due_s: float
    sent_s: float
    ended_s: float
    # When each delta with tokens came, and how many it had.
    delta_times_s: tuple[float, ...]
    delta_tokens: tuple[int, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    # From acceptance to a worker's claim, as the service measured it.
    queue_s: float = 0.0
    # Empty for a request that ran to its end.
    error: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(self.delta_tokens)

    @property
    def ttft_s(self) -> float | None:
        """To the first token; None if none came."""
        return self.delta_times_s[0] - self.due_s if self.delta_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for fewer than two."""
        later = self.num_tokens - self.delta_tokens[0] if self.delta_tokens else 0
        return (self.delta_times_s[-1] - self.delta_times_s[0]) / later if later else None

    @property
    def itls_s(self) -> list[float]:
        """Between two consecutive deltas, which hold one token each unless the service joined some."""
        return [after - before for before, after in pairwise(self.delta_times_s)]

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s


# Metric -> its title. Those of a request that has none are left out.
METRICS: Mapping[str, str] = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end to end",
    "queue": "queue wait",
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """None of no values."""
        if not values:
            return None
        ordered = sorted(values)
        percentiles = {f"p{percent}": _percentile(ordered, percent) for percent in _PERCENTILES}
        return cls(mean=statistics.fmean(ordered), max=ordered[-1], **percentiles)


@dataclass(frozen=True, slots=True)
class Overhead:
    """What the tool itself took."""

    # Of one core, while the load ran.
    cpu_share: float
    cpu_s_per_token: float
    # How late requests were sent, and how late the event loop woke: neither is the service's fault.
    send_delay_p99_s: float
    loop_delay_p99_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one load."""

    name: str
    # How much load that is, and in what: requests per second, or at once.
    level: float
    level_unit: str
    duration_s: float
    num_finished: int
    # Error -> how many requests ended with it.
    errors: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    # By the names of METRICS; of finished requests.
    latencies_s: Mapping[str, Distribution]
    # Requests that kept every limit; equal to `num_finished` where none was given.
    num_good: int
    overhead: Overhead

    @property
    def requests_per_s(self) -> float:
        return self.num_finished / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def goodput_per_s(self) -> float:
        return self.num_good / self.duration_s

    def to_json(self) -> dict[str, Any]:
        rates = ("requests_per_s", "output_tokens_per_s", "goodput_per_s")
        return {**asdict(self), **{name: getattr(self, name) for name in rates}}


def summarize(
    load: Load, records: Sequence[RequestRecord], *, limits_s: Mapping[str, float], overhead: Overhead
) -> Summary:
    """The figures of a load's records. `limits_s` says what a good request keeps: metric -> seconds."""
    finished = [record for record in records if not record.error]
    latencies = {metric: Distribution.of(latencies_of(metric, finished)) for metric in METRICS}
    return Summary(
        name=load.name,
        level=load.level,
        level_unit=load.level_unit,
        duration_s=max(record.ended_s for record in records),
        num_finished=len(finished),
        errors=dict(Counter(record.error for record in records if record.error)),
        prompt_tokens=sum(record.prompt_tokens for record in finished),
        cached_tokens=sum(record.cached_tokens for record in finished),
        # What came before a failure was generated, too.
        output_tokens=sum(record.num_tokens for record in records),
        latencies_s={metric: each for metric, each in latencies.items() if each},
        num_good=sum(_keeps(record, limits_s) for record in finished),
        overhead=overhead,
    )


def latencies_of(metric: str, records: Sequence[RequestRecord]) -> list[float]:
    """Every value of one metric; a request has many inter-token latencies, and at most one of each other."""
    if metric == "itl":
        return [itl_s for record in records for itl_s in record.itls_s]
    values = [getattr(record, f"{metric}_s") for record in records]
    return [value for value in values if value is not None]


def tokens_per_s_over_time(records: Sequence[RequestRecord], *, window_s: float) -> list[tuple[float, float]]:
    """For each window its middle, and the tokens that came in it per second."""
    counts: Counter[int] = Counter()
    for record in records:
        for time_s, num_tokens in zip(record.delta_times_s, record.delta_tokens, strict=True):
            counts[int(time_s / window_s)] += num_tokens
    num_windows = max(counts, default=-1) + 1
    return [((index + 0.5) * window_s, counts[index] / window_s) for index in range(num_windows)]


def _keeps(record: RequestRecord, limits_s: Mapping[str, float]) -> bool:
    """Whether every latency of the request is within its limit."""
    return all(value <= limit_s for metric, limit_s in limits_s.items() for value in latencies_of(metric, [record]))


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest values, in proportion."""
    place = (len(ordered) - 1) * percent / 100
    low, part = math.floor(place), place % 1
    return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
