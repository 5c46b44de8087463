"""What gateways and workers tell Prometheus, read for one screen."""

import http.client
import math
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Samples", "added_up", "gained", "quantile_of", "scrape"]

Key = TypeVar("Key")

_TIMEOUT_S = 2.0
# A process of one's own is not behind the web proxy, not even where `http_proxy` is set.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Samples:
    """The metrics of a process, or of several added up."""

    # Counter or gauge -> its value over all labels.
    values: Mapping[str, float] = field(default_factory=dict)
    # Counter or gauge -> tenant -> its value, where it is told by tenant.
    by_tenant: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Histogram -> upper bound -> observations up to it.
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)


def scrape(addresses: Sequence[str]) -> dict[str, Samples]:
    """The metrics of these processes now, all asked at once; without those that do not tell any."""
    with ThreadPoolExecutor(max_workers=max(1, len(addresses))) as pool:
        answers = zip(addresses, pool.map(_read, addresses), strict=True)
    return {address: samples for address, samples in answers if samples is not None}


def added_up(parts: Iterable[Samples]) -> Samples:
    """The metrics of several processes as one."""
    values: defaultdict[str, float] = defaultdict(float)
    by_tenant: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    buckets: defaultdict[str, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    for part in parts:
        for name, value in part.values.items():
            values[name] += value
        for name, tenants in part.by_tenant.items():
            for tenant, value in tenants.items():
                by_tenant[name][tenant] += value
        for name, bounds in part.buckets.items():
            for bound, count in bounds.items():
                buckets[name][bound] += count
    return Samples(values, by_tenant, buckets)


def gained(before: Mapping[str, Samples], now: Mapping[str, Samples]) -> Samples:
    """What was counted in between, by the processes that told both times."""
    return added_up(_gain(before[address], now[address]) for address in before.keys() & now.keys())


def quantile_of(buckets: Mapping[float, float], quantile: float) -> float | None:
    """The quantile of what a histogram observed, as Prometheus estimates it; None if it observed nothing."""
    counts = sorted(buckets.items())
    if not counts or not counts[-1][1]:
        return None
    wanted = quantile * counts[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *counts]):
        if upto >= wanted:
            # In the last bucket, which has no end, its beginning is all that is known.
            return low if math.isinf(high) else low + (high - low) * (wanted - below) / (upto - below)
    return None


def _gain(before: Samples, now: Samples) -> Samples:
    return Samples(
        _differences(before.values, now.values),
        {name: _differences(before.by_tenant.get(name, {}), tenants) for name, tenants in now.by_tenant.items()},
        {name: _differences(before.buckets.get(name, {}), bounds) for name, bounds in now.buckets.items()},
    )


def _differences(before: Mapping[Key, float], now: Mapping[Key, float]) -> dict[Key, float]:
    # A process that started again counts from 0; its loss is no negative gain.
    return {key: max(0.0, value - before.get(key, 0.0)) for key, value in now.items()}


def _read(address: str) -> Samples | None:
    """The process's metrics; None if it does not answer, or with something else."""
    try:
        # Always http: the scheme is not the caller's to choose.
        with _OPENER.open(f"http://{address}/metrics", timeout=_TIMEOUT_S) as response:
            body: bytes = response.read()
        return _parse(body.decode())
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _parse(text: str) -> Samples:
    values: defaultdict[str, float] = defaultdict(float)
    by_tenant: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    buckets: defaultdict[str, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                buckets[family.name][float(sample.labels["le"])] += sample.value
            else:
                values[sample.name] += sample.value
            if tenant := sample.labels.get("tenant"):
                by_tenant[sample.name][tenant] += sample.value
    return Samples(values, by_tenant, buckets)
