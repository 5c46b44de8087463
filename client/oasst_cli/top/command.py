"""`oasst top`: the service on one screen."""

import dataclasses
import time
from collections import deque
from typing import Annotated

import typer
from oasst_client import (
    Client,
    DeadlineExceededError,
    Load,
    OverloadedError,
    RequestCancelledError,
    RetryPolicy,
    UnavailableError,
    connect,
)
from rich.console import Console
from rich.live import Live
from rich.text import Text

from oasst_cli.options import Address, AsJson, ModelName, ProfileName, chosen_profile, finite, json_line
from oasst_cli.top.scrape import Samples, added_up, gained, quantile_of, scrape
from oasst_cli.top.screen import Look, draw

__all__ = ["top"]

_NUM_SPARKS = 30
# Histogram of the gateways -> its title.
_LATENCIES = {
    "oasst_gateway_queue_wait_seconds": "queue wait",
    "gen_ai_server_time_to_first_token_seconds": "time to first token",
    "oasst_gateway_inter_token_latency_seconds": "inter-token latency",
}
_GENERATED = "oasst_gateway_generated_tokens_total"
_LOOKED_UP = "oasst_worker_prefix_lookup_tokens_total"
_HIT = "oasst_worker_prefix_hit_tokens_total"
_REQUESTS_BY_TENANT = "oasst_gateway_tenant_requests_total"
_PROMPT_BY_TENANT = "oasst_gateway_tenant_prompt_tokens_total"
# What a service says that is away, slow, stopping or full.
_MAY_PASS = (UnavailableError, DeadlineExceededError, RequestCancelledError, OverloadedError)


def top(
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A gateway's or worker's metrics address, for latencies, prefix hits and tenants. Repeatable.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, callback=finite, metavar="SECONDS", help="Between two refreshes.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Prints one screen and exits.")] = False,
    model: ModelName = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Watch the service. Ctrl-C exits.

    Queue and waits, workers, tokens per second and KV cache come from the gateway itself; --metrics adds what only
    Prometheus gets. Without a terminal, and with --json, each refresh is printed after the last.
    """
    reached = chosen_profile(address, profile)
    console = Console(highlight=False)
    with connect(reached, retry=RetryPolicy(max_attempts=1)) as client:
        watch = _Watch(client, reached.address, model or "", metrics or [])
        try:
            if as_json or once or not console.is_terminal:
                _print_looks(console, watch, interval, is_once=once, as_json=as_json)
            else:
                _show_looks(console, watch, interval)
        except KeyboardInterrupt:
            raise typer.Exit from None


class _Watch:
    """Takes looks; owns what must be remembered from one to the next."""

    def __init__(self, client: Client, address: str, model: str, metrics: list[str]) -> None:
        self._client = client
        self._address = address
        self._model = model
        self._metrics = metrics
        self._tokens_per_s: deque[float] = deque(maxlen=_NUM_SPARKS)
        self._samples = scrape(metrics)
        self._looked_s = time.monotonic()

    def look(self) -> Look:
        """What is known now; rates and latencies are of the time since the last look."""
        load = self._client.load(self._model)
        now = scrape(self._metrics)
        looked_s = time.monotonic()
        new, elapsed_s = gained(self._samples, now), max(looked_s - self._looked_s, 1e-6)
        self._samples, self._looked_s = now, looked_s
        self._tokens_per_s.append(_tokens_per_s(load, new, elapsed_s))
        told = added_up(now.values())
        return Look(
            title=f"{self._address}   {time.strftime('%H:%M:%S')}",
            load=load,
            tokens_per_s=tuple(self._tokens_per_s),
            latencies_s={
                title: (quantile_of(new.buckets.get(name, {}), 0.5), quantile_of(new.buckets.get(name, {}), 0.95))
                for name, title in _LATENCIES.items()
                if name in told.buckets
            },
            prefix_hits=_prefix_hits(told),
            tenants=_tenants(new, elapsed_s),
            missing=[address for address in self._metrics if address not in now],
        )


def _tokens_per_s(load: Load, new: Samples, elapsed_s: float) -> float:
    """As the gateways counted them; without their metrics, as the workers tell of the last seconds."""
    if _GENERATED in new.values:
        return new.values[_GENERATED] / elapsed_s
    return sum(worker.tokens_per_second for worker in load.workers)


def _prefix_hits(told: Samples) -> float | None:
    """Of all prompt tokens since the workers started; None where no worker tells, or none had a prompt."""
    looked_up = told.values.get(_LOOKED_UP)
    return told.values.get(_HIT, 0.0) / looked_up if looked_up else None


def _tenants(new: Samples, elapsed_s: float) -> dict[str, tuple[float, float]]:
    prompt_tokens = new.by_tenant.get(_PROMPT_BY_TENANT, {})
    return {
        tenant: (requests / elapsed_s, prompt_tokens.get(tenant, 0.0) / elapsed_s)
        for tenant, requests in new.by_tenant.get(_REQUESTS_BY_TENANT, {}).items()
    }


def _print_looks(console: Console, watch: _Watch, interval_s: float, *, is_once: bool, as_json: bool) -> None:
    while True:
        look = watch.look()
        if as_json:
            print(json_line(dataclasses.asdict(look)), flush=True)
        else:
            console.print(draw(look))
        if is_once:
            return
        time.sleep(interval_s)


def _show_looks(console: Console, watch: _Watch, interval_s: float) -> None:
    """On the whole terminal, until interrupted. A service that does not answer is told, and asked again."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                live.update(draw(watch.look()), refresh=True)
            except _MAY_PASS as error:
                live.update(Text(f"{error}\nretrying every {interval_s:g} s", style="red"), refresh=True)
            time.sleep(interval_s)
