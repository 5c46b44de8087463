"""The live screen: what it makes of metrics, and what it shows."""

import io
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import grpc
import pytest
from oasst_cli.__main__ import app
from oasst_cli.top.scrape import Samples, added_up, gained, quantile_of, scrape
from oasst_cli.top.screen import Look, draw
from oasst_client import Load, WorkerLoad
from oasst_client.testing import FakeServer
from prometheus_client import CollectorRegistry, Counter, Histogram, MetricsHandler
from rich.console import Console
from typer.testing import CliRunner


class Process:
    """A process that tells metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.tokens = Counter("oasst_gateway_generated_tokens", "", registry=self.registry)
        self.tenants = Counter("oasst_gateway_tenant_requests", "", ["tenant"], registry=self.registry)
        self.waits = Histogram("oasst_gateway_queue_wait_seconds", "", registry=self.registry, buckets=(1, 2, 4))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), MetricsHandler.factory(self.registry))
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def processes() -> Iterator[tuple[Process, Process]]:
    both = (Process(), Process())
    yield both
    for process in both:
        process.close()


TOKENS = "oasst_gateway_generated_tokens_total"
WAITS = "oasst_gateway_queue_wait_seconds"


def test_metrics_of_all_processes_are_added_up_and_what_happened_in_between_is_told(processes):
    addresses = [process.address for process in processes]
    processes[0].tokens.inc(100)
    processes[0].waits.observe(3)
    before = scrape(addresses)
    processes[0].tokens.inc(10)
    processes[1].tokens.inc(20)
    for wait_s in (0.5, 0.5, 1.5, 9):
        processes[1].waits.observe(wait_s)
    processes[1].tenants.labels("acme").inc(3)
    now = scrape(addresses)
    new = gained(before, now)
    assert (new.values[TOKENS], added_up(now.values()).values[TOKENS]) == (30, 130)
    assert quantile_of(new.buckets[WAITS], 0.5) == 1
    assert quantile_of(new.buckets[WAITS], 0.75) == 2
    # Beyond the last bound nothing is known but the bound.
    assert quantile_of(new.buckets[WAITS], 1.0) == 4
    assert quantile_of(gained(now, now).buckets[WAITS], 0.5) is None
    assert new.by_tenant["oasst_gateway_tenant_requests_total"] == {"acme": 3}


def test_what_was_counted_while_nobody_could_look_is_no_gain_of_the_next_look():
    missed, seen = {"a": Samples({TOKENS: 5.0})}, {"a": Samples({TOKENS: 6.0}), "b": Samples({TOKENS: 1000.0})}
    assert gained(missed, seen).values == {TOKENS: 1.0}
    assert gained({}, seen).values == {}


def test_a_process_that_started_again_takes_nothing_from_what_others_counted():
    before = {"a": Samples({TOKENS: 900.0}), "b": Samples({TOKENS: 5.0})}
    now = {"a": Samples({TOKENS: 10.0}), "b": Samples({TOKENS: 9.0})}
    assert gained(before, now).values == {TOKENS: 4.0}


def test_what_tells_no_metrics_is_left_out(server):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>{\xff</html>")

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
        # Nobody, a gRPC port, a page, and an address that is none.
        assert scrape(["127.0.0.1:1", server.address, f"127.0.0.1:{page.server_port}", "here:now"]) == {}
        page.shutdown()


def test_metrics_are_read_past_a_proxy(processes, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    urllib.request.install_opener(None)  # One that was used before has looked at the environment already.
    assert scrape([processes[0].address])


def shown(look: Look) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(draw(look))
    return console.file.getvalue()


def test_the_screen_shows_queue_workers_latencies_and_tenants():
    worker = WorkerLoad("w-1", 3, 4, 900, 1000, tokens_per_second=42.0, age_s=9.0)
    screen = shown(
        Look(
            title="here",
            load=Load(7, 1234, 3, (worker,), estimated_wait_s=1.5),
            tokens_per_s=(10.0, 42.0),
            latencies_s={"queue wait": (0.25, None)},
            prefix_hits=0.75,
            tenants={"small": (1.0, 5.0), "large": (2.0, 50.0)},
            missing=("10.0.0.1:9464",),
        )
    )
    for text in ("7 requests", "1234 tokens", "next waits 1.5 s", "3/4", "90.0%", "9.0 s ago", "250 ms", "75%"):
        assert text in screen
    assert screen.index("large") < screen.index("small")
    assert "10.0.0.1:9464 serves no metrics" in screen


def test_a_service_without_workers_is_told_loudly():
    assert "no worker is alive" in shown(Look("here", Load(1, 10, 0, (), None), (0.0,)))


def test_one_look_is_taken_with_metrics_and_printed(processes):
    processes[0].waits.observe(0.5)
    with FakeServer() as server:
        arguments = ["top", "--once", "--json", "--address", server.address, "--metrics", processes[0].address]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    look = json.loads(result.stdout)
    assert look["load"]["workers"][0]["worker_id"] == "fake-worker"
    assert "queue wait" in look["latencies_s"]


def test_a_gateway_is_named_that_tells_no_metrics_where_they_were_looked_for(server):
    arguments = ["top", "--once", "--json", "--address", server.address, "--metrics", server.address]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["missing"] == [server.address]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_the_screen_outlives_a_service_that_does_not_answer(server, monkeypatch, code):
    looks: list[object] = []

    def fail_once(context: grpc.ServicerContext) -> None:
        looks.append(context)
        if len(looks) == 1:
            context.abort(code, "not now")

    def wait(_: float) -> None:
        if len(looks) == 2:
            raise KeyboardInterrupt

    server.on_load = fail_once
    monkeypatch.setattr("oasst_cli.top.command.time", SimpleNamespace(**{**vars(time), "sleep": wait}))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    result = CliRunner().invoke(app, ["top", "--address", server.address])
    assert result.exit_code == 0, result.output
    assert "not now" in result.output
    assert "0/4" in result.output
