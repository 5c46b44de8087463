"""Grafana's dashboards, written from the panels below: `make generated`.

A panel's queries hold `release="$release"`, which the dashboard's variables fill in, the release's namespace with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DASHBOARDS", "FOLDER", "Dashboard", "Panel", "Query", "render", "write_dashboards"]

FOLDER = Path(__file__).parent.parent / "helm" / "oasst-serve" / "files" / "dashboards"

_COLUMNS = 24
_PANEL_WIDTH = 8
_PANEL_HEIGHT = 8


@dataclass(frozen=True)
class Query:
    legend: str  # May hold {{label}}.
    expr: str
    # Whether single requests are shown as well, which lead to their traces.
    has_exemplars: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture of a few queries over time, all of one unit (Grafana's name of it)."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    # What to see in it, and when to worry.
    description: str


@dataclass(frozen=True)
class Dashboard:
    name: str  # Of its file, and for links to it.
    title: str
    panels: tuple[Panel, ...]


def _quantiles(
    metric: str, *, quantiles: tuple[float, ...] = (0.5, 0.9, 0.99), has_exemplars: bool = False
) -> tuple[Query, ...]:
    """How a histogram's values are spread over all processes of the release."""
    rate = f'sum by (le) (rate({metric}_bucket{{release="$release"}}[$__rate_interval]))'
    # Those of the last query are those of all: they have the same buckets.
    return tuple(
        Query(
            f"p{quantile * 100:g}",
            f"histogram_quantile({quantile}, {rate})",
            has_exemplars=has_exemplars and quantile == quantiles[-1],
        )
        for quantile in quantiles
    )


def _rate(metric: str, legend: str, *by: str, **labels: str) -> Query:
    matchers = ",".join(f'{name}=~"{value}"' for name, value in labels.items())
    selector = f'{metric}{{release="$release"{"," if matchers else ""}{matchers}}}'
    grouping = f" by ({', '.join(by)})" if by else ""
    return Query(legend, f"sum{grouping} (rate({selector}[$__rate_interval]))")


def _of_queue(metric: str, legend: str) -> Query:
    """Every gateway tells of the same queue."""
    return Query(legend, f'max ({metric}{{release="$release"}})')


SERVICE = Dashboard(
    "service",
    "oasst-serve / Service",
    (
        Panel(
            "Chats by outcome",
            "reqps",
            (_rate("oasst_gateway_requests_total", "{{code}}", "code", rpc="ChatService/.*"),),
            "INTERNAL, UNKNOWN and UNAVAILABLE burn the error budget; RESOURCE_EXHAUSTED is work refused in time.",
        ),
        Panel(
            "Time to first token",
            "s",
            _quantiles("gen_ai_server_time_to_first_token_seconds", has_exemplars=True),
            "From a request's arrival at the gateway. The objective is 2.5 s for 95 %.",
        ),
        Panel(
            "Between tokens",
            "s",
            _quantiles("oasst_gateway_inter_token_latency_seconds", has_exemplars=True),
            "What a reader feels. Above 0.2 s text comes slower than most people read.",
        ),
        Panel(
            "Error budget burnt",
            "short",
            (
                Query("chats, 1 h", 'oasst:failed_chats:ratio1h{release="$release"} / 0.001'),
                Query("chats, 6 h", 'oasst:failed_chats:ratio6h{release="$release"} / 0.001'),
                Query("first tokens, 1 h", 'oasst:slow_first_tokens:ratio1h{release="$release"} / 0.05'),
                Query("first tokens, 6 h", 'oasst:slow_first_tokens:ratio6h{release="$release"} / 0.05'),
            ),
            "1 spends a month's budget in a month. Pages at 14.4 within an hour, tickets at 6 within six.",
        ),
        Panel(
            "Tokens",
            "short",
            (
                _rate("oasst_gateway_generated_tokens_total", "generated"),
                _rate("oasst_gateway_prompt_tokens_total", "prompts"),
            ),
            "Tokens a second, as handed to callers and as accepted from them.",
        ),
        Panel(
            "Refused",
            "reqps",
            (_rate("oasst_gateway_refused_requests_total", "{{reason}}", "reason"),),
            "By the reason that callers are told. QUEUE_FULL and DEADLINE_UNREACHABLE ask for workers.",
        ),
        Panel(
            "Open requests",
            "short",
            (
                Query(
                    "{{instance}}",
                    'sum by (instance) (oasst_gateway_requests_in_flight{release="$release"})',
                ),
            ),
            "Evenly spread while callers balance; one gateway far above the others means they do not.",
        ),
        Panel(
            "Gateway CPU",
            "percentunit",
            (
                Query(
                    "{{instance}}",
                    "sum by (instance)"
                    ' (rate(process_cpu_seconds_total{release="$release",component="gateway"}[$__rate_interval]))',
                ),
            ),
            "Of one core: a gateway is one process with one event loop.",
        ),
        Panel(
            "Event loop lag",
            "s",
            _quantiles("oasst_gateway_event_loop_lag_seconds", quantiles=(0.5, 0.99)),
            "How late a gateway does anything. Above 0.1 s there are too few gateways.",
        ),
    ),
)

