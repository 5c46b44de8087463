"""What a PromQL query asks for, and which metrics there are to ask for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml
from oasst_gateway.metrics import FleetMetrics, GatewayMetrics
from oasst_worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry, GCCollector, Metric, PlatformCollector, ProcessCollector

__all__ = ["RULES", "Rule", "declared_metrics", "names_in", "read_rules", "series_of"]

RULES = Path(__file__).parent.parent / "helm" / "oasst-serve" / "files" / "rules.yaml"


@dataclass(frozen=True)
class Rule:
    """A recording or an alerting rule."""

    name: str
    expr: str
    is_alert: bool
    annotations: dict[str, str]


def read_rules(path: Path = RULES) -> list[Rule]:
    groups = yaml.safe_load(path.read_text())["groups"]
    return [
        Rule(
            name=rule.get("alert") or rule["record"],
            expr=rule["expr"],
            is_alert="alert" in rule,
            annotations=rule.get("annotations", {}),
        )
        for group in groups
        for rule in group["rules"]
    ]


def declared_metrics(component: str) -> CollectorRegistry:
    """Every metric of a gateway or a worker, those of its process among them, as before its first request."""
    registry = CollectorRegistry()
    if component == "gateway":
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        GatewayMetrics(registry)
        FleetMetrics(registry)
    else:
        ProcessCollector(registry=registry)
        WorkerMetrics(registry)
    return registry


def series_of(metric: Metric) -> set[str]:
    """The names by which the metric's series are asked for."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(metric.type, ("",))
    return {metric.name + suffix for suffix in suffixes}


def names_in(expr: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each series that the query selects, with the labels it asks for.

    Raises:
        ValueError: if the query is not PromQL.
    """
    yield from _selectors(promql.parse(expr))


def _selectors(node: Any) -> Iterator[tuple[str, dict[str, str]]]:
    # Any: the parser's classes share no type.
    if isinstance(node, promql.VectorSelector):
        yield node.name or "", {matcher.name: matcher.value for matcher in node.matchers.matchers}
    elif isinstance(node, promql.MatrixSelector):
        yield from _selectors(node.vector_selector)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _selectors(argument)
    elif isinstance(node, promql.BinaryExpr):
        yield from _selectors(node.lhs)
        yield from _selectors(node.rhs)
    elif isinstance(node, (promql.AggregateExpr, promql.ParenExpr, promql.SubqueryExpr, promql.UnaryExpr)):
        yield from _selectors(node.expr)
    elif not isinstance(node, (promql.NumberLiteral, promql.StringLiteral)):
        raise TypeError(f"{type(node).__name__} is unknown to this walk")
