"""Pages of several processes become one that adds up, whoever dies."""

import pytest
from oasst_gateway.gathered import GatheredMetrics
from oasst_gateway.metrics import FleetMetrics, GatewayMetrics
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families


class Process:
    """The metrics of one gateway process, told to its parent."""

    def __init__(self, name: str, gathered: GatheredMetrics) -> None:
        self.name = name
        self._registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self._registry)
        self._gathered = gathered

    def tell(self) -> None:
        self._gathered.record(self.name, generate_latest(self._registry).decode())


@pytest.fixture
def gathered() -> GatheredMetrics:
    return GatheredMetrics()


@pytest.fixture
def page(gathered: GatheredMetrics) -> CollectorRegistry:
    registry = CollectorRegistry()
    FleetMetrics(registry)
    registry.register(gathered)
    return registry


def test_counters_and_buckets_of_all_processes_add_up(gathered: GatheredMetrics, page: CollectorRegistry) -> None:
    for name, num_tokens in (("a", 3), ("b", 4)):
        process = Process(name, gathered)
        process.metrics.generated_tokens.inc(num_tokens)
        process.metrics.queue_wait_seconds.observe(0.01 * num_tokens)
        process.tell()
    assert page.get_sample_value("oasst_gateway_generated_tokens_total") == 7
    assert page.get_sample_value("oasst_gateway_queue_wait_seconds_count") == 2
    assert page.get_sample_value("oasst_gateway_queue_wait_seconds_sum") == pytest.approx(0.07)
    assert page.get_sample_value("oasst_gateway_queue_wait_seconds_bucket", {"le": "0.025"}) == 0
    assert page.get_sample_value("oasst_gateway_queue_wait_seconds_bucket", {"le": "0.1"}) == 2


def test_what_all_see_alike_is_not_added(gathered: GatheredMetrics, page: CollectorRegistry) -> None:
    for name in ("a", "b"):
        process = Process(name, gathered)
        process.metrics.waiting_jobs.set(5)
        process.metrics.redis_up.set(name == "a")
        process.metrics.requests_in_flight.labels("Chat").set(2)
        process.tell()
    assert page.get_sample_value("oasst_gateway_queue_waiting_jobs") == 5
    assert page.get_sample_value("oasst_gateway_redis_up") == 0
    assert page.get_sample_value("oasst_gateway_requests_in_flight", {"rpc": "Chat"}) == 4


def test_a_counter_does_not_fall_when_a_process_dies_and_its_gauges_go(
    gathered: GatheredMetrics, page: CollectorRegistry
) -> None:
    for name in ("a", "b", "c"):
        process = Process(name, gathered)
        process.metrics.generated_tokens.inc(2)
        process.metrics.requests_in_flight.labels("Chat").set(1)
        process.tell()
    gathered.depart("a")
    gathered.depart("b")
    assert page.get_sample_value("oasst_gateway_generated_tokens_total") == 6
    assert page.get_sample_value("oasst_gateway_requests_in_flight", {"rpc": "Chat"}) == 1


def test_a_process_that_died_before_it_told_changes_nothing(gathered: GatheredMetrics, page: CollectorRegistry) -> None:
    gathered.depart("never seen")
    assert page.get_sample_value("oasst_gateway_generated_tokens_total") is None


def test_the_gathered_page_is_well_formed(gathered: GatheredMetrics, page: CollectorRegistry) -> None:
    process = Process("a", gathered)
    process.metrics.requests.labels("Chat", "OK").inc()
    process.tell()
    names = [family.name for family in text_string_to_metric_families(generate_latest(page).decode())]
    assert len(names) == len(set(names)) > 20
