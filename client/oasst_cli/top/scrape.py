"""What gateways and workers tell Prometheus, read for one screen."""

import math
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Samples", "quantile_since", "rate_since", "scrape"]

_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Samples:
    """Metrics of several processes, added up."""

    # Counter or gauge -> its value over all processes and labels.
    values: Mapping[str, float] = field(default_factory=dict)
    # Counter or gauge -> tenant -> its value, where it is told by tenant.
    by_tenant: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Histogram -> upper bound -> observations up to it.
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    # The addresses that did not answer.
    missing: Sequence[str] = ()


def scrape(addresses: Sequence[str]) -> Samples:
    """The metrics of these processes now, all asked at once."""
    with ThreadPoolExecutor(max_workers=max(1, len(addresses))) as pool:
        answers = dict(zip(addresses, pool.map(_read, addresses), strict=True))
    return _add_up(
        (text for text in answers.values() if text is not None),
        missing=[address for address, text in answers.items() if text is None],
    )


def rate_since(before: Samples, now: Samples, name: str, elapsed_s: float) -> float | None:
    """What a counter gained per second; None where nobody tells it."""
    if name not in now.values:
        return None
    # A process that started again counts from 0; its loss is no negative rate.
    return max(0.0, now.values[name] - before.values.get(name, 0.0)) / elapsed_s


def quantile_since(before: Samples, now: Samples, name: str, quantile: float) -> float | None:
    """The quantile of what a histogram observed in between, as Prometheus estimates it; None if it observed nothing."""
    earlier = before.buckets.get(name, {})
    counts = [
        (bound, max(0.0, count - earlier.get(bound, 0.0))) for bound, count in sorted(now.buckets.get(name, {}).items())
    ]
    if not counts or not counts[-1][1]:
        return None
    wanted = quantile * counts[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *counts]):
        if upto >= wanted:
            # In the last bucket, which has no end, its beginning is all that is known.
            return low if math.isinf(high) else low + (high - low) * (wanted - below) / (upto - below)
    return None


def _read(address: str) -> str | None:
    """The process's metrics; None if it does not answer."""
    try:
        # Always http: the scheme is not the caller's to choose.
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as response:
            body: bytes = response.read()
    except OSError:
        return None
    return body.decode()


def _add_up(texts: Iterable[str], *, missing: Sequence[str]) -> Samples:
    values: defaultdict[str, float] = defaultdict(float)
    by_tenant: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    buckets: defaultdict[str, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    buckets[family.name][float(sample.labels["le"])] += sample.value
                else:
                    values[sample.name] += sample.value
                if tenant := sample.labels.get("tenant"):
                    by_tenant[sample.name][tenant] += sample.value
    return Samples(values, by_tenant, buckets, missing)
