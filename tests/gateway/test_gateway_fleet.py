"""`--processes`: several gateways behind one port, as their callers, their orchestrator and Prometheus see them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from gateway_harness import RuleWorker, ask, read_text, rule_text
from metric_page import total_of
from oasst.v1 import chat_pb2_grpc
from oasst_client import AsyncClient
from oasst_gateway.tenants import draw_api_key
from serving_line import read_serving_line
from waiting import until

NUM_PROCESSES = 2


@dataclass(frozen=True)
class Fleet:
    parent: subprocess.Popen[str]
    listen: str
    metrics: str
    log: Path

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.parent.pid).children()

    def connections(self, child: psutil.Process) -> int:
        """How many of its callers' connections the child holds."""
        port = int(self.listen.rpartition(":")[2])
        return sum(each.laddr.port == port and each.status == "ESTABLISHED" for each in child.net_connections("tcp"))

    def value(self, name: str) -> float:
        """The sum of a metric's series on the parent's page."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as page:
            return total_of(page.read().decode(), name)

    async def told(self, name: str, value: float) -> None:
        """Returns once the page says so; it is a second old at most."""

        async def is_told() -> bool:
            return await asyncio.to_thread(self.value, name) == value

        await until(is_told, timeout_s=60)  # Another process may have to start first.


# As `python -m oasst_gateway --processes`, with less patience.
HASTY = """
import asyncio, sys
from oasst_gateway.fleet import run_fleet
from oasst_gateway.settings import read_settings
sys.exit(asyncio.run(run_fleet(read_settings(sys.argv[1:]), sys.argv[1:], max_silent_looks=2)))
"""

# The same, whose parent stumbles over the first page of each process.
CLUMSY = (
    """
from oasst_gateway.gathered import GatheredMetrics
record, stumbled = GatheredMetrics.record, set()
def stumble_once(gathered, process, page):
    if process not in stumbled:
        stumbled.add(process)
        raise ValueError("a defect")
    record(gathered, process, page)
GatheredMetrics.record = stumble_once
"""
    + HASTY
)


@pytest.fixture
def start_fleet(checkpoint: Path, valkey_url: str, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Starts a fleet with further options; stopped at the end of the test."""
    with ExitStack() as exits:

        def start(*further: str, program: Sequence[str] = ("-m", "oasst_gateway")) -> Fleet:
            options = {
                "--model": str(checkpoint),
                "--model-name": "tiny",
                "--redis-url": valkey_url,
                "--listen": "127.0.0.1:0",
                "--metrics-listen": "127.0.0.1:0",
                "--processes": str(NUM_PROCESSES),
            }
            command = [sys.executable, *program, *(word for option in options.items() for word in option), *further]
            log = tmp_path / "log"
            errors = exits.enter_context(log.open("wb"))
            parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)
            exits.callback(_end, parent)
            serving = read_serving_line(parent, log)
            return Fleet(parent, serving["listen"], serving["metrics"], log)

        yield start


def _end(parent: subprocess.Popen[str]) -> None:
    children = psutil.Process(parent.pid).children() if parent.poll() is None else []
    parent.kill()
    parent.communicate()
    for child in children:
        child.kill()


@pytest.fixture
def fleet(start_fleet: Callable[..., Fleet]) -> Fleet:
    return start_fleet()