QUEUE = Dashboard(
    "queue",
    "oasst-serve / Queue",
    (
        Panel(
            "Requests",
            "short",
            (
                _of_queue("oasst_gateway_queue_waiting_jobs", "waiting"),
                _of_queue("oasst_gateway_queue_running_jobs", "running"),
                _of_queue("oasst_gateway_queue_dead_jobs", "dead"),
            ),
            "Waiting ones grow while workers are too few. Dead ones killed their workers; see OasstDeadLetters.",
        ),
        Panel(
            "Tokens waiting and running",
            "short",
            (
                _of_queue("oasst_gateway_queue_waiting_tokens", "waiting"),
                Query("both", 'oasst:tokens{release="$release"}'),
            ),
            "Prompts and what was asked for. Workers are scaled by both together.",
        ),
        Panel(
            "Wait for a worker",
            "s",
            _quantiles("oasst_gateway_queue_wait_seconds"),
            "From acceptance to the first claim.",
        ),
        Panel(
            "Set right by sweeps",
            "short",
            (
                Query("{{kind}}", 'sum by (kind) (increase(oasst_queue_swept_total{release="$release"}[5m]))'),
                Query("repaired", 'sum (increase(oasst_worker_reconcile_repairs_total{release="$release"}[5m]))'),
            ),
            "requeued follows a worker's death. poisoned and repaired should stay 0.",
        ),
        Panel(
            "Calls that failed",
            "short",
            (_rate("oasst_worker_queue_errors_total", "{{operation}}", "operation"),),
            "Of workers to the queue. They try again; streams pause meanwhile.",
        ),
        Panel(
            "Worker calls",
            "s",
            (
                *_quantiles("oasst_worker_push_seconds", quantiles=(0.5, 0.99)),
                Query(
                    "claim p99",
                    "histogram_quantile(0.99, sum by (le)"
                    ' (rate(oasst_worker_claim_seconds_bucket{release="$release"}[$__rate_interval])))',
                ),
            ),
            "One push a step for all running chats.",
        ),
        Panel(
            "Redis memory",
            "bytes",
            (
                Query("used", 'redis_memory_used_bytes{release="$release"}'),
                Query("limit", 'redis_memory_max_bytes{release="$release"}'),
            ),
            "At the limit nothing is accepted.",
        ),
        Panel(
            "Redis commands",
            "ops",
            (_rate("redis_commands_processed_total", "commands"),),
            "A few for each chat and one for each step of a worker.",
        ),
        Panel(
            "Redis persistence",
            "short",
            (
                Query("file can be written", 'redis_aof_last_write_status{release="$release"}'),
                Query("slow fsyncs", 'increase(redis_aof_delayed_fsync{release="$release"}[5m])'),
                Query("replicas", 'redis_connected_slaves{release="$release"}'),
            ),
            "While the file cannot be written nothing is accepted.",
        ),
    ),
)

