"""One page of metrics for several processes: what each told last, added up."""

import threading
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

__all__ = ["GatheredMetrics"]

_Merge = Callable[[float, float], float]

# Gauges that do not add up. All processes tell the same of the queue, at most a second apart.
_GAUGES: dict[str, _Merge] = {
    "oasst_gateway_redis_up": min,  # 1 while it answers all of them.
    "oasst_gateway_queue_waiting_jobs": max,
    "oasst_gateway_queue_waiting_tokens": max,
    "oasst_gateway_queue_waiting_scoring_jobs": max,
    "oasst_gateway_queue_waiting_scoring_tokens": max,
    "oasst_gateway_queue_running_jobs": max,
    "oasst_gateway_queue_dead_jobs": max,
    "oasst_gateway_workers": max,
    "process_start_time_seconds": min,
    "python_info": max,
}
# What a process has counted stays counted after it; its gauges go with it.
_LASTING = ("counter", "histogram")


class GatheredMetrics(Collector):
    """The sum of the pages of processes. Counters and histograms never fall, whichever process dies.

    A page is in the OpenMetrics format. Any thread may collect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[str, str] = {}
        self._departed: list[Metric] = []

    def record(self, process: str, page: str) -> None:
        """The process tells this from now on."""
        with self._lock:
            self._pages[process] = page

    def depart(self, process: str) -> None:
        """The process is gone."""
        with self._lock:
            page = self._pages.pop(process, "")
            lasting = (family for family in _parse(page) if family.type in _LASTING)
            self._departed = list(_merge([*self._departed, *lasting]))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            pages, departed = list(self._pages.values()), self._departed
        yield from _merge([*departed, *(family for page in pages for family in _parse(page))])

    def describe(self) -> Iterable[Metric]:
        return ()  # Known only once a process has told.


def _parse(page: str) -> Iterator[Metric]:
    return iter(text_string_to_metric_families(page)) if page else iter(())  # type: ignore[no-untyped-call]


def _merge(families: Iterable[Metric]) -> Iterator[Metric]:
    """One family of each name, one sample of each series."""
    merged: dict[str, Metric] = {}
    series: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for family in families:
        merged.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
        samples = series.setdefault(family.name, {})
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            before = samples.get(key)
            samples[key] = sample if before is None else _join(before, sample, _merge_of(family))
    for name, family in merged.items():
        family.samples = list(series[name].values())
        yield family


def _merge_of(family: Metric) -> _Merge:
    return _GAUGES.get(family.name, _add) if family.type == "gauge" else _add


def _join(one: Sample, other: Sample, merge: _Merge) -> Sample:
    return one._replace(value=merge(one.value, other.value), exemplar=other.exemplar or one.exemplar)


def _add(one: float, other: float) -> float:
    return one + other