@pytest.fixture
async def channels(fleet: Fleet) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Connections of sixteen callers; that all reach one of two processes happens once in 32768 runs."""
    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(fleet.listen, options=options)) for _ in range(16)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        yield channels


async def test_streams_spread_over_the_processes_their_page_adds_up_and_all_drain(
    fleet: Fleet, channels: list[grpc.aio.Channel], worker: RuleWorker
) -> None:
    assert min(fleet.connections(child) for child in fleet.children()) > 0
    worker.hold()
    texts = [
        asyncio.create_task(read_text(chat_pb2_grpc.ChatServiceStub(channel).ChatStream(ask("Hello!"))))
        for channel in channels
    ]
    await until(lambda: len(worker.claimed) == len(channels))
    await fleet.told("oasst_gateway_requests_in_flight", len(channels))
    await fleet.told("oasst_gateway_processes", NUM_PROCESSES)
    fleet.parent.send_signal(signal.SIGTERM)
    worker.free()
    assert await asyncio.gather(*texts) == [rule_text(4)] * len(channels)
    assert await asyncio.to_thread(fleet.parent.wait, 20) == 0


async def test_a_killed_process_is_replaced_and_its_streams_go_on(fleet: Fleet, worker: RuleWorker) -> None:
    async with AsyncClient(fleet.listen) as client:
        assert (await client.chat("Hello!", max_new_tokens=4)).text == rule_text(4)
        await fleet.told("oasst_gateway_tenant_requests_total", 1)
        worker.hold()
        answer = asyncio.create_task(client.chat("Hello!", max_new_tokens=4))
        await until(lambda: len(worker.claimed) == 2)
        worker.allow(1)
        [serving] = [child for child in fleet.children() if fleet.connections(child)]
        serving.kill()
        worker.free()
        assert (await answer).text == rule_text(4)
    await fleet.told("oasst_gateway_process_restarts_total", 1)
    await fleet.told("oasst_gateway_processes", NUM_PROCESSES)
    assert serving.pid not in [child.pid for child in fleet.children()]
    assert await asyncio.to_thread(fleet.value, "oasst_gateway_tenant_requests_total") >= 1


async def test_a_process_that_hangs_is_killed_and_replaced_and_its_streams_go_on(
    start_fleet: Callable[..., Fleet], worker: RuleWorker
) -> None:
    fleet = start_fleet(program=("-c", HASTY))
    async with AsyncClient(fleet.listen) as client:
        worker.hold()
        answer = asyncio.create_task(client.chat("Hello!", max_new_tokens=4))
        await until(lambda: len(worker.claimed) == 1)
        [hanging] = [child for child in fleet.children() if fleet.connections(child)]
        hanging.suspend()
        worker.free()
        assert (await answer).text == rule_text(4)
    await fleet.told("oasst_gateway_process_restarts_total", 1)
    await fleet.told("oasst_gateway_processes", NUM_PROCESSES)
    assert hanging.pid not in [child.pid for child in fleet.children()]
    assert fleet.log.read_text().count("process hangs, killed") == 1


async def test_a_reload_replaces_every_process_and_fails_no_request(fleet: Fleet, worker: RuleWorker) -> None:
    before = {child.pid for child in fleet.children()}
    answers = 0

    async def ask_until(is_reloaded: asyncio.Event) -> None:
        nonlocal answers
        async with AsyncClient(fleet.listen) as client:
            while not is_reloaded.is_set():
                assert (await client.chat("Hello!", max_new_tokens=4)).text == rule_text(4)
                answers += 1

    is_reloaded = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(ask_until(is_reloaded))
        await until(lambda: answers > 0)
        fleet.parent.send_signal(signal.SIGHUP)
        await until(lambda: before.isdisjoint(child.pid for child in fleet.children()), timeout_s=60)
        enough = answers + 8
        await until(lambda: answers >= enough, timeout_s=60)
        is_reloaded.set()
    assert len(fleet.children()) == NUM_PROCESSES


async def test_a_reload_of_what_is_broken_says_why_and_leaves_the_processes_as_they_were(
    start_fleet: Callable[..., Fleet], worker: RuleWorker, tmp_path: Path
) -> None:
    acme = draw_api_key()
    tenants = tmp_path / "tenants.toml"
    whole = f'[[tenants]]\nname = "acme"\nkeys = [{{ id = "{acme.key_id}", sha256 = "{acme.sha256}" }}]\n'
    tenants.write_text(whole)
    fleet = start_fleet("--tenants", str(tenants))
    before = {child.pid for child in fleet.children()}
    tenants.write_text(whole.replace("sha256", "md5"))
    fleet.parent.send_signal(signal.SIGHUP)
    await until(lambda: "reload failed, the processes before go on exit_code=" in fleet.log.read_text(), timeout_s=60)
    assert f"oasst_gateway: {tenants}: " in fleet.log.read_text()
    await until(lambda: {child.pid for child in fleet.children()} == before, timeout_s=60)
    async with AsyncClient(fleet.listen, api_key=acme.key) as client:
        assert (await client.chat("Hello!", max_new_tokens=4)).text == rule_text(4)


def test_an_address_that_is_taken_stops_the_start(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        listen = f"127.0.0.1:{stranger.getsockname()[1]}"
        start = subprocess.run(
            [sys.executable, "-m", "oasst_gateway", "--model", checkpoint, "--listen", listen, "--processes", "2"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert start.returncode == 1
    assert start.stderr == f"oasst_gateway: cannot listen on {listen}: Address already in use\n"


async def test_a_defect_in_looking_after_the_processes_is_counted_and_they_are_looked_after_on(
    start_fleet: Callable[..., Fleet],
) -> None:
    fleet = start_fleet(program=("-c", CLUMSY))
    await fleet.told("oasst_gateway_process_look_failures_total", NUM_PROCESSES)
    await fleet.told("oasst_gateway_redis_up", 1)
