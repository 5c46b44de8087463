"""The services that are measured, each for the length of a context."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from oasst_cli.up.valkey import find_server

from bench.checkpoints import DEMO

__all__ = [
    "MODEL",
    "TimedService",
    "first_line",
    "running_gateway",
    "running_stack",
    "start",
    "steps_of",
    "timed_service",
]

MODEL = "measured"


@contextlib.contextmanager
def running_stack(model: Path, *options: str, **environment: str) -> Iterator[dict[str, Any]]:
    """`oasst up` serves this model with these options, its environment ours and this; what it says of itself."""
    command = [sys.executable, "-m", "oasst_cli", "up", "--json", "--listen", "127.0.0.1:0", "--model", str(model)]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            yield json.loads(first_line(process))
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def running_gateway(*options: str) -> Iterator[tuple[psutil.Process, str, str]]:
    """A gateway on a Valkey of its own: its process, its address, the queue's URL."""
    with contextlib.ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="oasst-bench-")))
        socket = folder / "valkey.sock"
        valkey = [find_server(), "--port", "0", "--unixsocket", socket, "--dir", folder, "--appendonly", "yes"]
        start(exits, *map(str, valkey), "--save", "", "--logfile", str(folder / "valkey.log"))
        url = f"unix://{socket}"
        gateway = start(
            exits,
            *(sys.executable, "-m", "oasst_gateway", "--model", str(DEMO), "--model-name", MODEL, "--redis-url", url),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--log-level", "warning", *options),
        )
        yield psutil.Process(gateway.pid), json.loads(first_line(gateway))["listen"], url


@dataclass(frozen=True)
class TimedService:
    """A gateway with one worker whose steps take a given time."""

    address: str
    worker_metrics: str


@contextlib.contextmanager
def timed_service(sequences: int, step_s: float) -> Iterator[TimedService]:
    """Its worker runs so many sequences at once."""
    with running_gateway() as (_, address, url), contextlib.ExitStack() as exits:
        options = ["--redis-url", url, "--metrics-listen", "127.0.0.1:0", "--log-level", "warning"]
        options += ["--max-sequences", str(sequences), "--step-tokens", str(sequences * 16 + 512)]
        worker = start(exits, sys.executable, "-m", "bench.timed_worker", str(step_s), *options)
        yield TimedService(address, json.loads(first_line(worker))["metrics"])


def steps_of(metrics_address: str) -> tuple[float, float]:
    """How many steps the worker has taken, and the seconds they took in all."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as response:
        text = response.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("oasst_worker_step_seconds_"))
    return float(values["oasst_worker_step_seconds_count"]), float(values["oasst_worker_step_seconds_sum"])


def start(exits: contextlib.ExitStack, *command: str) -> subprocess.Popen[str]:
    """The process is told to end when the stack of exits is left."""
    process = exits.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    exits.callback(process.terminate)
    return process


def first_line(process: subprocess.Popen[str]) -> str:
    """What it says once it is there."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"it did not start: exit code {process.wait()}")
    return line.strip()
