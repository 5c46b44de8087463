"""docs/operations/metrics.md, written from the metrics that gateway and worker declare: `make generated`."""

from collections.abc import Iterable
from pathlib import Path

from oasst_gateway.metrics import FleetMetrics, GatewayMetrics
from oasst_worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

__all__ = ["PAGE", "render_page", "write_page"]

PAGE = Path(__file__).parent.parent / "docs" / "operations" / "metrics.md"

_HEAD = """\
# Metrics

Written by `make generated` from the code; a test compares. Gateway and worker serve them at `/metrics` of
`--metrics-listen`. All values are in base units. No label holds anything that a caller chose, so there are at most a
few hundred series for each process.

Where they are scraped, every series gets `release` and `component`, which rules and dashboards tell apart by: the
chart's PodMonitors and `docker/prometheus.yaml` show how. Gauges of the queue are told by every gateway and are the
same for all: take their `max`. Everything else adds up over processes. A gateway of several processes (`--processes`)
has added them up already: its one page is at most a second old, and its counters do not fall when a process dies
([decisions/0055](../decisions/0055-the-parent-gathers-its-processes-metrics.md)).

Names that begin with `gen_ai_` are those of OpenTelemetry's conventions for generative AI, in the form that
OpenTelemetry gives them in Prometheus. Each process also has Prometheus's own `process_` metrics, the gateway
`python_` ones as well.
"""


def render_page() -> str:
    gateway, fleet, worker = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    tables: list[tuple[str, GatewayMetrics | FleetMetrics | WorkerMetrics]] = [
        ("Gateway", GatewayMetrics(gateway)),
        ("Gateway of several processes", FleetMetrics(fleet)),
        ("Worker", WorkerMetrics(worker)),
    ]
    return _HEAD + "".join(f"\n## {title}\n\n{_table(_declared(metrics))}" for title, metrics in tables)


def write_page() -> None:
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render_page())


def _declared(metrics: GatewayMetrics | FleetMetrics | WorkerMetrics) -> list[MetricWrapperBase]:
    """In the order of their declaration."""
    return [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]


def _table(metrics: Iterable[MetricWrapperBase]) -> str:
    rows = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        [family] = metric.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        # There is no public way to ask for them before a child exists.
        labels = metric._labelnames
        cells = (f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
