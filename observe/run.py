"""A real Prometheus scrapes a real run: do rules evaluate, does every panel show something, what does scraping cost?"""

import asyncio
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.checkpoints import DEMO
from bench.services import running_stack
from observe.dashboards import DASHBOARDS, Panel
from observe.load import call_for
from observe.pictures import Answers, draw
from observe.prometheus import Prometheus, Target, free_port, running, running_prometheus
from observe.queries import RULES

__all__ = ["observe_run"]

PICTURES = Path(__file__).parent.parent / "docs" / "operations" / "pictures"

RELEASE = "oasst"
CALLERS = 12
LOAD_S = 90.0
# Into the load a worker is killed: the pictures show that its chats go on elsewhere.
KILL_AFTER_S = 45.0
RATE_INTERVAL = "15s"
STEP_S = 1.0

# Of the calls, at most.
MOST_BROKEN = 0.1
BROKEN = ("INTERNAL", "UNAVAILABLE")
EXPORTER_TIMEOUT_S = 30.0

# Panels that show nothing while all goes well.
QUIET_PANELS = {"Calls that failed"}


def observe_run() -> None:
    """Prints what was found, and leaves the dashboards' pictures under docs/.

    Raises:
        SystemExit: if a rule does not evaluate, a panel stays empty, metrics are malformed or too many calls break.
    """
    console = Console(width=120)
    with ExitStack() as stack:
        service = stack.enter_context(running_stack(DEMO, "--workers", "2", "--gateways", "2"))
        targets = [Target(each["metrics"], each["role"]) for each in service["processes"] if each["metrics"]]
        exporter = Target(stack.enter_context(_running_exporter(service["redis_url"])), "valkey")
        prometheus = stack.enter_context(running_prometheus([*targets, exporter], rules=RULES, release=RELEASE))
        start_s = time.time()
        ends = asyncio.run(_load(service))
        span = (start_s, time.time())
        faults = [
            *_faults_of_calls(ends, console),
            *_faults_of_rules(prometheus, console),
            *_faults_of_dashboards(prometheus, console, span),
            *(fault for target in targets for fault in _faults_of_metrics(target)),
        ]
        console.print(_scrape_table(prometheus, span))
    for fault in faults:
        console.print(f"FAULT {fault}", style="red")
    if faults:
        sys.exit(1)


async def _load(service: dict[str, Any]) -> Counter[str]:
    """Callers call, and a worker dies; how many calls ended how."""
    worker = next(each for each in service["processes"] if each["role"] == "worker")
    async with asyncio.TaskGroup() as tasks:
        calls = tasks.create_task(call_for(service["addresses"], LOAD_S, callers=CALLERS))
        tasks.create_task(_kill_after(KILL_AFTER_S, worker["pid"]))
    return calls.result()


async def _kill_after(seconds: float, pid: int) -> None:
    await asyncio.sleep(seconds)
    os.kill(pid, signal.SIGKILL)


def _scrape(target: Target) -> bytes:
    with urllib.request.urlopen(f"http://{target.address}/metrics", timeout=10) as response:
        return bytes(response.read())


def _faults_of_calls(ends: Counter[str], console: Console) -> Iterator[str]:
    told = ", ".join(f"{number} {code}" for code, number in ends.most_common())
    console.print(f"{ends.total()} calls ended: {told}")
    num_broken = sum(ends[code] for code in BROKEN)
    if num_broken > MOST_BROKEN * ends.total():
        yield f"{num_broken} of {ends.total()} calls broke"


def _faults_of_rules(prometheus: Prometheus, console: Console) -> Iterator[str]:
    rules = prometheus.rules()
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    console.print(f"{len(rules)} rules evaluated; firing: {', '.join(firing) or 'none'}")
    for rule in rules:
        if rule["health"] != "ok":
            yield f"rule {rule['name']}: {rule.get('lastError') or rule['health']}"


def _faults_of_dashboards(prometheus: Prometheus, console: Console, span: tuple[float, float]) -> Iterator[str]:
    for dashboard in DASHBOARDS:
        answers = {panel.title: _answer(prometheus, panel, span) for panel in dashboard.panels}
        num_queries = sum(len(panel.queries) for panel in dashboard.panels)
        console.print(f"{dashboard.title}: {len(dashboard.panels)} panels, {num_queries} queries answered")
        for title, lines in answers.items():
            if not lines and title not in QUIET_PANELS:
                yield f"{dashboard.title}: the panel {title!r} is empty"
        draw(dashboard, answers, start_s=span[0], path=PICTURES / f"{dashboard.name}.png")


def _answer(prometheus: Prometheus, panel: Panel, span: tuple[float, float]) -> Answers:
    answers = []
    for query in panel.queries:
        expr = query.expr.replace("$release", RELEASE).replace("$__rate_interval", RATE_INTERVAL)
        for series in prometheus.query_range(expr, start_s=span[0], end_s=span[1], step_s=STEP_S):
            answers.append((_fill(query.legend, series.labels), series))
    return answers


def _fill(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels[match[1]], legend)


def _faults_of_metrics(target: Target) -> Iterator[str]:
    checked = subprocess.run(["promtool", "check", "metrics"], input=_scrape(target), capture_output=True)  # noqa: S607
    for line in checked.stderr.decode().splitlines() if checked.returncode else ():
        yield f"metrics of the {target.component}: {line}"


def _scrape_table(prometheus: Prometheus, span: tuple[float, float]) -> Table:
    """What Prometheus itself waited for each page, once a second."""
    table = Table(title="Scrapes under load")
    for heading in ("component", "samples", "scrapes", "p50", "p99"):
        table.add_column(heading, justify="right")
    samples = {
        labels["component"]: value for labels, value in prometheus.query("max by (component) (scrape_samples_scraped)")
    }
    taken_s: dict[str, list[float]] = {}
    answered = "scrape_duration_seconds and up == 1"
    for series in prometheus.query_range(answered, start_s=span[0], end_s=span[1], step_s=STEP_S):
        taken_s.setdefault(series.labels["component"], []).extend(series.values)
    for component, values in taken_s.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        row = (f"{samples[component]:.0f}", str(len(values)), f"{p50 * 1e3:.1f} ms", f"{p99 * 1e3:.1f} ms")
        table.add_row(component, *row)
    return table


@contextmanager
def _running_exporter(redis_url: str) -> Iterator[str]:
    """redis_exporter watches this server and answers; the address it is scraped at.

    Raises:
        RuntimeError: if it is not installed, or does not answer.
    """
    name = shutil.which("prometheus-redis-exporter") or shutil.which("redis_exporter")
    if name is None:
        raise RuntimeError("there is no redis_exporter: apt-get install prometheus-redis-exporter")
    address = f"127.0.0.1:{free_port()}"
    with running([name, "-redis.addr", redis_url, "-web.listen-address", address]) as process:
        _await_metrics(Target(address, "valkey"), process)
        yield address


def _await_metrics(target: Target, process: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + EXPORTER_TIMEOUT_S
    while True:
        try:
            _scrape(target)
        except OSError as error:
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError("redis_exporter does not answer") from error
            time.sleep(0.1)
        else:
            return
