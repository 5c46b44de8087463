"""Every metric of the gateway, declared once, in base units. No label holds anything a caller chose."""

import time
from collections.abc import Callable
from dataclasses import asdict, fields

from oasst.v1 import chat_pb2
from oasst_jobs import QueueLoad, SweepReport
from oasst_telemetry import NO_SPAN, Span
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from oasst_gateway.spans import describe_end

__all__ = ["ChatMeter", "FleetMetrics", "GatewayMetrics"]

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_REQUEST_SECONDS = (0.005, 0.025, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class GatewayMetrics:
    """The gateway's metrics in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"oasst_gateway_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"oasst_gateway_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"oasst_gateway_{name}", text, labels, buckets=buckets, registry=registry)

        def gen_ai_histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            """One that OpenTelemetry's conventions for generative AI name, with the label that they require."""
            labels = ["gen_ai_operation_name"]
            metric = Histogram(f"gen_ai_server_{name}", text, labels, buckets=buckets, registry=registry)
            return metric.labels("chat")

        self.requests = counter("requests_total", "RPCs that ended, by their gRPC code.", "rpc", "code")
        self.requests_in_flight = gauge("requests_in_flight", "RPCs that are open.", "rpc")
        self.request_seconds = histogram(
            "request_duration_seconds", "From an RPC's first byte to its status.", _REQUEST_SECONDS, "rpc"
        )
        self.invalid_requests = counter("invalid_requests_total", "Requests refused as invalid, by reason.", "reason")
        self.refused_requests = counter(
            "refused_requests_total", "RPCs that ended with an error, by the reason their caller was told.", "reason"
        )

        self.time_to_first_token_seconds = gen_ai_histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_SECONDS
        )
        self.inter_token_seconds = histogram(
            "inter_token_latency_seconds", "Between two tokens, or bunches of tokens, of a request.", _TOKEN_SECONDS
        )
        self.time_per_output_token_seconds = gen_ai_histogram(
            "time_per_output_token_seconds", "Mean time per token after the first, by request.", _TOKEN_SECONDS
        )
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "From a request's acceptance to a worker's claim.", _REQUEST_SECONDS
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of accepted requests.")
        self.generated_tokens = counter("generated_tokens_total", "Generated tokens handed to callers.")
        self.scored_items = counter("scored_items_total", "Items whose scores were handed to callers.")
        self.tenant_requests = counter("tenant_requests_total", "Accepted requests, by tenant.", "tenant")
        self.tenant_prompt_tokens = counter(
            "tenant_prompt_tokens_total", "Prompt tokens of accepted requests, by tenant.", "tenant"
        )

        # The same name wherever it is counted: any process may have swept.
        self.swept = Counter(
            "oasst_queue_swept_total", "Jobs that sweeps set right, by what was done.", ["kind"], registry=registry
        )
        for kind in fields(SweepReport):
            self.swept.labels(kind.name)  # Shown as 0 from the start, so that the first one is an increase.
        self.redis_up = gauge("redis_up", "1 while the queue answers.")
        self.waiting_jobs = gauge("queue_waiting_jobs", "Requests that wait for a worker, over all gateways.")
        self.waiting_tokens = gauge("queue_waiting_tokens", "Tokens that those requests ask for, prompts included.")
        self.waiting_scoring_jobs = gauge(
            "queue_waiting_scoring_jobs", "Requests to score that wait for a worker, over all gateways."
        )
        self.waiting_scoring_tokens = gauge(
            "queue_waiting_scoring_tokens", "Tokens of the items of those requests, over all gateways."
        )
        self.running_jobs = gauge("queue_running_jobs", "Requests that workers run, over all gateways.")
        self.dead_jobs = gauge(
            "queue_dead_jobs", "Requests set aside because workers died with them, over all gateways."
        )
        self.workers = gauge("workers", "Workers of the model that told of themselves lately.")
        self.event_loop_lag_seconds = histogram(
            "event_loop_lag_seconds", "How late the event loop wakes a sleeper.", _LAG_SECONDS
        )
        self.loop_failures = counter(
            "loop_failures_total", "Errors that nobody foresaw in the gateway's own loops, which go on.", "loop"
        )

    def record_sweep(self, report: SweepReport) -> None:
        """Adds what a sweep of this process set right in the queue."""
        for kind, number in asdict(report).items():
            self.swept.labels(kind).inc(number)

    def record_load(self, load: QueueLoad) -> None:
        """The queue's gauges show `load`."""
        self.waiting_jobs.set(load.waiting_jobs)
        self.waiting_tokens.set(load.waiting_tokens)
        self.waiting_scoring_jobs.set(load.waiting_scoring_jobs)
        self.waiting_scoring_tokens.set(load.waiting_scoring_tokens)
        self.running_jobs.set(load.running_jobs)
        self.dead_jobs.set(load.dead_jobs)
        self.workers.set(len(load.workers))


class FleetMetrics:
    """What the parent of several gateway processes counts itself, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.processes = Gauge(
            "oasst_gateway_processes", "Ready processes behind the port, with `--processes`.", registry=registry
        )
        self.restarts = Counter(
            "oasst_gateway_process_restarts_total", "Processes that died and were replaced.", registry=registry
        )
        self.look_failures = Counter(
            "oasst_gateway_process_look_failures_total",
            "Errors that nobody foresaw in looking after the processes, which goes on.",
            registry=registry,
        )


class ChatMeter:
    """Measures one chat from its request's arrival."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        span: Span = NO_SPAN,
        *,
        is_first: bool = True,
        started_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`is_first` is false for whoever comes later to a chat: how long its first token took says nothing.

        `started_s` is when the request came, by the clock; None for now.
        """
        self._metrics = metrics
        self._span = span
        self._is_first = is_first
        # Buckets of latencies name the last trace that fell into them, where OpenMetrics is asked for.
        self._exemplar = {"trace_id": span.context.trace_id} if span.context.is_sampled else None
        self._clock = clock
        self._started_s = clock() if started_s is None else started_s
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._num_tokens = 0

    def elapsed_s(self) -> float:
        """Since the request's arrival."""
        return self._clock() - self._started_s

    def saw_tokens(self, num_tokens: int) -> None:
        """The caller is sent so many tokens now."""
        if not num_tokens:
            return
        now_s = self._clock()
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._span.mark("first token")
            if self._is_first:
                self._metrics.time_to_first_token_seconds.observe(now_s - self._started_s, self._exemplar)
        else:
            self._metrics.inter_token_seconds.observe(now_s - self._last_token_s, self._exemplar)
        self._last_token_s = now_s
        self._num_tokens += num_tokens
        self._metrics.generated_tokens.inc(num_tokens)

    def saw_finished(self, finished: chat_pb2.Finished) -> None:
        """The chat has run to its end."""
        if self._span.is_recorded:
            self._span.note(describe_end(finished))
        if not self._is_first:
            return
        self._metrics.queue_wait_seconds.observe(finished.timings.queue.ToNanoseconds() / 1e9, self._exemplar)
        if self._first_token_s is not None and self._num_tokens > 1:
            per_token_s = (self._clock() - self._first_token_s) / (self._num_tokens - 1)
            self._metrics.time_per_output_token_seconds.observe(per_token_s, self._exemplar)