WORKERS = Dashboard(
    "workers",
    "oasst-serve / Workers",
    (
        Panel(
            "Generated tokens",
            "short",
            (_rate("oasst_worker_generated_tokens_total", "{{instance}}", "instance"),),
            "A second, by worker.",
        ),
        Panel(
            "Step time",
            "s",
            _quantiles("oasst_worker_step_seconds"),
            "The time between two tokens of every chat in the batch, but for the queue's part.",
        ),
        Panel(
            "Sequences",
            "short",
            (
                Query("running", 'sum (oasst_worker_running_sequences{release="$release"})'),
                Query("waiting in the engine", 'sum (oasst_worker_waiting_sequences{release="$release"})'),
                Query("room", 'sum (oasst_worker_max_sequences{release="$release"})'),
            ),
            "Waiting ones were preempted, or belong to a chat of several choices.",
        ),
        Panel(
            "KV cache",
            "percentunit",
            (
                Query(
                    "{{instance}}",
                    'oasst_worker_kv_tokens_used{release="$release"}'
                    ' / oasst_worker_kv_tokens_capacity{release="$release"}',
                ),
            ),
            "Near 1 sequences are preempted and computed anew.",
        ),
        Panel(
            "Prefill and decode",
            "short",
            (
                _rate("oasst_worker_prefill_tokens_total", "prefill"),
                _rate("oasst_worker_decode_tokens_total", "decode"),
            ),
            "Tokens computed a second.",
        ),
        Panel(
            "Batch",
            "short",
            (
                Query(
                    "mean",
                    'sum (rate(oasst_worker_batch_size_sum{release="$release"}[$__rate_interval]))'
                    ' / sum (rate(oasst_worker_batch_size_count{release="$release"}[$__rate_interval]))',
                ),
            ),
            "Sequences in a step. A decode step costs nearly the same for many as for one.",
        ),
        Panel(
            "Jobs that left",
            "reqps",
            (_rate("oasst_worker_jobs_total", "{{outcome}}", "outcome"),),
            "fenced ones went on elsewhere.",
        ),
        Panel(
            "Claimed",
            "reqps",
            (
                _rate("oasst_worker_claimed_jobs_total", "claimed"),
                _rate("oasst_worker_resumed_jobs_total", "resumed after another worker"),
                _rate("oasst_worker_preemptions_total", "sequences preempted"),
            ),
            "Resumed ones follow a worker's death, or its leaving.",
        ),
        Panel(
            "Prompt tokens used again",
            "percentunit",
            (
                Query(
                    "share",
                    'sum (rate(oasst_worker_prefix_hit_tokens_total{release="$release"}[$__rate_interval]))'
                    ' / sum (rate(oasst_worker_prefix_lookup_tokens_total{release="$release"}[$__rate_interval]))',
                ),
            ),
            "Of those that were in the KV cache already: turns of a conversation, texts that prompts begin with.",
        ),
        Panel(
            "Memory",
            "bytes",
            (
                Query(
                    "{{component}} {{instance}}",
                    'sum by (component, instance) (process_resident_memory_bytes{release="$release"})',
                ),
            ),
            "Resident, on the host's side. A worker on a CPU grows until every block of its KV cache (--kv-tokens) was"
            " used once; growth behind that is a leak.",
        ),
    ),
)

DASHBOARDS = (SERVICE, QUEUE, WORKERS)


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": f"oasst-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["oasst-serve"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), *_release_variables()]},
        "panels": [_render_panel(panel, number) for number, panel in enumerate(dashboard.panels)],
    }


def write_dashboards() -> None:
    """The chart's dashboard files are as the panels say."""
    FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        text = json.dumps(render(dashboard), indent=2) + "\n"
        (FOLDER / f"{dashboard.name}.json").write_text(text)


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _release_variables() -> list[dict[str, Any]]:
    """Releases of two namespaces may have one name. Where no series has a namespace, as with Compose, it is empty."""
    return [
        _label_variable("namespace", "oasst_gateway_redis_up"),
        _label_variable("release", 'oasst_gateway_redis_up{namespace="$namespace"}'),
    ]


def _label_variable(label: str, series: str) -> dict[str, Any]:
    query = f"label_values({series}, {label})"
    return {
        "name": label,
        "type": "query",
        "label": label.capitalize(),
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": label},
        "definition": query,
        "refresh": 2,
    }


def _render_panel(panel: Panel, number: int) -> dict[str, Any]:
    per_row = _COLUMNS // _PANEL_WIDTH
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {
            "x": number % per_row * _PANEL_WIDTH,
            "y": number // per_row * _PANEL_HEIGHT,
            "w": _PANEL_WIDTH,
            "h": _PANEL_HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": _in_namespace(query.expr), "legendFormat": query.legend}
            | ({"exemplar": True} if query.has_exemplars else {})
            for index, query in enumerate(panel.queries)
        ],
    }


def _in_namespace(expr: str) -> str:
    return expr.replace('release="$release"', 'namespace="$namespace",release="$release"')
